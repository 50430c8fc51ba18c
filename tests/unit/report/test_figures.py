"""Figures of a report against scikit-learn, NumPy and counting by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from decodiff_anomalib.report.figures import POINTS, Counts, Scores
from decodiff_anomalib.report.records import Image


def scores_of(scores: list[float], labels: list[bool | None]) -> Scores:
    pairs = enumerate(zip(scores, labels, strict=True))
    return Scores.of([Image(number, "", "bolt", label, score) for number, (score, label) in pairs])


@pytest.fixture
def many() -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and labels."""
    generator = np.random.default_rng(1)
    labels = generator.random(1000) < 0.3
    return np.round(generator.normal(labels, 1), 2), labels


def test_ranking_metrics_are_those_of_scikit_learn(many: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = many
    found = scores_of(scores.tolist(), labels.tolist()).metrics()
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found["ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)


def test_points_of_the_curve_are_those_of_scikit_learn(many: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = many
    recall, precision = scores_of(scores.tolist(), labels.tolist()).precision_recall()
    expected_precision, expected_recall, _ = precision_recall_curve(labels, scores)
    points = set(zip(expected_recall.round(12), expected_precision.round(12), strict=True))
    assert set(zip(recall.round(12), precision.round(12), strict=True)) <= points
    assert len(recall) <= POINTS
    assert recall[-1] == 1
    assert (np.diff(recall) > 0).all()


def test_a_short_curve_has_every_point() -> None:
    recall, precision = scores_of([0.1, 0.4, 0.6, 0.9], [False, True, False, True]).precision_recall()
    assert recall.tolist() == [0.5, 0.5, 1, 1]
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])


def test_images_are_counted_at_a_threshold_as_the_model_labels_them() -> None:
    scores = scores_of([0.5, 0.51, 0.2, 0.8, math.nan, 0.9, 0.1], [False, False, True, True, False, None, None])
    assert scores.counts(0.5) == Counts(
        normal=3, defective=2, unlabelled=2, false_alarms=2, misses=1, flagged=4, unscored=1
    )


@pytest.mark.parametrize("labels", [[None, None], [False, False], [True, True]])
def test_what_labels_do_not_define_is_not_a_number(labels: list[bool | None]) -> None:
    scores = scores_of([0.1, 0.9], labels)
    assert np.isnan(list(scores.metrics().values())).all()
    assert [len(values) for values in scores.precision_recall()] == [0, 0]


def test_a_score_that_is_not_a_number_leaves_the_ranking_undefined() -> None:
    scores = scores_of([0.1, 0.9, math.nan], [False, True, True])
    assert np.isnan(list(scores.metrics().values())).all()
    assert [len(values) for values in scores.precision_recall()] == [0, 0]


def test_histograms_count_every_scored_image_once(many: tuple[np.ndarray, np.ndarray]) -> None:
    values, labels = many
    edges = np.linspace(-1, 1, 11)
    found = scores_of([*values.tolist(), math.nan], [*labels.tolist(), None]).histogram(edges)
    for name, chosen in {"normal": ~labels, "defective": labels}.items():
        assert found[name] == np.histogram(values[chosen].clip(-1, 1), edges)[0].tolist()
        assert sum(found[name]) == chosen.sum()
    assert sum(found["unlabelled"]) == 0


def test_normalised_scores_have_the_scale_0_to_1_and_raw_ones_their_own() -> None:
    assert scores_of([0.3, 0.4], [None] * 2).limits(normalised=True) == (0, 1)
    assert scores_of([-2, 0.4], [None] * 2).limits(normalised=True) == (-2, 1)
    assert scores_of([3, 7, math.nan], [None] * 3).limits(normalised=False) == (3, 7)
    assert scores_of([3], [None]).limits(normalised=False) == (3, 4)
    assert scores_of([math.nan], [None]).limits(normalised=False) == (0, 1)


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([1, 5, 3, 9], [False, False, True, True], 5),
        ([1, 5, 3, 9], [None] * 4, 9),
        ([1, 5], [True, True], 5),
        ([math.nan], [None], 0),
    ],
)
def test_without_a_threshold_none_that_may_be_normal_is_flagged(
    scores: list[float], labels: list[bool | None], expected: float
) -> None:
    found = scores_of(scores, labels)
    assert found.starting_threshold() == expected
    assert found.counts(expected).false_alarms == 0
