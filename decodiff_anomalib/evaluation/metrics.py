"""Names of the metrics and the ranking metrics, computed from counts of scores rather than from the scores."""

import numpy as np
from scipy.integrate import trapezoid

METRICS = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")
COUNTS = ("normal", "defective")
"""Numbers of images."""
RATES = ("false_alarm_rate", "detection_rate")
"""Shares of the normal and of the defective images that are above their threshold."""
CATEGORY_RATES = ("category_accuracy", "unknown_rate")
"""Shares of the images whose predicted category is the true one, or "unknown"."""


def name_by_scope(image: dict[str, float], pixel: dict[str, float]) -> dict[str, float]:
    """Join the metrics of images and of pixels, with the scope as a prefix of their names."""
    return {f"image_{name}": value for name, value in image.items()} | {
        f"pixel_{name}": value for name, value in pixel.items()
    }


def tally(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the negatives and positives at each distinct score.

    Args:
        scores: ``(N,)``.
        positive: Bool ``(N,)``.

    Returns:
        tuple[np.ndarray, np.ndarray]: Numbers of negatives and of positives, both ``(S,)``, in ascending order of the
        scores. If a score is NaN, all numbers of negatives are.
    """
    distinct, position = np.unique(scores, return_inverse=True)
    negative, positive = (np.bincount(position[kind], minlength=len(distinct)) for kind in (~positive, positive))
    return (np.nan * negative if np.isnan(distinct).any() else negative), positive


def ranking_metrics(negative: np.ndarray, positive: np.ndarray, tied: np.ndarray | bool = True) -> dict[str, float]:
    """Area under the ROC curve, average precision and largest F1 over all thresholds.

    Args:
        negative: Number of negatives in each bin of scores ``(S,)``, in ascending order; NaN makes all metrics NaN.
        positive: Number of positives in each bin ``(S,)``.
        tied: Whether all scores of a bin are equal, bool ``(S,)``. If so, the bin is one step of the average precision.
            If not, its scores are close but distinct, and their order is taken to be random.

    Returns:
        dict[str, float]: ``auroc``, ``ap`` and ``f1max``; NaN if there are no negatives or no positives.
    """
    if not (negative.sum() > 0 and positive.sum() > 0):
        return dict.fromkeys(("auroc", "ap", "f1max"), float("nan"))
    negative, positive, tied = (counts[::-1] for counts in np.broadcast_arrays(negative, positive, tied))
    total, true_positives = negative + positive, positive.cumsum()
    selected = total.cumsum()
    precision, recall = true_positives / selected, true_positives / true_positives[-1]
    # In random order, the k-th of p positives among h scores is expected near rank k/p · h. The mean precision at these
    # ranks is close to the integral over t from 0 to 1 of (a + t p) / (b + t h), where a and b are the positives and
    # the scores above the bin, plus one half, so that b is not zero in the first bin.
    positives_above, scores_above = true_positives - positive + 0.5, selected - total + 0.5
    density, above = positive / total, positives_above / scores_above
    spread = density + (above - density) * np.log1p(total / scores_above) * scores_above / total
    return {
        "auroc": float(trapezoid(np.append(0, recall), np.append(0, negative.cumsum() / negative.sum()))),
        "ap": float((positive * np.where(tied, precision, spread)).sum() / true_positives[-1]),
        "f1max": float(np.max(2 * true_positives / (selected + true_positives[-1]))),
    }
