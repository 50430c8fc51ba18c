"""Maps by closed forms; recorded maps are in ``tests/parity``."""

import math

import pytest
import torch

from decodiff_anomalib.discrepancy import (
    NormalRange,
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


def test_excess_over_what_is_normal() -> None:
    """Of values whose logarithms are even, the median is 1 and the 99th percentile exp(0.98)."""
    normal = torch.linspace(-1, 1, 10_001).exp()
    normal_range = NormalRange(("pixel", "latent"), num_categories=2)
    normal_range.fit(1, "latent", normal.view(1, 1, 1, -1).repeat_interleave(4, -1).repeat(1, 1, 4, 1))
    values = torch.tensor([0.1, 1, math.exp(0.49), math.exp(0.98), math.exp(2.94)]).view(1, 1, 1, -1)
    excess = normal_range(values.expand(2, -1, -1, -1), "latent", torch.tensor([1, 0]))
    torch.testing.assert_close(excess[0, 0, 0], torch.tensor([1, 1, 1.25, 2, 10]), atol=2e-3, rtol=0)
    assert (excess[1, 0, 0].diff() > 0).all()  # of a category that no normal images were seen of: ranks alone
    normal_range.fit(0, "pixel", torch.zeros(1, 1, 8, 8))  # nothing ever differs
    assert normal_range(values, "pixel", torch.tensor([0])).isfinite().all()


def test_the_border_has_a_range_of_its_own() -> None:
    """Normal values are three times as high in the outermost 8 pixels; their logarithms have a deviation of 0.1."""
    normal = (0.1 * torch.randn(32, 1, 96, 80, generator=torch.Generator().manual_seed(0))).exp()
    normal[:, :, 8:-8, 8:-8] /= 3
    normal_range = NormalRange(("latent",), num_categories=1)
    normal_range.fit(0, "latent", normal)
    excess = normal_range(torch.ones(1, 1, 96, 80), "latent", torch.tensor([0]))[0, 0]
    torch.testing.assert_close(excess[:, :4], torch.ones(96, 4), atol=5e-3, rtol=0)
    assert excess[32:64, 32:48].numpy() == pytest.approx(1 + (math.log(3) / 0.2326) ** 2, rel=0.1)
    assert excess[48].diff().abs().max() < excess.max() / 3, "no step between the rings"
