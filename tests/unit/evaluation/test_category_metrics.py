"""Metrics computed in bounded memory equal those of independent implementations that keep every pixel."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.metrics import AUPRO
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from decodiff_anomalib.evaluation import BIN_COLUMNS, MAX_BINS, METRICS, CategoryMetrics, anomalib_metrics

NOT_A_NUMBER = pytest.approx(float("nan"), nan_ok=True)

# From a normal variable, higher by 2 where a pixel is anomalous, to scores of the kinds that models give.
MAPS = {
    "spread over [0, 1]": lambda z: 1 / (1 + np.exp(-z)),
    "concentrated at both ends": lambda z: 1 / (1 + np.exp(-5 * z)),
    "clipped at both ends": lambda z: np.clip(z / 2, 0, 1),
    "tied at 12 values": lambda z: np.floor(np.clip(2 * z + 4, 0, 11)) / 11,
    "of both signs": lambda z: z,
    "tiny": lambda z: 1e-8 * np.abs(z),
    "over many octaves": lambda z: np.exp(6 * z),
    "offset from zero": lambda z: 10 + 0.01 * z,
}


def images(make, count=12, size=192, seed=0):
    """Maps and masks; every second image has up to three regions, which may touch at corners or overlap."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), bool)
    for mask in masks[::2]:
        for _ in range(rng.integers(1, 4)):
            (y, x), (height, width) = rng.integers(0, size * 3 // 4, 2), rng.integers(size // 32, size // 4, 2)
            mask[y : y + height, x : x + width] = True
            mask[y - 1, x - 1] = True
    maps = make(rng.normal(size=masks.shape) + 2 * masks).astype(np.float32)
    return torch.from_numpy(maps), torch.from_numpy(masks)


def batch_of(maps, masks, **given):
    labels = masks.flatten(1).any(1)
    fields = {
        "category": ["part"] * len(maps),
        "pred_score": maps.amax((1, 2)),
        "gt_label": labels,
        "pred_label": None,
        "anomaly_map": maps,
        "gt_mask": masks,
    }
    return SimpleNamespace(**fields | given)


def metrics_of(*batches, category="part"):
    metrics = CategoryMetrics(category)
    for batch in batches:
        metrics.update(batch)
    return metrics


def exact_metrics(scores, positive):
    precision, recall, _ = precision_recall_curve(positive, scores)
    return {
        "auroc": roc_auc_score(positive, scores),
        "ap": average_precision_score(positive, scores),
        "f1max": np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)),
    }


def exact_aupro(maps, masks):
    metric = AUPRO(fields=("anomaly_map", "gt_mask"))
    metric.update(SimpleNamespace(anomaly_map=maps, gt_mask=masks.int()))
    return float(metric.compute())


@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)
def test_metrics_of_any_maps_equal_scikit_learn_and_anomalib(make):
    maps, masks = images(make)
    metrics = metrics_of(*map(batch_of, maps.split(5), masks.split(5))).compute()

    pixel = exact_metrics(maps.flatten().numpy(), masks.flatten().numpy())
    image = exact_metrics(maps.amax((1, 2)).numpy(), masks.flatten(1).any(1).numpy())
    for name in ("auroc", "ap"):
        assert metrics[f"image_{name}"] == pytest.approx(image[name], abs=1e-12)
        assert metrics[f"pixel_{name}"] == pytest.approx(pixel[name], abs=2e-6)
    assert metrics["image_f1max"] == pytest.approx(image["f1max"], abs=1e-12)
    assert metrics["pixel_f1max"] == pytest.approx(pixel["f1max"], abs=1e-4)
    assert metrics["pixel_aupro"] == pytest.approx(exact_aupro(maps, masks), abs=2e-6)


def test_metrics_equal_anomalibs_classes():
    maps, masks = images(MAPS["spread over [0, 1]"], count=6)
    metrics = metrics_of(batch_of(maps, masks)).compute()
    expected = anomalib_metrics(maps, masks, masks.flatten(1).any(1))
    assert {name: metrics[name] for name in METRICS} == pytest.approx(expected, abs=1e-4)


def test_metrics_are_exact_while_distinct_scores_are_few():
    maps, masks = images(MAPS["of both signs"], count=4, size=128)
    assert maps.unique().numel() < MAX_BINS
    metrics = metrics_of(batch_of(maps, masks)).compute()
    expected = exact_metrics(maps.flatten().numpy(), masks.flatten().numpy())
    assert {name: metrics[f"pixel_{name}"] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_metrics_do_not_depend_on_order_or_batches():
    maps, masks = images(MAPS["concentrated at both ends"])
    whole = metrics_of(batch_of(maps, masks))
    order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(0))
    batches = metrics_of(*map(batch_of, maps[order].split(1), masks[order].split(1)))
    assert batches.compute() == pytest.approx(whole.compute(), abs=1e-13, nan_ok=True)


def test_two_merged_halves_equal_the_whole():
    maps, masks = images(MAPS["over many octaves"])
    whole = metrics_of(batch_of(maps, masks))
    first, second = (metrics_of(batch_of(maps[half::2], masks[half::2])) for half in (0, 1))
    first.merge_state(second)
    assert first.compute() == pytest.approx(whole.compute(), abs=1e-13, nan_ok=True)


PROGRAM = """
import json
import sys

import torch

from test_category_metrics import process_metrics

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
print(json.dumps(process_metrics(rank)))
"""


