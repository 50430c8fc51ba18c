"""Limits and ranges from normal images, where the distribution is known."""

import math

import pytest
import torch

from decodiff_anomalib.calibration import (
    CommonShift,
    NormalRange,
    limit_of_mean,
    normals_needed,
    prediction_limit,
    promised_rate,
)


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


# ---------------------------------------------------------------- what normal images promise


@pytest.mark.parametrize(("rate", "count"), [(0.1, 29), (0.05, 59), (0.02, 149), (0.01, 299)])
def test_the_number_of_normal_images_that_a_promise_takes(rate: float, count: int) -> None:
    """Wilks: (1 - rate)^count is the probability that none of them exceeds what a share ``rate`` exceeds."""
    assert normals_needed(rate) == count
    assert promised_rate(count) <= rate < promised_rate(count - 1)


def test_a_promise_is_kept_in_95_of_100_cases() -> None:
    """The threshold is fixed; the true rate is 6 %, and each of 2,000 inspections has 60 normal images."""
    exceeding = torch.binomial(
        torch.full((2000,), 60.0), torch.tensor(0.06), generator=torch.Generator().manual_seed(0)
    )
    kept = sum(promised_rate(60, int(count)) >= 0.06 for count in exceeding)
    assert 0.95 <= kept / 2000 < 1
    assert promised_rate(5, 5) == 1


def test_the_limit_of_a_mean_covers_it() -> None:
    draws = torch.rand(2000, 20, generator=torch.Generator().manual_seed(0))
    covered = sum(limit_of_mean(values) >= 0.5 for values in draws)
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


# ---------------------------------------------------------------- images that differ as a whole


def test_a_shift_of_the_whole_image_is_taken_away_and_a_defect_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    brightness = torch.randn(40, 1, 1, 1, generator=generator).mul(0.1).exp()
    normal = brightness * (5 + torch.rand(40, 1, 64, 64, generator=generator))
    shift = CommonShift(num_categories=1)
    alone, defective = torch.tensor([0]), normal[:1].clone()
    defective[..., :32] *= 1.5  # half of the image
    torch.testing.assert_close(shift(3 * normal[:1], alone), 3 * normal[:1])  # not fitted yet
    shift.fit(0, normal)
    assert torch.equal(shift(normal, torch.zeros(40, dtype=torch.long)), normal)
    assert torch.equal(shift(defective, alone), defective)
    assert torch.equal(shift(3 * normal[:1], alone + 1), 3 * normal[:1])  # of another row
    level = normal[:, 0, ::4, ::4].flatten(1).quantile(0.25, dim=1)
    found = shift(3 * normal[:1], alone)
    torch.testing.assert_close(found, (normal[:1] / level[0] * prediction_limit(level, 0.001)).float())
    torch.testing.assert_close(shift(found, alone), found)
