"""Scores and maps that mean the same in every run: thresholds set on normal images at a stated false-alarm rate."""

import logging
import math

import torch
from anomalib.data import Batch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from scipy import stats
from torchmetrics import CatMetric, SumMetric

logger = logging.getLogger(__name__)


class DeCoDiffPostProcessor(PostProcessor):
    """Normalises by a threshold that normal images alone define.

    A score ``s`` becomes ``s / (s + threshold)``: 0.5 at the threshold, always increasing, never saturating, so that
    the ranking of images is that of their raw scores (Anomalib's own normalisation clips at the range seen in
    validation, which ties all anomalies where validation holds only normal images).

    The image threshold is the upper prediction limit of one more normal score, at the false-alarm rate asked for, from
    Student's t on the logarithms of the normal scores; unlike a quantile it stays honest on a few dozen images. The
    pixel threshold is the value that the asked share of normal pixels exceeds.

    Args:
        false_alarm_rate: Share of normal images to be called anomalous.
        pixel_false_alarm_rate: Share of normal pixels to be called anomalous.
        image_sensitivity: As in Anomalib; 0.5 labels at the threshold.
        pixel_sensitivity: As in Anomalib; 0.5 labels at the threshold.

    Raises:
        ValueError: If a rate is not between 0 and 0.5.
    """

    def __init__(
        self,
        false_alarm_rate: float = 0.01,
        pixel_false_alarm_rate: float = 0.001,
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
    ) -> None:
        super().__init__(image_sensitivity=image_sensitivity, pixel_sensitivity=pixel_sensitivity)
        for name, rate in {
            "false_alarm_rate": false_alarm_rate,
            "pixel_false_alarm_rate": pixel_false_alarm_rate,
        }.items():
            if not 0 < rate < 0.5:
                msg = f"{name}={rate} must be between 0 and 0.5; 0.01 calls one normal in a hundred anomalous."
                raise ValueError(msg)
        self.false_alarm_rate = false_alarm_rate
        self.pixel_false_alarm_rate = pixel_false_alarm_rate
        self._normal_scores = CatMetric()
        self._normal_pixel_tails = CatMetric()
        self._normal_pixel_count = SumMetric()

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "false_alarm_rate", "pixel_false_alarm_rate")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Batch, *args, **kwargs
    ) -> None:
        """Collect what the normal images of a batch score."""
        del pl_module, args, kwargs
        if trainer.sanity_checking:
            return
        normal = torch.ones_like(outputs.pred_score, dtype=torch.bool)
        if outputs.gt_label is not None:
            normal = ~outputs.gt_label.bool()
        if not normal.any():
            return
        maps = outputs.anomaly_map[normal].flatten(1).float()
        # fifty times the share asked for, of each image, holds that share of all of them even where images differ
        tail = math.ceil(min(1.0, 50 * self.pixel_false_alarm_rate) * maps.shape[1])
        self._normal_scores.update(outputs.pred_score[normal].flatten().float())
        self._normal_pixel_tails.update(maps.topk(tail, dim=1).values.flatten())
        self._normal_pixel_count.update(maps.numel())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds."""
        del pl_module
        if not self._normal_scores.update_called:
            return
        scores, pixel_tail = self._normal_scores.compute(), self._normal_pixel_tails.compute()
        num_pixels = int(self._normal_pixel_count.compute())
        for metric in (self._normal_scores, self._normal_pixel_tails, self._normal_pixel_count):
            metric.reset()
        if len(scores) < 2:
            logger.warning("One normal validation image sets no threshold; 2 are needed, 20 or more are good.")
            return
        self._image_threshold.copy_(self._prediction_limit(scores))
        self._pixel_threshold.copy_(pixel_tail.topk(math.ceil(self.pixel_false_alarm_rate * num_pixels)).values[-1])
        if trainer.is_global_zero:
            logger.info(
                "Thresholds from %d normal images: score %.4g for a false-alarm rate of %g, pixel %.4g for %g.",
                len(scores),
                self._image_threshold.item(),
                self.false_alarm_rate,
                self._pixel_threshold.item(),
                self.pixel_false_alarm_rate,
            )

    def _prediction_limit(self, scores: torch.Tensor) -> torch.Tensor:
        """Upper prediction limit of one more of the log-normal ``scores`` ``(N,)``."""
        logs = scores.clamp_min(torch.finfo(scores.dtype).tiny).double().log()
        count = len(logs)
        quantile = float(stats.t.ppf(1 - self.false_alarm_rate, df=count - 1))
        return (logs.mean() + quantile * logs.std() * math.sqrt(1 + 1 / count)).exp()

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        """Map ``[0, inf)`` to ``[0, 1)`` with the threshold at 0.5; raw where no threshold was set."""
        del norm_min, norm_max  # the range of normal images says nothing about that of anomalies
        if preds is None:
            return None
        return torch.where(torch.isnan(threshold), preds, preds / (preds + threshold).clamp_min(1e-12))
