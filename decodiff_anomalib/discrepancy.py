"""How an image and its correction differ: pixel and latent maps, and their fusion with others.

    P = G_3( clip(max over RGB |y - y_0|, 0, c_P) / c_P )
    L = R( G_1( clip(mean over channels |z - z_0|, 0, c_L) / c_L ) )

``G`` is a Gaussian blur with half-sample symmetric borders and ``R`` a linear up-scaling whose samples beyond the outer
pixel centres are mirrored about them. With calibrated fusion the constants ``c`` are replaced by what is normal, see
:class:`NormalRange`.
"""

from collections.abc import Collection, Sequence

import torch
from anomalib.models.components.filters import GaussianBlur2d
from anomalib.models.components.filters.blur import compute_kernel_size
from torch import nn

HIGH_NORMAL = 0.99
RINGS = 4  # three along the border, and all the rest
RING_WIDTH = 8  # pixels, a cell of the latent grid
LEAST = 1e-6  # of a map's values, so that logarithms are finite
PIXEL_CLIP, PIXEL_SIGMA = 0.4, 3.0
LATENT_CLIP, LATENT_SIGMA = 0.2, 1.0


def gaussian_blur(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur ``maps`` ``(B, 1, H, W)``, borders continued as ``d c b a | a b c d`` (which torch's padding lacks).

    A ``sigma`` of 0 leaves them as they are.
    """
    if not sigma:
        return maps
    taps = compute_kernel_size(sigma)
    for dim, kernel_size in ((-2, (taps, 1)), (-1, (1, taps))):
        radius, size = taps // 2, maps.shape[dim]
        before = maps.narrow(dim, 0, radius).flip(dim)
        after = maps.narrow(dim, size - radius, radius).flip(dim)
        blur = GaussianBlur2d(sigma, kernel_size=kernel_size, padding="valid").to(maps)
        maps = blur(torch.cat([before, maps, after], dim))
    return maps


def resize_mirrored(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scale ``maps`` ``(B, 1, h, w)`` up to ``size`` linearly, mirroring about the outer pixel centres."""
    for dim, length in ((-2, size[0]), (-1, size[1])):
        maps = torch.movedim(maps.movedim(dim, -1) @ _mirrored_weights(maps.shape[dim], length).to(maps), -1, dim)
    return maps


def _mirrored_weights(source: int, target: int) -> torch.Tensor:
    """Linear interpolation as a matrix ``(source, target)``."""
    position = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5
    position = position.abs()
    position = torch.where(position > source - 1, 2 * (source - 1) - position, position)
    return (1 - (position - torch.arange(source, dtype=torch.float64)[:, None]).abs()).clamp_min(0)


def saturate(raw: torch.Tensor, clip: float | None) -> torch.Tensor:
    """Clip ``raw`` at ``clip`` and scale it to [0, 1]; ``None`` leaves it as it is."""
    return raw if clip is None else raw.clamp(0.0, clip) / clip


def pixel_discrepancy(
    a: torch.Tensor, b: torch.Tensor, clip: float | None = PIXEL_CLIP, sigma: float = PIXEL_SIGMA
) -> torch.Tensor:
    """Pixel map ``(B, 1, H, W)`` of two images ``(B, 3, H, W)`` as decoded (about [-1, 1], not clamped)."""
    return gaussian_blur(saturate((a - b).abs().amax(1, keepdim=True), clip), sigma)


def latent_discrepancy(
    a: torch.Tensor,
    b: torch.Tensor,
    size: tuple[int, int],
    clip: float | None = LATENT_CLIP,
    sigma: float = LATENT_SIGMA,
) -> torch.Tensor:
    """Latent map ``(B, 1, *size)`` of two latents ``(B, C, h, w)``."""
    raw = (a - b).abs().mean(1, keepdim=True)
    return resize_mirrored(gaussian_blur(saturate(raw, clip), sigma), size)


class NormalRange(nn.Module):
    """What values of each level are normal, by category and distance from the border, and by how much others exceed it.

    ``1 + (max(0, log(x / median)) / log(high / median))^2`` of a value ``x``, with the median and a high quantile of
    normal images: 1 for what is ordinary and 2 at the edge of what is normal, whatever the level's units and spread.
    Squares, so that in a mean a level that stands out is not drowned by another that has nothing to say; from 1, so
    that logarithms of normal values, on which thresholds rest, are close together.

    Where an image ends, what it shows is cut off at any place and networks see half of it: normal images are stranger
    there than elsewhere, and each ring of cells along the border therefore has limits of its own.

    Args:
        levels: Their names.
        num_categories: ``K``; a further row is of all categories together, for images of none.
    """

    def __init__(self, levels: Sequence[str], num_categories: int) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.median: torch.Tensor
        self.high: torch.Tensor
        # until fitted, ranks are kept
        self.register_buffer("median", torch.full((num_categories + 1, len(self.levels), RINGS), LEAST))
        self.register_buffer("high", torch.ones(num_categories + 1, len(self.levels), RINGS))

    @torch.no_grad()
    def fit(self, row: int, level: str, maps: torch.Tensor) -> None:
        """Take the range of a level from ``maps`` ``(N, 1, H, W)`` of normal images."""
        column, ring = self.levels.index(level), _rings(maps.shape[-2:]).argmax(0).to(maps.device)[::4, ::4]
        for index in range(RINGS):
            # small images have no place that far from the border
            values = maps[:, 0, ::4, ::4][:, ring == min(index, int(ring.max()))].flatten().float()
            median = values.median().clamp_min(LEAST)
            high = values.kthvalue(max(1, round(HIGH_NORMAL * len(values)))).values
            self.median[row, column, index] = median
            self.high[row, column, index] = torch.maximum(high, 1.01 * median)

    def forward(self, maps: torch.Tensor, level: str, category: torch.Tensor) -> torch.Tensor:
        """Excess ``(B, 1, H, W)``, at least 1, of a level's ``maps`` ``(B, 1, H, W)`` of ``category`` ``(B,)``."""
        column, size = self.levels.index(level), maps.shape[-2:]
        rings = _rings(size).to(maps).flatten(1)
        median, high = ((limit[category, column] @ rings).view(-1, 1, *size) for limit in (self.median, self.high))
        return 1 + ((torch.maximum(maps, median) / median).log() / (high / median).log()).square()

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
        for name in (f"{prefix}median", f"{prefix}high"):
            if name in state_dict and state_dict[name].ndim == 2:  # of when there were no rings
                state_dict[name] = state_dict[name][:, :, None].repeat(1, 1, RINGS)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _rings(size: Sequence[int]) -> torch.Tensor:
    """How much pixels belong to each ring along the border, the last being all the rest: ``(RINGS, H, W)``, sum 1.

    Linear between the middles of the rings, so that no step shows.
    """
    rows, columns = (torch.minimum(torch.arange(side), torch.arange(side).flip(0)) for side in size)
    depth = (torch.minimum(rows[:, None], columns[None]) + 0.5) / RING_WIDTH - 0.5
    return (1 - (depth.clamp(0, RINGS - 1) - torch.arange(RINGS)[:, None, None]).abs()).clamp_min(0)


def fuse(*maps: torch.Tensor, weights: Collection[float] | None = None, mode: str = "geometric") -> torch.Tensor:
    """Fuse maps ``(B, 1, H, W)`` by their mean.

    Args:
        maps: At least 0.
        weights: How much each counts; alike by default.
        mode: ``geometric``, free of the maps' scales, or ``arithmetic``.

    Raises:
        ValueError: If the mode is unknown.
    """
    weights = [1.0] * len(maps) if weights is None else list(weights)
    shares = [weight / sum(weights) for weight in weights]
    if mode == "geometric":
        return torch.stack([values**share for values, share in zip(maps, shares, strict=True)]).prod(0)
    if mode == "arithmetic":
        return torch.stack([values * share for values, share in zip(maps, shares, strict=True)]).sum(0)
    msg = f"fusion={mode!r} is unknown; valid: 'geometric', 'arithmetic'."
    raise ValueError(msg)
