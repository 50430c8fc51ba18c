"""An exponential moving average of the weights."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging as LightningWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAveraging(LightningWeightAveraging):
    """Lightning's exponential moving average, which swaps weights and buffers for validation and back.

    Buffers measured in validation (thresholds, normal ranges) are kept by both the averaged and the trained model:
    Lightning saves the first as the model and the second as its callbacks, of which the post-processor is one.

    Args:
        decay: Of the average.
    """

    def __init__(self, decay: float) -> None:
        # Interpolates, which leaves frozen weights exactly as they are; EMAWeightAveraging adds two products.
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._is_swapped = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap averaged weights in."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._is_swapped = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap weights back, keep the buffers."""
        measured = [buffer.clone() for buffer in pl_module.buffers()]
        super().on_validation_epoch_end(trainer, pl_module)
        self._is_swapped = False
        for buffer, value in zip(pl_module.buffers(), measured, strict=True):
            buffer.copy_(value)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Swap weights back, if training is interrupted in the middle of a validation."""
        del exception
        if self._is_swapped:
            self.on_validation_epoch_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the average into a copy of the model that the checkpoint has just rebuilt.

        Only to resume. A test after a fit has this callback, too, and Lightning's would replace the averaged weights
        that are to be tested by those that training goes on with.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup(trainer, pl_module, "fit")
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