def process_metrics(rank):
    """Metrics of two categories; the first process has images of only one of them, the second of both."""
    maps, masks = images(MAPS["spread over [0, 1]"])
    part = slice(0, 6) if rank == 0 else slice(6, 12)
    batch = batch_of(maps[part], masks[part], category=(["part"] * 9 + ["other"] * 3)[part])
    return [metrics_of(batch).compute(), metrics_of(*[batch] * rank, category="other").compute()]


def test_processes_share_their_images(tmp_path):
    here, rendezvous = Path(__file__).parent, (tmp_path / "rendezvous").as_uri()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), rendezvous], cwd=here, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()

    maps, masks = images(MAPS["spread over [0, 1]"])
    batch = batch_of(maps, masks, category=["part"] * 9 + ["other"] * 3)
    for output in outputs:
        for found, category in zip(json.loads(output.splitlines()[-1]), ("part", "other"), strict=True):
            expected = metrics_of(batch, category=category).compute()
            assert found == pytest.approx(expected, abs=1e-13, nan_ok=True)


def test_memory_does_not_grow_with_the_images():
    metrics = CategoryMetrics("part")
    limit = 2 * MAX_BINS * 8 * len(BIN_COLUMNS)
    distinct = 0
    for seed in range(12):
        maps, masks = images(MAPS["of both signs"], count=1, size=256, seed=seed)
        distinct += maps.unique().numel()
        metrics.update(batch_of(maps, masks))
        assert sum(state.nbytes for state in metrics.bins) <= limit < 11e6
    assert distinct > 5 * MAX_BINS
    assert sum(state.nbytes for state in metrics.images) == 12 * 40


def test_regions_that_touch_at_corners_are_one():
    maps, _ = images(MAPS["spread over [0, 1]"], count=2, size=16)
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, 2:5, 2:5] = masks[0, 5:12, 5:6] = masks[1, 0, 0] = True
    found = metrics_of(batch_of(maps, masks)).compute()["pixel_aupro"]
    assert found == pytest.approx(exact_aupro(maps, masks), abs=1e-6)


def test_images_without_masks_count_for_image_metrics_only():
    maps, masks = images(MAPS["spread over [0, 1]"], count=8, size=16)
    without = batch_of(maps[4:], masks[4:], gt_mask=None)
    both = metrics_of(batch_of(maps[:4], masks[:4]), without).compute()
    known = metrics_of(batch_of(maps[:4], masks[:4])).compute()
    assert (both["normal"], both["defective"]) == (4, 4)
    for name in METRICS[:3]:
        expected = exact_metrics(maps.amax((1, 2)).numpy(), masks.flatten(1).any(1).numpy())[name.split("_")[1]]
        assert both[name] == pytest.approx(expected, abs=1e-12)
    for name in METRICS[3:]:
        assert both[name] == known[name]
    assert [metrics_of(without).compute()[name] for name in METRICS[3:]] == [NOT_A_NUMBER] * 4


def test_only_labelled_images_of_the_category_count():
    maps, masks = images(MAPS["spread over [0, 1]"], count=8, size=16)
    mixed = batch_of(maps, masks, category=["part", "part", "other", "other"] * 2)
    own = [0, 1, 4, 5]
    unlabelled = batch_of(maps, masks, gt_label=None)
    nameless = batch_of(maps, masks, category=None)
    found = metrics_of(unlabelled, mixed, nameless).compute()
    assert found == pytest.approx(metrics_of(batch_of(maps[own], masks[own])).compute(), nan_ok=True)
    assert found["normal"] == found["defective"] == 2


def test_scores_of_shape_batch_by_one_are_accepted():
    maps, masks = images(MAPS["spread over [0, 1]"], count=4, size=16)
    column = metrics_of(batch_of(maps, masks, pred_score=maps.amax((1, 2))[:, None])).compute()
    assert column == pytest.approx(metrics_of(batch_of(maps, masks)).compute(), nan_ok=True)


def test_rates_are_shares_of_images():
    maps, masks = images(MAPS["spread over [0, 1]"], count=8, size=16)
    labels = masks.flatten(1).any(1)
    alarms = labels.clone()
    alarms[[0, 1, 2, 3]] = torch.tensor([False, True, True, False])
    predicted = ["part", "other", "unknown", "part", "part", "part", "part", "unknown"]
    found = metrics_of(batch_of(maps, masks, pred_label=alarms, pred_category=predicted)).compute()
    assert found["false_alarm_rate"] == 1 / 4
    assert found["detection_rate"] == 3 / 4
    assert found["category_accuracy"] == 5 / 8
    assert found["unknown_rate"] == 2 / 8
    without = metrics_of(batch_of(maps, masks)).compute()
    rates = ("false_alarm_rate", "detection_rate", "category_accuracy", "unknown_rate")
    assert [without[name] for name in rates] == [NOT_A_NUMBER] * 4


def test_metrics_of_scores_with_nan_are_nan():
    maps, masks = images(MAPS["spread over [0, 1]"], count=4, size=16)
    maps[1, 3, 3] = float("nan")
    found = metrics_of(batch_of(maps, masks)).compute()
    assert [found[name] for name in METRICS] == [NOT_A_NUMBER] * 7
    assert found["normal"] == 2


def test_metrics_of_normal_images_alone_are_nan():
    maps, masks = images(MAPS["spread over [0, 1]"], count=4, size=16)
    found = metrics_of(batch_of(maps, torch.zeros_like(masks))).compute()
    assert [found[name] for name in METRICS] == [NOT_A_NUMBER] * 7


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
