"""The learning rate by closed forms."""

import math

import pytest

from decodiff_anomalib.learning_rate import FINAL_FACTOR, cosine_learning_rate_factor


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    rates = [cosine_learning_rate_factor(step, math.inf, 4) for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_the_cosine_falls_from_the_peak_to_its_end() -> None:
    first, middle, last = (cosine_learning_rate_factor(step, 100, 0) for step in (0, 50, 100))
    assert first == 1
    assert middle == pytest.approx((1 + FINAL_FACTOR) / 2)
    assert last == pytest.approx(FINAL_FACTOR)
    assert cosine_learning_rate_factor(1000, 100, 0) == pytest.approx(FINAL_FACTOR)
