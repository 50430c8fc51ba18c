"""How long training lasts, and when it validates."""

import math
import time

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

LIGHTNING_DEFAULT_EPOCHS = 1000
VALIDATIONS_PER_FIT = 3


class TrainingDuration(Callback):
    """Trains for a number of steps unless the user gave the trainer a duration, and always ends with a validation.

    Args:
        steps: Optimiser steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._began: tuple[float, int] | None = None
        self._validated_step = -1

    def prepare(self, trainer: Trainer) -> None:
        """Check the trainer, and leave it to :meth:`on_train_start` when to validate.

        Before the callbacks' ``setup``, in which early stopping reads the interval of validations.

        Raises:
            ValueError: If validation is switched off, or the strategy trains a copy in processes that it starts itself,
                as ``ddp_spawn`` and, in notebooks, ``ddp_notebook`` do: this process would keep the model of before.
            RuntimeError: If the trainer has trained before; Lightning would end at once, without a word.
        """
        if trainer.fit_loop.epoch_progress.current.processed:
            msg = "This Engine has trained a model and would not train another one. Give each model its own Engine."
            raise RuntimeError(msg)
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            msg = (
                "The strategies 'ddp_spawn', 'ddp_fork' and 'ddp_notebook' train copies of the model and lose what is "
                "fitted beside the weights. Give strategy='ddp' in a program or with `anomalib train`, or devices=1 in "
                "a notebook."
            )
            raise ValueError(msg)  # noqa: TRY004 - a value that the user chose
        if trainer.limit_val_batches == 0:
            msg = "limit_val_batches=0 leaves no images to set thresholds on. Leave it out, or give 1 or more."
            raise ValueError(msg)
        defaults = trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0
        if self.is_left_to_the_model(trainer) and defaults:
            trainer.check_val_every_n_epoch = None  # then Lightning counts batches, over epochs

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
        self._began = None
        if self.is_left_to_the_model(trainer):
            trainer.fit_loop.max_epochs = math.ceil(self.steps / self.steps_per_epoch(trainer))
            trainer.fit_loop.epoch_loop.max_steps = self.steps
            if trainer.check_val_every_n_epoch is None and trainer.val_check_interval == 1.0:
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

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember which weights thresholds are of."""
        del pl_module
        self._validated_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate and save the weights that training ended with, whatever ended it."""
        del pl_module
        if self._validated_step == trainer.global_step:
            return
        saved = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        before = [callback.best_model_path for callback in saved]
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        for callback, path in zip(saved, before, strict=True):
            if callback.best_model_path == path != "":  # of these weights already, but without thresholds
                trainer.save_checkpoint(path)
