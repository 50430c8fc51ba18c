"""The precision-recall curves of a category."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from sklearn.metrics import precision_recall_curve

from decodiff_anomalib.evaluation import CategoryMetrics


def test_curve_lies_on_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.random((6, 40, 40)) < 0.1)
    maps = (torch.from_numpy(rng.random((6, 40, 40))) + 0.5 * masks).float().div(2).mul(500).round().div(500)  # ties
    metrics = CategoryMetrics("bolt")
    for half in (slice(0, 2), slice(2, 6)):
        scores = maps[half].amax((1, 2))
        metrics.update(
            SimpleNamespace(
                category=["bolt"] * len(scores),
                pred_score=scores,
                gt_label=torch.ones(len(scores)),
                pred_label=None,
                anomaly_map=maps[half],
                gt_mask=masks[half],
            )
        )
    recall, precision = metrics.precision_recall()
    expected_precision, expected_recall, _ = precision_recall_curve(masks.flatten(), maps.flatten())
    distance = np.hypot(recall[:, None] - expected_recall, precision[:, None] - expected_precision).min(1)
    assert distance.max() < 1e-9
    assert 150 < len(recall) <= 200
    assert (np.diff(recall) > 0).all()
    assert recall[-1] == 1
    assert np.diff(recall).max() < 0.02
    assert metrics.compute()["pixel_ap"] == pytest.approx(trapezoid(precision, recall), abs=0.01)
    assert [len(values) for values in CategoryMetrics("felt").precision_recall()] == [0, 0]
