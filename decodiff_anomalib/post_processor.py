"""Normalisation and thresholds, set on normal images of each category at a stated false-alarm rate."""

import logging
import math
from typing import Any, NamedTuple

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torchmetrics import CatMetric

from decodiff_anomalib.calibration import (
    FEWEST_NORMALS,
    limit_of_mean,
    normals_needed,
    prediction_limit,
    promised_rate,
)
from decodiff_anomalib.conditioning import category_indices, category_names, vocabulary

logger = logging.getLogger(__name__)


class Promise(NamedTuple):
    """What the thresholds of a category promise with 95 % confidence, for images like those they were set on.

    Attributes:
        category: Its name.
        normals: Normal images that the thresholds were set on.
        false_alarm_rate: Largest share of normal images above the image threshold.
        pixel_false_alarm_rate: Largest mean share of their pixels above the pixel threshold; ``None`` without maps.
    """

    category: str
    normals: int
    false_alarm_rate: float
    pixel_false_alarm_rate: float | None


class DeCoDiffPostProcessor(PostProcessor):
    """Normalises scores and maps by thresholds set on normal images, separately for each category.

    A score ``s`` becomes ``s / (s + threshold)``: 0.5 at the threshold, strictly increasing and never saturated, so
    that the ranking within a category is that of the raw scores (Anomalib's own normalisation clips at the range of the
    validation images, which ties all anomalies where these are normal). Scores of different categories are comparable,
    each in units of its category's threshold. Raw scores stay in the batch as ``raw_score``.

    The image threshold is the :func:`~decodiff_anomalib.calibration.prediction_limit` of the normal scores at the
    false-alarm rate asked for. The pixel threshold is the value that the asked share of normal pixels exceeds.

    The category is the one the model inferred (``category_index``), else the one the data name (``category`` of a
    batch). Without one, and for unknown categories, the thresholds over all normal images are used. An image of no
    trained category (``ood_score`` above 1) is anomalous: its score is at least ``ood_score / (ood_score + 1)``, which
    is above 0.5.

    It can be given to any of Anomalib's models.

    Args:
        false_alarm_rate: Share of normal images to be called anomalous.
        pixel_false_alarm_rate: Share of normal pixels to be called anomalous.
        image_sensitivity: As in Anomalib; 0.5 labels at the threshold.
        pixel_sensitivity: As in Anomalib; 0.5 labels at the threshold.

    Attributes:
        categories: Names of the categories, in the order of their indices.
        image_thresholds: ``(K + 1,)``, of each category and over all of them, which also serves categories that have
            too few normal images for their own; NaN before any were set.
        pixel_thresholds: The same for pixels.
        normal_scores: For each category, the raw scores of the normal images that the thresholds were set on.
        normal_pixel_rates: For each of these images, the share of its pixels above the pixel threshold.

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
        self.categories: tuple[str, ...] = ()
        self.image_thresholds: torch.Tensor
        self.pixel_thresholds: torch.Tensor
        self._allocate_thresholds()
        self._normal_scores = CatMetric()
        self._normal_pixel_tails = CatMetric()
        self._normal_categories = CatMetric()

    def _allocate_thresholds(self) -> None:
        """Register one row for each category and one over all, not set."""
        self.normal_scores: list[list[float]] = [[] for _ in self.categories]
        self.normal_pixel_rates: list[list[float]] = [[] for _ in self.categories]
        for name in ("image_thresholds", "pixel_thresholds"):
            not_set = torch.full((len(self.categories) + 1,), float("nan"), device=self._image_threshold.device)
            self.register_buffer(name, not_set)

    # ---------------------------------------------------------------- checkpoints

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        rates = "false_alarm_rate", "pixel_false_alarm_rate"
        return (*super()._checkpoint_config_keys, *rates, "categories", "normal_scores", "normal_pixel_rates")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the configuration; the thresholds that follow are of its categories.

        Raises:
            TypeError: If it has values of another kind, or
            ValueError: of other numbers, as a damaged file may have.
        """
        self.categories = tuple(map(str, config.get("categories", ())))
        self._allocate_thresholds()
        numbers: dict[str, Any] = {
            name: float(config[name]) for name in ("false_alarm_rate", "pixel_false_alarm_rate") if name in config
        }
        lists: dict[str, Any] = {
            name: [[float(value) for value in values] for values in config[name]]
            for name in ("normal_scores", "normal_pixel_rates")
            if name in config
        }
        for name, rows in lists.items():
            if len(rows) != len(self.categories):
                msg = f"{name} are of {len(rows)} categories, not of {len(self.categories)}."
                raise ValueError(msg)
        super().load_checkpoint_config({**config, **numbers, **lists, "categories": self.categories})

    # ---------------------------------------------------------------- thresholds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the categories of the model or the data."""
        if stage != "fit":
            return
        categories = getattr(pl_module, "categories", None) or vocabulary(category_names(trainer.datamodule))
        if categories != self.categories:
            self.categories = categories
            self._allocate_thresholds()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Batch, *args, **kwargs
    ) -> None:
        """Collect the scores and the highest pixels of the normal images of a batch.

        Raises:
            ValueError: If a score is not a number, which would be left out without a word.
        """
        del pl_module, args, kwargs
        if trainer.sanity_checking:
            return
        if outputs.pred_score.isnan().any():
            index = int(outputs.pred_score.flatten().isnan().nonzero()[0])
            name = outputs.image_path[index] if outputs.image_path else f"{index} of a batch"
            msg = f"The score of validation image {name} is not a number. Look at the image, or train anew."
            raise ValueError(msg)
        normal = torch.ones_like(outputs.pred_score, dtype=torch.bool)
        if outputs.gt_label is not None:
            normal = ~outputs.gt_label.bool()
        if not normal.any():
            return
        self._normal_scores.update(outputs.pred_score[normal].flatten().float())
        self._normal_categories.update(self._category_of(outputs)[normal].float())
        if outputs.anomaly_map is not None:
            self._normal_pixel_tails.update(self.highest_pixels(outputs.anomaly_map[normal]))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds."""
        del trainer, pl_module
        if not self._normal_scores.update_called:
            return
        scores, category = (metric.compute().reshape(-1) for metric in (self._normal_scores, self._normal_categories))
        tails = self._normal_pixel_tails.compute() if self._normal_pixel_tails.update_called else None
        for metric in (self._normal_scores, self._normal_pixel_tails, self._normal_categories):
            metric.reset()
        if len(scores) < FEWEST_NORMALS:
            msg = "%d normal validation images set no threshold; %d are needed."
            logger.warning(msg, len(scores), FEWEST_NORMALS)
            return
        self._allocate_thresholds()
        self._set_row(-1, scores, tails)
        for index, name in enumerate(self.categories):
            chosen = category == index
            if chosen.sum() >= FEWEST_NORMALS:
                self.set_on_normals(name, scores[chosen], None if tails is None else tails[chosen])
            else:
                self.image_thresholds[index] = self.image_thresholds[-1]
                self.pixel_thresholds[index] = self.pixel_thresholds[-1]

    def set_on_normals(self, category: str, scores: torch.Tensor, tails: torch.Tensor | None) -> None:
        """Set the thresholds of a category on its normal images, and keep their scores.

        Args:
            category: Its name.
            scores: Raw scores ``(N,)``, 4 or more.
            tails: The highest pixels ``(N, T)`` of each raw map, as :meth:`highest_pixels` gives them; ``None`` leaves
                the pixel threshold.
        """
        index = self.categories.index(category)
        self.normal_scores[index] = scores.tolist()
        for row in (index, -1) if len(self.categories) == 1 else (index,):
            self._set_row(row, scores, tails)
        if tails is not None:
            exceeding = tails > self.pixel_thresholds[index]
            self.normal_pixel_rates[index] = (exceeding.sum(1) / self._pixels_of_image).tolist()

    def add_normals(self, category: str, scores: torch.Tensor, tails: torch.Tensor) -> None:
        """Take further normal images into the thresholds of a category, which can only rise.

        They would fall where the further images are more alike than images to come, such as overlapping ones; and of
        earlier images, the pixels are not kept. Arguments are those of :meth:`set_on_normals`.
        """
        index = self.categories.index(category)
        rates, kept = self.normal_pixel_rates[index], torch.tensor(self.normal_scores[index])
        before = self.image_thresholds.clone(), self.pixel_thresholds.clone()
        self.set_on_normals(category, scores, tails)
        self.set_on_normals(category, torch.cat([kept.to(scores), scores]), None)
        for thresholds, lowest in zip((self.image_thresholds, self.pixel_thresholds), before, strict=True):
            thresholds.copy_(torch.fmax(thresholds, lowest))
        self.normal_pixel_rates[index] = rates + self.normal_pixel_rates[index]

    def set_rate(self, rate: float, category: str | None = None) -> None:
        """Set image thresholds at a false-alarm rate in (0, 0.5), on the scores that were kept.

        Args:
            rate: Share of normal images to be called anomalous.
            category: The only one to set; by default all, and the threshold over all.
        """
        for index, scores in enumerate(self.normal_scores):
            if len(scores) >= FEWEST_NORMALS and category in {None, self.categories[index]}:
                self.image_thresholds[index] = prediction_limit(torch.tensor(scores), rate)
        if category is None or len(self.categories) == 1:
            self.false_alarm_rate = rate
            every = torch.tensor([score for scores in self.normal_scores for score in scores])
            self.image_thresholds[-1] = prediction_limit(every, rate)
            self._image_threshold.copy_(self.image_thresholds[-1])

    def _set_row(self, row: int, scores: torch.Tensor, tails: torch.Tensor | None) -> None:
        self.image_thresholds[row] = prediction_limit(scores, self.false_alarm_rate)
        self._image_threshold.copy_(self.image_thresholds[-1])
        if tails is not None:
            highest = math.ceil(self.pixel_false_alarm_rate * len(scores) * self._pixels_of_image)
            self.pixel_thresholds[row] = tails.flatten().topk(highest).values[-1]
            self._pixel_threshold.copy_(self.pixel_thresholds[-1])

    def highest_pixels(self, maps: torch.Tensor) -> torch.Tensor:
        """The highest pixels ``(N, T)`` of ``maps`` ``(N, ...)``, among which the pixel threshold lies.

        Fifty times the share asked for is kept of each image, so that the share over all images is among it even if
        their maps differ much.
        """
        maps = maps.flatten(1).float()
        self._pixels_of_image = maps.shape[1]
        return maps.topk(math.ceil(min(1.0, 50 * self.pixel_false_alarm_rate) * maps.shape[1]), dim=1).values

    # ---------------------------------------------------------------- what they promise

    def promises(self) -> list[Promise]:
        """What the thresholds of each category promise; of categories that have their own thresholds."""
        promises = []
        for index, name in enumerate(self.categories):
            scores, pixels = self.normal_scores[index], self.normal_pixel_rates[index]
            if len(scores) < FEWEST_NORMALS:
                continue
            exceeding = sum(score > float(self.image_thresholds[index]) for score in scores)
            pixel_rate = limit_of_mean(torch.tensor(pixels)) if pixels else None
            promises.append(Promise(name, len(scores), promised_rate(len(scores), exceeding), pixel_rate))
        return promises

    def describe(self) -> str:
        """The promises in words, one line for each category."""
        lines = []
        for promise in self.promises():
            line = (
                f"{promise.category}: at most {100 * promise.false_alarm_rate:.3g} % of normal images above the "
                f"threshold, promised with 95 % confidence by {promise.normals} normal images"
            )
            if promise.false_alarm_rate > self.false_alarm_rate:
                needed = normals_needed(self.false_alarm_rate)
                line += f"; promising the {100 * self.false_alarm_rate:g} % asked for takes {needed}"
            if promise.pixel_false_alarm_rate is not None:
                line += f". Pixels: at most {100 * promise.pixel_false_alarm_rate:.2g} %"
            lines.append(line + ".")
        return "\n".join(lines)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the thresholds promise."""
        del pl_module
        if trainer.is_global_zero and self.has_thresholds:
            logger.info("False alarms on images like these:\n%s", self.describe())

    def _category_of(self, batch: Batch) -> torch.Tensor:
        """Index ``(B,)`` of each image's category, the number of categories where it has none."""
        inferred, names = getattr(batch, "category_index", None), getattr(batch, "category", None)
        if inferred is not None:
            return inferred
        if names is not None:
            return category_indices(names, self.categories).to(batch.image.device)
        lone = 0 if len(self.categories) == 1 else len(self.categories)
        return torch.full((len(batch.image),), lone, device=batch.image.device)

    # ---------------------------------------------------------------- applying them

    @property
    def has_thresholds(self) -> bool:
        """Whether thresholds were set."""
        return not self.image_thresholds[-1].isnan()

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise and label the predictions of a model, in exported graphs too."""
        pred_score, anomaly_map = predictions.pred_score, predictions.anomaly_map
        if pred_score is None:
            pred_score = anomaly_map.amax(dim=(-2, -1)).flatten()
        category, ood_score = (getattr(predictions, name, None) for name in ("category_index", "ood_score"))
        if category is None:
            category = torch.full_like(pred_score.flatten(), len(self.categories), dtype=torch.long)
        return self._normalise_and_label(pred_score, anomaly_map, category, ood_score)

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise and label a batch of predictions; without thresholds, leave the scores raw and label nothing."""
        batch.raw_score = batch.pred_score
        if not self.has_thresholds:
            return
        predictions = self._normalise_and_label(
            batch.pred_score, batch.anomaly_map, self._category_of(batch), getattr(batch, "ood_score", None)
        )
        batch.update(**predictions._asdict())

    def _normalise_and_label(
        self,
        pred_score: torch.Tensor,
        anomaly_map: torch.Tensor | None,
        category: torch.Tensor,
        ood_score: torch.Tensor | None,
    ) -> InferenceBatch:
        score = _normalise(pred_score, self.image_thresholds[category].view_as(pred_score))
        if ood_score is not None:
            ood_score = ood_score.view_as(score)
            score = torch.where(ood_score > 1, torch.maximum(score, ood_score / (ood_score + 1)), score)
        pred_label = ~(score <= 1 - self.image_sensitivity)  # what cannot be scored (NaN) does not pass
        if anomaly_map is None:
            return InferenceBatch(pred_label=pred_label, pred_score=score)
        threshold = self.pixel_thresholds[category].view(-1, *[1] * (anomaly_map.ndim - 1))
        pixels = _normalise(anomaly_map, threshold)
        pred_mask = ~(pixels <= 1 - self.pixel_sensitivity)
        return InferenceBatch(pred_label=pred_label, pred_score=score, pred_mask=pred_mask, anomaly_map=pixels)


def _normalise(values: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Map ``[0, inf)`` to ``[0, 1)`` with the threshold at 0.5, and go on straight below 0, where some models score.

    Raw where no threshold was set.
    """
    positive = threshold.clamp_min(1e-12)
    normalised = torch.where(values < 0, values / positive, values / (values + positive).clamp_min(1e-12))
    return torch.where(threshold.isnan(), values, normalised)
