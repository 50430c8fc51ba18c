"""Checking every image file before work starts, and reading what Anomalib would read wrong."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from anomalib.data import Batch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import Dataset

from decodiff_anomalib.data.images import (
    image_owners,
    inspect_images,
    mask_paths,
    reread,
    settle_white_level,
    sort_out,
    too_bright,
)
from decodiff_anomalib.data.run_images import datasets_of

if TYPE_CHECKING:
    from decodiff_anomalib.image_io import Depth

logger = logging.getLogger(__name__)


class ImageFiles(Callback):
    """Checks every image file and mask, settles the model's white level, and rereads images.

    A training from the start chooses ``white_level`` of the model from the images that it reads, held-out ones
    included, unless one was stated. Later images must not be above it. A model that has none, because it was trained on
    images of 8 bits or not at all, takes one from the first images of more than 8 bits that it meets.

    All this comes after a checkpoint was loaded, which brings its white level.
    """

    def __init__(self) -> None:
        self._owners: dict[str, Dataset] = {}
        self._trusted: set[str] = set()
        self._found: dict[str, Depth | None] = {}

    def sort_out(self, paths: Iterable[str]) -> dict[str, str]:
        """Inspect files before the check, which then trusts them; returns why those that cannot be read cannot."""
        names = list(paths)
        self._trusted = set(names)
        self._found, reasons = sort_out(names)
        return reasons

    def too_bright(self, white_level: float | None) -> dict[str, str]:
        """Of the files that were sorted out and can be read, why those above a white level are not."""
        return {} if white_level is None else too_bright(self._found, white_level)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the images to train and validate on."""
        if trainer.ckpt_path is None:  # as everything else that is fitted to the training images
            pl_module.white_level = pl_module.hparams["white_level"]
        self._check(trainer, pl_module, *self._subsets(trainer, "train_data", "val_data"))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the images to validate on, unless a fit has done so."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._check(trainer, pl_module, *self._subsets(trainer, "val_data"))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the images to test on."""
        self._check(trainer, pl_module, *self._subsets(trainer, "test_data"))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the images of the loaders."""
        self._check(trainer, pl_module, *datasets_of(trainer.predict_dataloaders))

    @staticmethod
    def _subsets(trainer: Trainer, *names: str) -> list[Dataset]:
        subsets = (getattr(trainer.datamodule, name, None) for name in names)
        return [subset for subset in subsets if subset is not None]

    def _check(self, trainer: Trainer, pl_module: LightningModule, *datasets: Dataset) -> None:
        owners = {path: owner for dataset in datasets for path, owner in image_owners(dataset).items()}
        found = {path: depth for path, depth in self._found.items() if path in owners}
        found |= inspect_images(path for path in owners if path not in self._trusted)
        inspect_images({path for dataset in datasets for path in mask_paths(dataset)})
        self._trusted, self._found = set(), {}
        self._owners |= {path: owners[path] for path in found}
        before, pl_module.white_level = pl_module.white_level, settle_white_level(found, pl_module.white_level)
        if before is not None or pl_module.white_level is None:
            return
        deep = sum(depth is not None for depth in found.values())
        if trainer.state.fn == TrainerFn.FITTING:
            logger.info("White level %g, from %d images of more than 8 bits.", pl_module.white_level, deep)
        else:
            logger.warning(
                "The model has no white level: it was not trained on images of more than 8 bits. It takes %g, from %d "
                "such images; --model.white_level states another.",
                pl_module.white_level,
                deep,
            )

    def reread(self, batch: Batch, white_level: float | None) -> None:
        """Replace images that Anomalib has read wrong, see :func:`decodiff_anomalib.data.images.reread`."""
        reread(batch, self._owners, white_level)
