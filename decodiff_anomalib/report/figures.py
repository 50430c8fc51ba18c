"""Figures of a report: counts, ranking metrics, histograms and precision-recall curves of the images of a category."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decodiff_anomalib.evaluation.metrics import ranking_metrics, tally
from decodiff_anomalib.report.records import Image

BINS = 40
POINTS = 200
"""Largest number of points of a curve."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """Numbers of images at a threshold.

    Attributes:
        normal: Labelled normal.
        defective: Labelled defective.
        unlabelled: Without a label.
        false_alarms: Normal ones above the threshold.
        misses: Defective ones not above it.
        flagged: All above it.
        unscored: Whose score is not a number; they count as above it.
    """

    normal: int
    defective: int
    unlabelled: int
    false_alarms: int
    misses: int
    flagged: int
    unscored: int


@dataclass(frozen=True)
class Scores:
    """Scores ``(N,)`` of images, and which of them are labelled normal or defective, bool ``(N,)``."""

    scores: Floats
    normal: NDArray[np.bool_]
    defective: NDArray[np.bool_]

    @classmethod
    def of(cls, images: Sequence[Image]) -> "Scores":
        """The scores of some images."""
        labels = [image.defective for image in images]
        return cls(
            np.array([image.score for image in images], dtype=np.float64),
            np.array([label is False for label in labels], dtype=bool),
            np.array([label is True for label in labels], dtype=bool),
        )

    @property
    def unlabelled(self) -> NDArray[np.bool_]:
        """Which images have no label."""
        return ~(self.normal | self.defective)

    def counts(self, threshold: float) -> Counts:
        """Numbers of images at a threshold."""
        flagged = ~(self.scores <= threshold)  # what cannot be scored (NaN) does not pass
        groups = (
            self.normal, self.defective, self.unlabelled,
            self.normal & flagged, self.defective & ~flagged, flagged, np.isnan(self.scores),
        )  # fmt: skip
        return Counts(*(int(group.sum()) for group in groups))

    def metrics(self) -> dict[str, float]:
        """Area under the ROC curve and average precision of the labelled images; NaN where they are not defined."""
        labelled = ~self.unlabelled
        values = ranking_metrics(*tally(self.scores[labelled], self.defective[labelled]))
        return {name: values[name] for name in ("auroc", "ap")}

    def precision_recall(self) -> tuple[Floats, Floats]:
        """Recall, ascending, and precision at each distinct score of the labelled images, thinned evenly in recall.

        Both are empty if there are no normal or no defective images, or one has no score.
        """
        labelled = ~self.unlabelled
        negative, positive = tally(self.scores[labelled], self.defective[labelled])
        if not (negative.sum() > 0 and positive.sum() > 0):
            return np.empty(0), np.empty(0)
        true_positives, selected = (counts[::-1].cumsum() for counts in (positive, negative + positive))
        recall = true_positives / true_positives[-1]
        kept = np.unique(np.searchsorted(recall, np.linspace(0, 1, POINTS)))
        if len(recall) <= POINTS:
            kept = np.arange(len(recall))
        return recall[kept], (true_positives / selected)[kept]

    def histogram(self, edges: Floats) -> dict[str, list[int]]:
        """Numbers of normal, defective and unlabelled images in each bin; beyond the last edges, in the bins there."""
        clipped = np.clip(self.scores, edges[0], edges[-1])
        groups = {"normal": self.normal, "defective": self.defective, "unlabelled": self.unlabelled}
        scored = ~np.isnan(clipped)
        return {name: np.histogram(clipped[group & scored], edges)[0].tolist() for name, group in groups.items()}

    def limits(self, *, normalised: bool) -> tuple[float, float]:
        """Lowest and highest value of the scores' scale: 0 and 1, unless scores are raw or beyond them."""
        finite = self.scores[np.isfinite(self.scores)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        if normalised:
            return min(low, 0.0), max(high, 1.0)
        return low, high if high > low else low + 1.0

    def starting_threshold(self) -> float:
        """Where a threshold begins that the model has not set: no image that may be normal is above it."""
        scores = self.scores[~self.defective & np.isfinite(self.scores)]
        finite = scores if len(scores) else self.scores[np.isfinite(self.scores)]
        return float(finite.max()) if len(finite) else 0.0
