"""Discrepancy maps between an image and its correction, and their fusion.

With ``y_0`` and ``y`` the decoded input and corrected latents, ``z_0`` and ``z`` the latents themselves:

    P = G_3( clip(max over RGB |y - y_0|, 0, c_P) / c_P )                    pixel map
    L = R( G_1( clip(mean over channels |z - z_0|, 0, c_L) / c_L ) )         latent map
    A = sqrt(P L)  or  (P + L) / 2                                           geometric or arithmetic fusion

``G`` is a Gaussian blur with half-sample symmetric borders and ``R`` a linear up-scaling whose samples beyond the outer
pixel centres are mirrored about them, as in the authors' program; ``c_P = 0.4`` and ``c_L = 0.2`` are the paper's
constants. :class:`decodiff_anomalib.calibration.NormalRange` can take their place.

Reference: "Correcting Deviations from Normality" (arXiv 2503.19357), the paragraphs on anomaly maps of the method.
"""

from collections.abc import Collection

import torch
from anomalib.models.components.filters import GaussianBlur2d
from anomalib.models.components.filters.blur import compute_kernel_size

from decodiff_anomalib.paper import LATENT_CLIP, LATENT_SIGMA, PIXEL_CLIP, PIXEL_SIGMA


def gaussian_blur(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur ``G`` of ``maps`` ``(B, 1, H, W)``, padded as ``d c b a | a b c d`` (which torch's padding lacks).

    A ``sigma`` of 0 returns them unchanged.
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
    """Linear up-scaling ``R`` of ``maps`` ``(B, 1, h, w)`` to ``size``, mirrored about the outer pixel centres."""
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
    """Clip ``raw`` to ``[0, clip]`` and scale it to [0, 1]; ``None`` returns it unchanged."""
    return raw if clip is None else raw.clamp(0.0, clip) / clip


def pixel_discrepancy(
    a: torch.Tensor, b: torch.Tensor, clip: float | None = PIXEL_CLIP, sigma: float = PIXEL_SIGMA
) -> torch.Tensor:
    """Pixel map ``P`` ``(B, 1, H, W)`` of two images ``(B, 3, H, W)`` as decoded (about [-1, 1], not clamped)."""
    return gaussian_blur(saturate((a - b).abs().amax(1, keepdim=True), clip), sigma)


def latent_discrepancy(
    a: torch.Tensor,
    b: torch.Tensor,
    size: tuple[int, int],
    clip: float | None = LATENT_CLIP,
    sigma: float = LATENT_SIGMA,
) -> torch.Tensor:
    """Latent map ``L`` ``(B, 1, *size)`` of two latents ``(B, C, h, w)``."""
    raw = (a - b).abs().mean(1, keepdim=True)
    return resize_mirrored(gaussian_blur(saturate(raw, clip), sigma), size)


def fuse(*maps: torch.Tensor, weights: Collection[float] | None = None, mode: str = "geometric") -> torch.Tensor:
    """Fused map ``A`` ``(B, 1, H, W)``: the weighted mean of maps of the same shape.

    Args:
        maps: At least 0.
        weights: One for each map, above 0; equal by default.
        mode: ``geometric``, whose ranking does not depend on the scales of the maps, or ``arithmetic``.

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
