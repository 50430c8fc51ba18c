"""Limits and ranges from normal images, where the distribution is known."""

import math

import pytest
import torch

from decodiff_anomalib.calibration import NormalRange, prediction_limit


@pytest.mark.parametrize("count", [10, 24, 100])
def test_realised_rate(count: int) -> None:
    """Over many calibrations on few log-normal values, fresh ones exceed the limit as often as asked."""
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(300):
        limit = prediction_limit(torch.randn(count, generator=generator).mul(0.4).exp(), rate=0.05)
        rates.append((torch.randn(2000, generator=generator).mul(0.4).exp() > limit).float().mean())
    assert torch.stack(rates).mean() == pytest.approx(0.05, abs=0.01)


def test_the_closed_form_for_two_values() -> None:
    """Logs -1 and 1: mean 0, deviation sqrt(2), and a t of one degree of freedom, whose 75 % quantile is 1."""
    values = torch.tensor([-1.0, 1.0]).exp()
    assert float(prediction_limit(values, rate=0.25).log()) == pytest.approx((2 * 1.5) ** 0.5, abs=1e-6)


def test_excess_over_the_normal_range() -> None:
    """Of values whose logarithms are even, the median is 1 and the 99th percentile exp(0.98)."""
    normal = torch.linspace(-1, 1, 10_001).exp()
    normal_range = NormalRange(("pixel", "latent"), num_categories=2)
    normal_range.fit(1, "latent", normal.view(1, 1, 1, -1).repeat_interleave(4, -1).repeat(1, 1, 4, 1))
    values = torch.tensor([0.1, 1, math.exp(0.49), math.exp(0.98), math.exp(2.94)]).view(1, 1, 1, -1)
    excess = normal_range(values.expand(2, -1, -1, -1), "latent", torch.tensor([1, 0]))
    torch.testing.assert_close(excess[0, 0, 0], torch.tensor([1, 1, 1.25, 2, 10]), atol=2e-3, rtol=0)
    assert (excess[1, 0, 0].diff() > 0).all()  # a category without normal images: the ranking is kept
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
