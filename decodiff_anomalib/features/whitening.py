"""Whitening of features by their principal components."""

import torch

FLOOR = 0.3
SMALLEST = 1e-3  # standard deviation of a component, for features of unit length: constant images have none


def whitening_matrix(points: torch.Tensor, channels: int | None = None) -> torch.Tensor:
    """Matrix ``(channels, F)`` that whitens ``points`` ``(N, F)`` by their leading principal components.

    The standard deviation of a component is taken to be at least :data:`FLOOR` times the root mean square over the kept
    components, so that the noise of weak components is not amplified.

    Args:
        points: ``(N, F)``; need not be centred.
        channels: Components kept; all by default.
    """
    variances, components = torch.linalg.eigh(torch.cov(points.T.double()))
    variances, components = variances.flip(0)[:channels].clamp_min(0), components.flip(1)[:, :channels]
    scale = variances.sqrt().maximum((FLOOR * variances.mean().sqrt()).clamp_min(SMALLEST))
    return (components / scale).T
