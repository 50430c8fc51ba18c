"""Limits and ranges measured on held-out normal images."""

import math
from collections.abc import Sequence

import torch
from scipy import stats
from torch import nn

FEWEST_NORMALS = 4  # images that set a threshold: of two or three, the prediction limit is out of all reach
FEWEST_FURTHER_NORMALS = 2 * FEWEST_NORMALS  # that a trained model can learn from: each half is scored by the other
CONFIDENCE = 0.95
CLEAN_QUANTILE = 0.25  # of a map: even large defects move it little
SHIFT_RATE = 0.001  # of normal images that are taken for shifted
HIGH_QUANTILE = 0.99
RINGS = 4  # three along the border, and the interior
RING_WIDTH = 8  # pixels, a cell of the latent grid
SMALLEST = 1e-6  # of a map's values and of the spread of logarithms, so that all stays finite


def prediction_limit(values: torch.Tensor, rate: float) -> torch.Tensor:
    """Upper prediction limit for one further value of a log-normal sample (Student's t on the logarithms).

    Unlike an empirical quantile it can be stated for rates below ``1 / N`` (Hahn & Meeker, "Statistical Intervals",
    one-sided prediction bound for a normal distribution).

    Args:
        values: ``(N,)``, at least 0, of normal images; 2 or more.
        rate: Share of further values that may exceed the limit, in (0, 1).

    Returns:
        torch.Tensor: The limit, float64 scalar.
    """
    logs = values.clamp_min(torch.finfo(values.dtype).tiny).double().log()
    count = len(logs)
    quantile = float(stats.t.ppf(1 - rate, df=count - 1))
    spread = logs.std().clamp_min(SMALLEST)  # equal values stay below their limit in single precision, too
    return (logs.mean() + quantile * spread * math.sqrt(1 + 1 / count)).exp()


def promised_rate(count: int, exceeding: int = 0) -> float:
    """The false-alarm rate that normal images promise: with 95 % confidence, the true rate is not above it.

    The upper limit of Clopper & Pearson (Hahn & Meeker, "Statistical Intervals", section 6.2). It supposes that further
    images are like these.

    Args:
        count: Normal images that were not trained on.
        exceeding: Those of them above the threshold.
    """
    return 1.0 if exceeding == count else float(stats.beta.ppf(CONFIDENCE, exceeding + 1, count - exceeding))


def normals_needed(rate: float) -> int:
    """Normal images below a threshold that are needed to promise ``rate``: 29 for 10 %, 59 for 5 %, 299 for 1 %."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-rate))


def limit_of_mean(values: torch.Tensor) -> float:
    """Upper 95 % confidence limit of the mean of ``values`` ``(N,)`` (Student's t), 2 or more."""
    spread = float(values.double().std()) / math.sqrt(len(values))
    return float(values.double().mean()) + float(stats.t.ppf(CONFIDENCE, df=len(values) - 1)) * spread


class NormalRange(nn.Module):
    """Range of each level's map on normal images, and by how much other values exceed it.

    A value ``x`` becomes ``1 + (max(0, log(x / median)) / log(high / median))^2``, with the median and the 99 %
    quantile ``high`` of normal images: 1 up to the median and 2 at ``high``, whatever the units of the level. The
    square keeps one level that stands out visible in a mean over levels. The offset of 1 keeps the logarithms of normal
    scores, on which thresholds are set, close together.

    Ranges are separate for each category and for rings along the border, where objects are cut off, receptive fields
    are padded, and the values of normal images are higher than inside.

    Args:
        levels: Names of the maps.
        num_categories: ``K``; row ``K`` of each table is fitted to all categories and serves unknown images.
    """

    def __init__(self, levels: Sequence[str], num_categories: int) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.median: torch.Tensor
        self.high: torch.Tensor
        # Until fitted, the mapping is increasing, so that the ranking is kept.
        self.register_buffer("median", torch.full((num_categories + 1, len(self.levels), RINGS), SMALLEST))
        self.register_buffer("high", torch.ones(num_categories + 1, len(self.levels), RINGS))

    @torch.no_grad()
    def fit(self, row: int, level: str, maps: torch.Tensor) -> None:
        """Set the range of ``level`` of category ``row`` from ``maps`` ``(N, 1, H, W)`` of normal images."""
        column, ring = self.levels.index(level), _rings(maps.shape[-2:]).argmax(0).to(maps.device)[::4, ::4]
        for index in range(RINGS):
            # Small images have fewer rings; their innermost one serves for the rest.
            values = maps[:, 0, ::4, ::4][:, ring == min(index, int(ring.max()))].flatten().float()
            median = values.median().clamp_min(SMALLEST)
            high = values.kthvalue(max(1, round(HIGH_QUANTILE * len(values)))).values
            self.median[row, column, index] = median
            self.high[row, column, index] = torch.maximum(high, 1.01 * median)

    def forward(self, maps: torch.Tensor, level: str, category: torch.Tensor) -> torch.Tensor:
        """Excess ``(B, 1, H, W)``, at least 1, of a level's ``maps`` ``(B, 1, H, W)`` of ``category`` ``(B,)``."""
        column, size = self.levels.index(level), maps.shape[-2:]
        rings = _rings(size).to(maps).flatten(1)
        median, high = ((limit[category, column] @ rings).view(-1, 1, *size) for limit in (self.median, self.high))
        return 1 + ((torch.maximum(maps, median) / median).log() / (high / median).log()).square()


class CommonShift(nn.Module):
    """How much farther a whole image is from its references than normal images are, which is no defect.

    Another camera or lamp, or a surface of which the training images show another part, raise a map everywhere; a
    defect raises it in one place. The level of a map is its lower quartile. Maps whose level exceeds what one normal
    image in a thousand exceeds are divided by the excess; what then stands out does so within its own image.

    Args:
        num_categories: ``K``; row ``K`` is fitted to all categories and serves unknown images.
    """

    def __init__(self, num_categories: int) -> None:
        super().__init__()
        self.limits: torch.Tensor
        self.register_buffer("limits", torch.full((num_categories + 1,), float("inf")))  # nothing is shifted

    @torch.no_grad()
    def fit(self, row: int, maps: torch.Tensor) -> None:
        """Set the limit of category ``row`` from ``maps`` ``(N, 1, H, W)`` of normal images, 2 or more."""
        if len(maps) > 1:
            self.limits[row] = prediction_limit(_level(maps), SHIFT_RATE).clamp_min(SMALLEST)

    def forward(self, maps: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """``maps`` ``(B, 1, H, W)`` of ``category`` ``(B,)`` without the shift."""
        return maps / (_level(maps) / self.limits[category]).clamp_min(1).view(-1, 1, 1, 1)


def _level(maps: torch.Tensor) -> torch.Tensor:
    """Level ``(B,)`` of maps ``(B, 1, H, W)``."""
    return maps[:, 0, ::4, ::4].flatten(1).float().quantile(CLEAN_QUANTILE, dim=1)


def _rings(size: Sequence[int]) -> torch.Tensor:
    """Weight of each ring for each pixel, ``(RINGS, H, W)``, sum 1 over the rings; the last ring is the interior.

    Linear between the centres of the rings, so that maps have no steps.
    """
    rows, columns = (torch.minimum(torch.arange(side), torch.arange(side).flip(0)) for side in size)
    depth = (torch.minimum(rows[:, None], columns[None]) + 0.5) / RING_WIDTH - 0.5
    return (1 - (depth.clamp(0, RINGS - 1) - torch.arange(RINGS)[:, None, None]).abs()).clamp_min(0)
