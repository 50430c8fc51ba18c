"""What normalised scores and maps mean to the eye: multiples of the threshold, and colours, the same in every picture.

A normalised value ``n = s / (s + t)`` is 0.5 at the threshold ``t``, see
:class:`decodiff_anomalib.post_processor.DeCoDiffPostProcessor`; ``n / (1 - n)`` is the multiple ``s / t`` of it.
"""

import matplotlib as mpl
import numpy as np
from PIL import Image

AT_THRESHOLD = 0.5
COLOURS = "RdBu_r"
"""Blue below the threshold, white at it, red above; they differ in every kind of colour vision."""
COLOURS_OF_RAW = "cividis"
"""Of maps without thresholds, whose scale has no middle."""
LOWEST, HIGHEST = 0.2, 0.8
"""Ends of the colours, a quarter of the threshold and four times it; values beyond have the colour of the end."""
TICKS = {LOWEST: "¼×", 1 / 3: "½×", AT_THRESHOLD: "threshold", 2 / 3: "2×", HIGHEST: "4×"}
"""Value to label of a colour scale, in multiples of the threshold."""
NOT_A_NUMBER = "#808080"


def multiple_of_threshold(score: float, threshold: float = AT_THRESHOLD) -> float:
    """How many times the threshold a normalised score is; infinite at 1, NaN for what is not normalised."""
    if not 0 <= score <= 1:
        return float("nan")
    return float("inf") if score == 1 else score / (1 - score) * (1 - threshold) / threshold


def paint(values: np.ndarray, highest: float | None = None) -> Image.Image:
    """The colours of a map ``(H, W)``; grey where a value is not a number.

    Args:
        values: Normalised, 0.5 at the threshold.
        highest: For maps without a threshold: the value of the last colour. The first is that of 0.
    """
    low, high, name = (LOWEST, HIGHEST, COLOURS) if highest is None else (0.0, highest, COLOURS_OF_RAW)
    share = (values.astype(np.float64) - low) / max(high - low, np.finfo(np.float64).tiny)
    colours = mpl.colormaps[name].with_extremes(bad=NOT_A_NUMBER)
    return Image.fromarray(colours(np.ma.masked_invalid(share), bytes=True)[..., :3])


def colour_bar(size: tuple[int, int], highest: float | None = None) -> Image.Image:
    """All colours from left to right, ``size`` = (width, height), see :func:`paint`."""
    low, high = (LOWEST, HIGHEST) if highest is None else (0.0, highest)
    return paint(np.tile(np.linspace(low, high, size[0]), (size[1], 1)), highest)
