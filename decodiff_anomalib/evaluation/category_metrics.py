"""Metrics of one category over every image and pixel of its maps, in bounded memory."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from anomalib.data import ImageBatch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from decodiff_anomalib.conditioning import UNKNOWN
from decodiff_anomalib.evaluation.aupro import anomalib_aupro, region_shares
from decodiff_anomalib.evaluation.metrics import CATEGORY_RATES, RATES, name_by_scope, ranking_metrics, tally

MAX_BINS = 2**17

IMAGE_COLUMNS = ("score", "defective", "alarm", "correct", "unknown")
BIN_COLUMNS = ("lowest", "highest", "normal", "anomalous", "regions")
"""Of a bin: lowest and highest score, numbers of normal and anomalous pixels, sum of the latter's region shares."""


class CategoryMetrics(Metric):
    """Metrics of one category by Anomalib's definitions, in bounded memory.

    Image scores are kept, at 40 bytes each. Pixels are counted in bins of neighbouring scores. Up to :data:`MAX_BINS`
    distinct scores, each has its own bin and the metrics are exact. Beyond that, scores that differ only in their last
    bits share a bin, and one more bit is dropped whenever there are still too many. This takes 5 to 11 MB for any
    number of images. The bins do not depend on the order of the images, the batches or the processes.

    Args:
        category: Images of a batch that are of another category are ignored.
    """

    full_state_update = False

    def __init__(self, category: str) -> None:
        super().__init__()
        self.category = category
        # Flat, because torchmetrics lets a process without images send an empty vector.
        self.images: list[torch.Tensor]
        self.bins: list[torch.Tensor]
        self.add_state("images", default=[], dist_reduce_fx="cat")
        self.add_state("bins", default=[], dist_reduce_fx="cat")
        self.set_dtype(torch.float64)

    def update(self, batch: ImageBatch) -> None:
        """Count the images of this category.

        Args:
            batch: With ``category``, ``pred_score``, ``gt_label`` and, where available, ``pred_label``,
                ``pred_category``, ``anomaly_map`` and ``gt_mask`` ``(B, H, W)``. A batch without categories or labels
                is ignored; one without maps or masks counts for the image metrics only.
        """
        categories, predicted = (getattr(batch, field, None) for field in ("category", "pred_category"))
        if categories is None or batch.gt_label is None:
            return
        own = [index for index, name in enumerate(categories) if name == self.category]
        correct = None if predicted is None else torch.tensor([name == self.category for name in predicted])
        unknown = None if predicted is None else torch.tensor([name == UNKNOWN for name in predicted])
        columns = (batch.pred_score, batch.gt_label, batch.pred_label, correct, unknown)
        absent = torch.full((len(own),), float("nan"))
        chosen = [absent if values is None else values.flatten()[own].cpu() for values in columns]
        self.images.append(torch.stack(chosen, dim=1).double().flatten())
        if batch.anomaly_map is not None and batch.gt_mask is not None:
            for index in own:
                self._count_pixels(
                    batch.anomaly_map[index].float().cpu().numpy(), batch.gt_mask[index].cpu().numpy() > 0
                )

    def _count_pixels(self, scores: np.ndarray, mask: np.ndarray) -> None:
        """Add the pixels of an image: scores and bool mask ``(H, W)``."""
        normal, count = np.unique(scores[~mask], return_counts=True)
        anomalous, shares = scores[mask], region_shares(mask)
        bins = np.zeros((len(normal) + len(anomalous), len(BIN_COLUMNS)))
        bins[:, :2] = np.append(normal, anomalous)[:, None]
        bins[: len(normal), 2] = count
        bins[len(normal) :, 3:] = np.stack([np.ones_like(shares), shares], axis=1)
        if np.isnan(scores).any():
            bins[:, 2:] = np.nan
        self.bins.append(torch.from_numpy(bins).flatten())
        if sum(map(len, self.bins)) > 2 * MAX_BINS * len(BIN_COLUMNS):
            self.bins = [torch.from_numpy(_merge_bins(_rows(self.bins, BIN_COLUMNS))).flatten()]

    def compute(self) -> dict[str, float]:
        """Compute the metrics of all images so far, of all processes.

        Returns:
            dict[str, float]: The numbers of images (:data:`COUNTS`), the :data:`METRICS`, the shares of normal and of
            defective images with ``pred_label`` (:data:`RATES`), and the shares of images with the true or the unknown
            ``pred_category`` (:data:`CATEGORY_RATES`). NaN where the data do not define a value or a score is NaN.
        """
        images = pd.DataFrame(_rows(self.images, IMAGE_COLUMNS), columns=list(IMAGE_COLUMNS))
        lowest, highest, normal, anomalous, regions = _merge_bins(_rows(self.bins, BIN_COLUMNS)).T
        image = ranking_metrics(*tally(images.score.to_numpy(), images.defective.to_numpy() > 0))
        pixel = ranking_metrics(normal, anomalous, lowest == highest) | {"aupro": anomalib_aupro(normal, regions)}
        normal_images, defective_images = (images[images.defective == label] for label in (0, 1))
        rates = (float(normal_images.alarm.mean()), float(defective_images.alarm.mean()))
        category_rates = (float(images.correct.mean()), float(images.unknown.mean()))
        return {
            "normal": len(normal_images),
            "defective": len(defective_images),
            **name_by_scope(image, pixel),
            **dict(zip(RATES, rates, strict=True)),
            **dict(zip(CATEGORY_RATES, category_rates, strict=True)),
        }

    def precision_recall(self, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
        """Precision of the pixels over their recall, of all images so far, of all processes.

        Args:
            points: Largest number of points of the curve, evenly spaced in recall.

        Returns:
            tuple[np.ndarray, np.ndarray]: Recall, ascending, and precision, both ``(P,)``; empty if no pixel is normal,
            none is anomalous or a score is NaN.
        """
        with self.sync_context():
            _, _, normal, anomalous, _ = _merge_bins(_rows(self.bins, BIN_COLUMNS)).T
        if not (normal.sum() > 0 and anomalous.sum() > 0):
            return np.empty(0), np.empty(0)
        true_positives, selected = (counts[::-1].cumsum() for counts in (anomalous, normal + anomalous))
        recall = true_positives / true_positives[-1]
        kept = np.unique(np.searchsorted(recall, np.linspace(0, 1, points)))
        return recall[kept], (true_positives / selected)[kept]


def _rows(state: list[torch.Tensor] | torch.Tensor, columns: Sequence[str]) -> np.ndarray:
    """A flat state as ``(N, columns)``."""
    flat = dim_zero_cat(state) if len(state) else torch.zeros(0, dtype=torch.float64)
    return flat.cpu().numpy().reshape(-1, len(columns))


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Integers ``(N,)`` in the order of float32 scores, dense where floats are: near 0, and here near 1 as well.

    Anomalib's maps are in [0, 1] and have many values near both ends. ``1 - score`` is exact from 0.5 on.
    """

    def rank(floats: np.ndarray) -> np.ndarray:
        bits = floats.view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    scores, half = scores.astype(np.float32), np.float32(0.5)
    return np.where(scores < half, rank(scores), 2 * rank(half) - rank(1 - scores))


def _merge_bins(bins: np.ndarray) -> np.ndarray:
    """Sort bins ``(N, 5)`` and merge those with equal ranks but for the last bits; as few bits as ``MAX_BINS`` allows.

    The result does not depend on earlier merges: the widest bin shows how many bits they dropped, and no fewer are
    dropped now.
    """
    lowest, highest = _ranks(bins[:, 0]), _ranks(bins[:, 1])
    dropped = int(np.max(lowest ^ highest, initial=0)).bit_length()
    order = np.argsort(lowest, kind="stable")
    bins, lowest = bins[order], lowest[order]

    def first_of_each() -> np.ndarray:
        kept = lowest >> dropped
        return np.flatnonzero(np.diff(kept, prepend=kept[:1] - 1))

    while len(first := first_of_each()) > MAX_BINS:
        dropped += 1
    highest, counts = np.maximum.reduceat(bins[:, 1], first), np.add.reduceat(bins[:, 2:], first)
    return np.column_stack([bins[first, 0], highest, counts])
