"""The limit that normal images exceed at a stated rate."""

import pytest
import torch

from decodiff_anomalib.calibration import prediction_limit


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
