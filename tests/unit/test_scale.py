"""Colours of maps and multiples of the threshold."""

import numpy as np
import pytest

from decodiff_anomalib.scale import HIGHEST, LOWEST, TICKS, colour_bar, multiple_of_threshold, paint


def test_a_normalised_score_is_a_multiple_of_its_threshold() -> None:
    for raw, threshold in ((3.0, 2.0), (0.0, 2.0), (7.0, 0.5)):
        assert multiple_of_threshold(raw / (raw + threshold)) == pytest.approx(raw / threshold)
    assert multiple_of_threshold(0.8, threshold=0.8) == pytest.approx(1)
    assert np.isnan([multiple_of_threshold(value) for value in (-1, 3, float("nan"))]).all()
    assert multiple_of_threshold(1) == float("inf")


def test_ticks_are_the_multiples_that_they_are_called() -> None:
    named = {"¼×": 0.25, "½×": 0.5, "threshold": 1, "2×": 2, "4×": 4}
    for value, text in TICKS.items():
        assert multiple_of_threshold(value) == pytest.approx(named[text])


def test_the_scale_is_white_at_the_threshold_blue_below_and_red_above() -> None:
    below, at, above = (np.asarray(paint(np.full((1, 1), value)))[0, 0].astype(int) for value in (0.3, 0.5, 0.7))
    assert below[2] > below[0] + 50
    assert at.min() > 240
    assert above[0] > above[2] + 50


def test_lightness_alone_tells_the_distance_from_the_threshold() -> None:
    lightness = np.asarray(colour_bar((101, 1)).convert("L"))[0].astype(int)
    assert (np.diff(lightness[:51]) >= 0).all()
    assert (np.diff(lightness[50:]) <= 0).all()


def test_values_beyond_the_scale_have_its_last_colours_and_unknown_ones_are_grey() -> None:
    painted = np.asarray(paint(np.array([[-1.0, 0.0, LOWEST, HIGHEST, 1.0, np.nan]])))[0]
    assert (painted[:3] == painted[0]).all()
    assert (painted[3:5] == painted[4]).all()
    assert painted[5].tolist() == [128, 128, 128]


def test_raw_maps_of_any_range_can_be_painted() -> None:
    for highest in (0.0, 1e-12, 5.0, 1e9):
        painted = np.asarray(paint(np.array([[0.0, highest / 2, highest]]), highest))
        assert painted.shape == (1, 3, 3)
