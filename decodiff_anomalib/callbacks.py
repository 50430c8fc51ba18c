"""What DeCoDiff adds to a training, each as a callback of Lightning."""

import logging
import math
import os
import time
from typing import Any

from anomalib.data import Batch
from anomalib.data.utils.split import ValSplitMode, random_split
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import Dataset

from decodiff_anomalib.data.images import image_paths, inspect_images, restore_depth

logger = logging.getLogger(__name__)

LIGHTNING_DEFAULT_EPOCHS = 1000
VALIDATIONS_PER_FIT = 3


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


class DataOverrides(Callback):
    """Changes attributes of the datamodule for the duration of a fit and restores them afterwards."""

    def __init__(self) -> None:
        self._restore: dict[str, Any] = {}

    def override(self, datamodule: LightningDataModule, **attributes: object) -> None:
        """Set attributes of the datamodule until the end of the fit."""
        self._restore |= {name: getattr(datamodule, name, None) for name in attributes}
        vars(datamodule).update(attributes)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the datamodule, for the next model."""
        del pl_module
        if stage == "fit" and trainer.datamodule is not None:
            vars(trainer.datamodule).update(self._restore)
            self._restore = {}


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


class TrainingDuration(Callback):
    """Trains for a number of steps unless the user gave the trainer a duration, and ends with a validation.

    Args:
        steps: Optimiser steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._began: tuple[float, int] | None = None

    @staticmethod
    def is_left_to_the_model(trainer: Trainer) -> bool:
        """Whether the user gave the trainer no duration."""
        return trainer.max_epochs == LIGHTNING_DEFAULT_EPOCHS and trainer.max_steps == -1

    def total_steps(self, trainer: Trainer) -> float:
        """Optimiser steps of the whole training; infinite where only a time is given."""
        return self.steps if self.is_left_to_the_model(trainer) else trainer.estimated_stepping_batches

    @staticmethod
    def steps_per_epoch(trainer: Trainer) -> int:
        """Optimiser steps of an epoch."""
        return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the steps; validate a few times rather than every epoch, unless told when to."""
        del pl_module
        if self.is_left_to_the_model(trainer):
            trainer.fit_loop.max_epochs = math.ceil(self.steps / self.steps_per_epoch(trainer))
            trainer.fit_loop.epoch_loop.max_steps = self.steps
            if trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0:  # Lightning's defaults
                trainer.check_val_every_n_epoch = None  # then Lightning counts batches, over epochs
                trainer.val_check_batch = math.ceil(self.steps / VALIDATIONS_PER_FIT) * trainer.accumulate_grad_batches

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object, **__: object) -> None:
        """Log the minutes left at the present pace, where the number of steps is known."""
        now, step, total = time.monotonic(), trainer.global_step, self.total_steps(trainer)
        if self._began is None:
            self._began = now, step
        began, first = self._began
        if step > first and not math.isinf(total):
            left = (now - began) / 60 / (step - first) * max(0, total - step)
            pl_module.log("minutes_left", left, prog_bar=True, logger=False, batch_size=1)

    def on_train_batch_end(self, trainer: Trainer, *_: object, **__: object) -> None:
        """Stop at ``max_steps`` as early stopping does: with a validation, since thresholds are of earlier weights."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True


class WeightAveraging(EMAWeightAveraging):
    """Lightning's exponential moving average, which swaps weights and buffers for validation and back.

    Buffers measured in validation (thresholds, normal ranges) are kept by both the averaged and the trained model:
    Lightning saves the first as the model and the second as its callbacks, of which the post-processor is one.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap weights back, keep the buffers."""
        measured = [buffer.clone() for buffer in pl_module.buffers()]
        super().on_validation_epoch_end(trainer, pl_module)
        for buffer, value in zip(pl_module.buffers(), measured, strict=True):
            buffer.copy_(value)
