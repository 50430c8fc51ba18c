"""Area under the per-region overlap (Bergmann et al., "Uninformed Students", CVPR 2020), by both protocols."""

import numpy as np
from scipy import ndimage
from scipy.integrate import trapezoid

MAX_FALSE_POSITIVE_RATE = 0.3
PAPER_THRESHOLDS = 200


def region_shares(mask: np.ndarray) -> np.ndarray:
    """Share of each anomalous pixel in the area of its region, as in Anomalib 8-connected.

    Args:
        mask: Bool ``(H, W)``.

    Returns:
        np.ndarray: One share for each true pixel, in row-major order.
    """
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    labels = labels[mask]
    return 1 / np.bincount(labels)[labels]


def paper_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """AUPRO as in the authors' program: at 200 thresholds, over the false-positive rates below 0.3.

    Pixels are counted by the number of thresholds they exceed, image by image: one pass in the memory of one image.

    Args:
        maps: Anomaly maps ``(N, H, W)``.
        masks: Bool ``(N, H, W)``.
    """
    lowest, highest = maps.min(), maps.max()
    thresholds = lowest + np.arange(PAPER_THRESHOLDS, dtype=maps.dtype) * ((highest - lowest) / PAPER_THRESHOLDS)
    bins = PAPER_THRESHOLDS + 1
    normal, covered = np.zeros(bins), np.zeros(bins)
    for scores, mask in zip(maps, masks, strict=True):
        exceeded = np.searchsorted(thresholds, scores, side="left")
        normal += np.bincount(exceeded[~mask], minlength=bins)
        covered += np.bincount(exceeded[mask], weights=region_shares(mask), minlength=bins)
    # A pixel that exceeds k thresholds is found at the first k of them.
    found_normal, found_covered = (counts[::-1].cumsum()[::-1][1:] for counts in (normal, covered))
    false_positive_rate = found_normal / max(1, normal.sum())
    kept = false_positive_rate < MAX_FALSE_POSITIVE_RATE
    if not covered.any() or not false_positive_rate[kept].any():
        return float("nan")
    false_positive_rate, overlap = false_positive_rate[kept], found_covered[kept] / covered.sum()
    # Divided by the largest kept rate, which may be well below 0.3; the area left of the smallest rate is not added.
    return float(trapezoid(overlap[::-1], false_positive_rate[::-1] / false_positive_rate.max()))


def anomalib_aupro(normal: np.ndarray, regions: np.ndarray) -> float:
    """AUPRO as in Anomalib: at every threshold, up to a false-positive rate of 0.3, interpolated there.

    Args:
        normal: Number of normal pixels in each bin of scores ``(S,)``, in ascending order.
        regions: Sum of the :func:`region_shares` of the anomalous pixels in each bin ``(S,)``.
    """
    if not (normal.sum() > 0 and regions.sum() > 0):
        return float("nan")
    rate, overlap = (np.append(0, counts[::-1].cumsum() / counts.sum()) for counts in (normal, regions))
    kept = rate <= MAX_FALSE_POSITIVE_RATE
    at_limit = np.interp(MAX_FALSE_POSITIVE_RATE, rate, overlap)
    area = trapezoid(np.append(overlap[kept], at_limit), np.append(rate[kept], MAX_FALSE_POSITIVE_RATE))
    return float(area / MAX_FALSE_POSITIVE_RATE)
