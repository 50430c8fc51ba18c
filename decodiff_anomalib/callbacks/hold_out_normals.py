"""The guard that keeps test images from setting thresholds."""

import logging

from anomalib.data.utils.split import ValSplitMode, random_split
from lightning.pytorch import LightningModule, Trainer

from decodiff_anomalib.callbacks.data_overrides import DataOverrides

logger = logging.getLogger(__name__)


class HoldOutNormals(DataOverrides):
    """Validates on held-out training images where the datamodule would validate on test images or not at all.

    Args:
        share: Share of the training images that is held out; 0 holds none out.
        seed: Chooses them.
    """

    def __init__(self, share: float, seed: int) -> None:
        super().__init__()
        self.share = share
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Split the training images.

        Raises:
            ValueError: If fewer than two images would be held out.
        """
        del pl_module
        datamodule = trainer.datamodule
        on_test = {ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TEST, ValSplitMode.NONE}
        if stage != "fit" or not self.share or getattr(datamodule, "val_split_mode", None) not in on_test:
            return
        train_data = datamodule.train_data
        if round(len(train_data) * self.share) < 2:
            msg = (
                f"{len(train_data)} training images leave fewer than 2 to set thresholds at "
                f"calibration_split={self.share}. Give more images or a larger share; "
                "calibration_split=0 uses the datamodule's own validation images."
            )
            raise ValueError(msg)
        remaining, held_out = random_split(train_data, self.share, seed=self.seed)
        self.override(datamodule, train_data=remaining, val_data=held_out)
        datamodule.setup(stage)  # gives the held-out images the augmentations of validation
        logger.info(
            "Held out %d of %d training images to set thresholds; test images are not used for it.",
            len(held_out),
            len(train_data),
        )
