"""Features of two categories, and what is fitted to them."""

import pytest
import torch

from decodiff_anomalib.features import VisualFeatures

ROWS = {0: slice(6), 1: slice(6, 12), 2: slice(12)}


@pytest.fixture(scope="session")
def backbone() -> VisualFeatures:
    return VisualFeatures()


@pytest.fixture(scope="session")
def features(backbone: VisualFeatures) -> torch.Tensor:
    """Features ``(12, F, 8, 8)`` of two categories, the second a brighter version of the first."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(12, 3, 16, 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic")
    images = (smooth + 0.2 * torch.randn(12, 3, 64, 64, generator=generator)).clamp(-1, 1)
    images[6:] = images[6:] / 3 + 0.6
    return backbone(images)["image"]


@pytest.fixture(scope="session")
def rows() -> dict[int, slice]:
    """Images of each row of a table: each category, and all."""
    return ROWS
