"""The guard that keeps test images from setting thresholds."""

import logging

from anomalib.data.utils import LabelName, ValSplitMode
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from decodiff_anomalib.calibration import FEWEST_NORMALS
from decodiff_anomalib.callbacks.data_overrides import DataOverrides
from decodiff_anomalib.data.normal_images import hold_out

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
        """Split the training images, and check that there are enough to set thresholds.

        Raises:
            ValueError: If there are too few training images to hold some out, or too few normal validation images.
        """
        del pl_module
        datamodule = trainer.datamodule
        if stage != "fit" or datamodule is None:
            return
        on_test = {ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TEST, ValSplitMode.NONE}
        if self.share and getattr(datamodule, "val_split_mode", None) in on_test:
            self._hold_out(datamodule)
        self._check_validation(datamodule)

    def _hold_out(self, datamodule: LightningDataModule) -> None:
        train_data = datamodule.train_data
        if len(train_data) < 2 * FEWEST_NORMALS:
            msg = (
                f"There are {len(train_data)} training images; {2 * FEWEST_NORMALS} or more are needed, "
                f"{FEWEST_NORMALS} of them to set thresholds. Add normal images, or give validation images of the "
                "datamodule's own and calibration_split=0."
            )
            raise ValueError(msg)
        remaining, held_out = hold_out(train_data, self.share, self.seed)
        self.override(datamodule, train_data=remaining, val_data=held_out)
        datamodule.setup("fit")  # gives the held-out images the augmentations of validation
        logger.info(
            "Held out %d of %d training images to set thresholds; test images are not used for it.",
            len(held_out),
            len(train_data),
        )

    @staticmethod
    def _check_validation(datamodule: LightningDataModule) -> None:
        val_data = getattr(datamodule, "val_data", None)
        labels = getattr(getattr(val_data, "samples", None), "label_index", None)
        if val_data is not None and labels is None:  # a dataset that does not tell
            return
        normal = 0 if labels is None else int((labels == LabelName.NORMAL).sum())
        if normal < FEWEST_NORMALS:
            msg = (
                f"There are {normal} normal validation images; thresholds need {FEWEST_NORMALS} or more. Add some, or "
                "let training images be held out: calibration_split=0.15, or val_split_mode=from_train of the data."
            )
            raise ValueError(msg)
