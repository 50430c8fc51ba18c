"""Checking image files before work starts."""

from anomalib.data import Batch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import Dataset

from decodiff_anomalib.data.images import image_paths, inspect_images, restore_depth


class ImageFiles(Callback):
    """Checks every image file before work starts and restores the depth of 16-bit images."""

    def __init__(self) -> None:
        self._deep_paths: frozenset[str] = frozenset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the files of the datamodule that the stage reads."""
        del pl_module
        subsets = {"fit": ("train_data", "val_data"), "validate": ("val_data",), "test": ("test_data",)}
        self._inspect(*(getattr(trainer.datamodule, name, None) for name in subsets.get(stage, ())))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the files of the loaders."""
        del pl_module
        loaders = trainer.predict_dataloaders
        self._inspect(*(loader.dataset for loader in (loaders if isinstance(loaders, list) else [loaders])))

    def _inspect(self, *datasets: Dataset | None) -> None:
        paths = [path for dataset in datasets if dataset is not None for path in image_paths(dataset)]
        self._deep_paths |= inspect_images(paths)

    def restore_depth(self, batch: Batch) -> None:
        """Replace the 16-bit images of ``batch``, which Anomalib reads clipped, by their full depth."""
        if self._deep_paths:
            restore_depth(batch, self._deep_paths)
