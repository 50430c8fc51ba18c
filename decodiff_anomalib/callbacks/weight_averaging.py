"""An exponential moving average of the weights."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging


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
