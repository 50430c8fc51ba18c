"""Ranking metrics from counts of scores."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from decodiff_anomalib.evaluation.metrics import ranking_metrics, tally


def test_tally_counts_negatives_and_positives_in_ascending_order():
    negative, positive = tally(np.array([2.0, 1.0, 2.0, 3.0, 2.0]), np.array([True, False, False, True, True]))
    assert negative.tolist() == [1, 1, 0]
    assert positive.tolist() == [0, 2, 1]


def test_tied_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    scores = rng.integers(8, size=200) / 8
    positive = rng.random(200) < scores
    found = ranking_metrics(*tally(scores, positive))
    assert found["auroc"] == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert found["ap"] == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    assert found["f1max"] == pytest.approx(max(f1_score(positive, scores >= s) for s in np.unique(scores)), abs=1e-12)


def test_a_bin_of_distinct_scores_counts_as_in_random_order():
    rng = np.random.default_rng(0)
    positive = rng.random((500, 200)) < 0.3
    expected = np.mean([average_precision_score(row, np.arange(200)[::-1]) for row in positive])
    share = positive.mean()
    found = ranking_metrics(np.array([200 * (1 - share)]), np.array([200 * share]), np.array([False]))
    assert found["ap"] == pytest.approx(expected, abs=0.01)
