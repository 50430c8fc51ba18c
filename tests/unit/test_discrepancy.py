"""Maps by closed forms; recorded maps are in ``tests/parity``."""

import pytest
import torch

from decodiff_anomalib.discrepancy import (
    fuse,
    gaussian_blur,
    latent_discrepancy,
    pixel_discrepancy,
    resize_mirrored,
)


def test_blur_keeps_constants_and_mass() -> None:
    assert gaussian_blur(torch.ones(1, 1, 20, 30), 3.0).sub(1).abs().max() < 1e-6
    maps = torch.rand(2, 1, 24, 40)
    assert gaussian_blur(maps, 0.0) is maps
    torch.testing.assert_close(gaussian_blur(maps, 2.0).sum((1, 2, 3)), maps.sum((1, 2, 3)), rtol=1e-5, atol=0)


def test_resize_keeps_linear_ramps_inside() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    resized = resize_mirrored(ramp, (32, 32))
    expected = (torch.arange(32.0) + 0.5) / 4 - 0.5
    torch.testing.assert_close(resized[0, 0, 0, 2:-2], expected[2:-2])
    assert resized[0, 0, 0, 0] == pytest.approx(0.375)  # mirrored about the first centre, not clamped to 0


def test_saturation() -> None:
    a, b = torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 10.0)
    assert pixel_discrepancy(a, b).max() == pytest.approx(1)
    assert pixel_discrepancy(a, b, clip=None).max() == pytest.approx(10, rel=1e-5)
    assert latent_discrepancy(a, b, (64, 64), clip=None).mean() == pytest.approx(10, rel=1e-5)


def test_fusion() -> None:
    maps = [torch.full((1, 1, 2, 2), value) for value in (1.0, 2.0, 4.0)]
    torch.testing.assert_close(fuse(*maps), torch.full((1, 1, 2, 2), 2.0))
    torch.testing.assert_close(fuse(*maps, mode="arithmetic"), torch.full((1, 1, 2, 2), 7 / 3))
    torch.testing.assert_close(fuse(*maps, weights=(1, 0.5, 2.5)), torch.full((1, 1, 2, 2), 2 ** (5.5 / 4)))
    torch.testing.assert_close(fuse(*maps, weights=(3, 1, 4), mode="arithmetic"), torch.full((1, 1, 2, 2), 21 / 8))
    with pytest.raises(ValueError, match="valid: 'geometric', 'arithmetic'"):
        fuse(*maps, mode="maximum")
