"""How long training lasts, and when it validates."""

import math
import time

from lightning.pytorch import Callback, LightningModule, Trainer

LIGHTNING_DEFAULT_EPOCHS = 1000
VALIDATIONS_PER_FIT = 3


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
        self._began = None
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
