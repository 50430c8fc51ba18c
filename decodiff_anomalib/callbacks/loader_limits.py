"""Limits of the loaders in training."""

import os

from lightning.pytorch import LightningModule, Trainer

from decodiff_anomalib.callbacks.data_overrides import DataOverrides


class LoaderLimits(DataOverrides):
    """Keeps loaders from reading more than training uses.

    Args:
        max_batch_size: Images used of a training batch; ``None`` uses all.
    """

    def __init__(self, max_batch_size: int | None) -> None:
        super().__init__()
        self.max_batch_size = max_batch_size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Limit the workers to the number of cores, and the batch size."""
        del pl_module
        datamodule = trainer.datamodule
        if stage != "fit" or datamodule is None:
            return
        self.override(datamodule, num_workers=min(datamodule.num_workers, os.cpu_count() or 1))
        if self.max_batch_size is not None:
            self.override(datamodule, train_batch_size=min(datamodule.train_batch_size, self.max_batch_size))
