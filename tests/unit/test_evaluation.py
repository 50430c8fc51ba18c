"""Figures counted in bounded memory equal those of independent implementations that keep every pixel."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.metrics import AUPRO
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from decodiff_anomalib.evaluation import (
    FIGURES,
    MAX_RUNS,
    RUN_COLUMNS,
    CategoryFigures,
    anomalib_figures,
    category_table,
)

NOT_A_NUMBER = pytest.approx(float("nan"), nan_ok=True)

# From a normal variable, higher by 2 where a pixel is anomalous, to scores as models give them.
MAPS = {
    "spread over [0, 1]": lambda z: 1 / (1 + np.exp(-z)),
    "crowded at both ends": lambda z: 1 / (1 + np.exp(-5 * z)),
    "clipped at both ends": lambda z: np.clip(z / 2, 0, 1),
    "tied in 12 levels": lambda z: np.floor(np.clip(2 * z + 4, 0, 11)) / 11,
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


def figures_of(*batches, category="part"):
    figures = CategoryFigures(category)
    for batch in batches:
        figures.update(batch)
    return figures


def exact_figures(scores, positive):
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
def test_figures_of_any_maps_equal_scikit_learn_and_anomalib(make):
    maps, masks = images(make)
    figures = figures_of(*map(batch_of, maps.split(5), masks.split(5))).compute()

    pixel = exact_figures(maps.flatten().numpy(), masks.flatten().numpy())
    image = exact_figures(maps.amax((1, 2)).numpy(), masks.flatten(1).any(1).numpy())
    for name in ("auroc", "ap"):
        assert figures[f"image_{name}"] == pytest.approx(image[name], abs=1e-12)
        assert figures[f"pixel_{name}"] == pytest.approx(pixel[name], abs=2e-6)
    assert figures["image_f1max"] == pytest.approx(image["f1max"], abs=1e-12)
    assert figures["pixel_f1max"] == pytest.approx(pixel["f1max"], abs=1e-4)
    assert figures["pixel_aupro"] == pytest.approx(exact_aupro(maps, masks), abs=2e-6)


def test_figures_equal_anomalibs_metrics():
    maps, masks = images(MAPS["spread over [0, 1]"], count=6)
    figures = figures_of(batch_of(maps, masks)).compute()
    expected = anomalib_figures(maps, masks, masks.flatten(1).any(1))
    assert {name: figures[name] for name in FIGURES} == pytest.approx(expected, abs=1e-4)


def test_figures_are_exact_while_distinct_scores_are_few():
    maps, masks = images(MAPS["of both signs"], count=4, size=128)
    assert maps.unique().numel() < MAX_RUNS
    figures = figures_of(batch_of(maps, masks)).compute()
    expected = exact_figures(maps.flatten().numpy(), masks.flatten().numpy())
    assert {name: figures[f"pixel_{name}"] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_figures_do_not_depend_on_order_or_batches():
    maps, masks = images(MAPS["crowded at both ends"])
    whole = figures_of(batch_of(maps, masks))
    order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(0))
    batches = figures_of(*map(batch_of, maps[order].split(1), masks[order].split(1)))
    assert batches.compute() == pytest.approx(whole.compute(), abs=1e-13, nan_ok=True)


def test_two_merged_halves_equal_the_whole():
    maps, masks = images(MAPS["over many octaves"])
    whole = figures_of(batch_of(maps, masks))
    first, second = (figures_of(batch_of(maps[half::2], masks[half::2])) for half in (0, 1))
    first.merge_state(second)
    assert first.compute() == pytest.approx(whole.compute(), abs=1e-13, nan_ok=True)


PROGRAM = """
import json
import sys

import torch

from test_evaluation import process_figures

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
print(json.dumps(process_figures(rank)))
"""


def process_figures(rank):
    """Figures of two categories; the first process sees only one of them, the second both."""
    maps, masks = images(MAPS["spread over [0, 1]"])
    mine = slice(0, 6) if rank == 0 else slice(6, 12)
    batch = batch_of(maps[mine], masks[mine], category=(["part"] * 9 + ["other"] * 3)[mine])
    return [figures_of(batch).compute(), figures_of(*[batch] * rank, category="other").compute()]


def test_processes_share_their_images(tmp_path):
    here, rendezvous = Path(__file__).parent, (tmp_path / "rendezvous").as_uri()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), rendezvous], cwd=here, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()

    maps, masks = images(MAPS["spread over [0, 1]"])
    batch = batch_of(maps, masks, category=["part"] * 9 + ["other"] * 3)
    for output in outputs:
        for found, category in zip(json.loads(output.splitlines()[-1]), ("part", "other"), strict=True):
            expected = figures_of(batch, category=category).compute()
            assert found == pytest.approx(expected, abs=1e-13, nan_ok=True)


def test_memory_does_not_grow_with_the_images():
    figures = CategoryFigures("part")
    limit = 2 * MAX_RUNS * 8 * len(RUN_COLUMNS)
    distinct = 0
    for seed in range(12):
        maps, masks = images(MAPS["of both signs"], count=1, size=256, seed=seed)
        distinct += maps.unique().numel()
        figures.update(batch_of(maps, masks))
        assert sum(state.nbytes for state in figures.runs) <= limit < 11e6
    assert distinct > 5 * MAX_RUNS
    assert sum(state.nbytes for state in figures.images) == 12 * 40


def test_regions_that_touch_at_corners_are_one():
    maps, _ = images(MAPS["spread over [0, 1]"], count=2, size=16)
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, 2:5, 2:5] = masks[0, 5:12, 5:6] = masks[1, 0, 0] = True
    found = figures_of(batch_of(maps, masks)).compute()["pixel_aupro"]
    assert found == pytest.approx(exact_aupro(maps, masks), abs=1e-6)


def test_images_without_masks_count_as_images_only():
    maps, masks = images(MAPS["spread over [0, 1]"], count=8, size=16)
    without = batch_of(maps[4:], masks[4:], gt_mask=None)
    both = figures_of(batch_of(maps[:4], masks[:4]), without).compute()
    known = figures_of(batch_of(maps[:4], masks[:4])).compute()
    assert (both["normal"], both["defective"]) == (4, 4)
    for name in FIGURES[:3]:
        expected = exact_figures(maps.amax((1, 2)).numpy(), masks.flatten(1).any(1).numpy())[name.split("_")[1]]
        assert both[name] == pytest.approx(expected, abs=1e-12)
    for name in FIGURES[3:]:
        assert both[name] == known[name]
    assert [figures_of(without).compute()[name] for name in FIGURES[3:]] == [NOT_A_NUMBER] * 4


def test_only_labelled_images_of_the_category_count():
    maps, masks = images(MAPS["spread over [0, 1]"], count=8, size=16)
    mixed = batch_of(maps, masks, category=["part", "part", "other", "other"] * 2)
    own = [0, 1, 4, 5]
    unlabelled = batch_of(maps, masks, gt_label=None)
    nameless = batch_of(maps, masks, category=None)
    found = figures_of(unlabelled, mixed, nameless).compute()
    assert found == pytest.approx(figures_of(batch_of(maps[own], masks[own])).compute(), nan_ok=True)
    assert found["normal"] == found["defective"] == 2


def test_scores_of_shape_batch_by_one_count_as_well():
    maps, masks = images(MAPS["spread over [0, 1]"], count=4, size=16)
    column = figures_of(batch_of(maps, masks, pred_score=maps.amax((1, 2))[:, None])).compute()
    assert column == pytest.approx(figures_of(batch_of(maps, masks)).compute(), nan_ok=True)


def test_alarms_and_routing_are_shares_of_images():
    maps, masks = images(MAPS["spread over [0, 1]"], count=8, size=16)
    labels = masks.flatten(1).any(1)
    alarms = labels.clone()
    alarms[[0, 1, 2, 3]] = torch.tensor([False, True, True, False])
    named = ["part", "other", "unknown", "part", "part", "part", "part", "unknown"]
    found = figures_of(batch_of(maps, masks, pred_label=alarms, pred_category=named)).compute()
    assert found["false_alarm_rate"] == 1 / 4
    assert found["detection_rate"] == 3 / 4
    assert found["routed"] == 5 / 8
    assert found["unknown"] == 2 / 8
    silent = figures_of(batch_of(maps, masks)).compute()
    assert [silent[name] for name in ("false_alarm_rate", "detection_rate", "routed", "unknown")] == [NOT_A_NUMBER] * 4


def test_scores_that_are_not_numbers_give_no_figures():
    maps, masks = images(MAPS["spread over [0, 1]"], count=4, size=16)
    maps[1, 3, 3] = float("nan")
    found = figures_of(batch_of(maps, masks)).compute()
    assert [found[name] for name in FIGURES] == [NOT_A_NUMBER] * 7
    assert found["normal"] == 2


def test_images_of_one_kind_give_no_figures():
    maps, masks = images(MAPS["spread over [0, 1]"], count=4, size=16)
    found = figures_of(batch_of(maps, torch.zeros_like(masks))).compute()
    assert [found[name] for name in FIGURES] == [NOT_A_NUMBER] * 7


def test_table_ends_with_the_mean_and_the_worst_of_what_is_known():
    maps, masks = images(MAPS["spread over [0, 1]"], count=8, size=16)
    alarms = torch.tensor([True, False] * 4)
    names = ["part", "unknown"] + ["part"] * 6
    figures = {
        "bolt": figures_of(batch_of(maps, masks, pred_label=alarms, pred_category=names)).compute(),
        "felt": figures_of(batch_of(maps[:6], masks[:6], gt_mask=None, pred_label=~alarms[:6])).compute(),
        "absent": figures_of(batch_of(maps, masks), category="absent").compute(),
    }
    table = category_table(figures)
    assert list(table.index) == ["bolt", "felt", "mean", "worst"]
    assert list(table.normal[:2]) == [4, 3]
    assert table.loc["mean", "pixel_ap"] == table.loc["worst", "pixel_ap"] == figures["bolt"]["pixel_ap"]
    assert table.loc["mean", "image_ap"] == np.mean([figures["bolt"]["image_ap"], figures["felt"]["image_ap"]])
    assert table.loc["worst", "image_ap"] == min(figures["bolt"]["image_ap"], figures["felt"]["image_ap"])
    assert (table.loc["worst", "false_alarm_rate"], table.loc["worst", "detection_rate"]) == (1, 0)
    assert (table.loc["worst", "routed"], table.loc["worst", "unknown"]) == (7 / 8, 1 / 8)
    assert not {"routed", "unknown"} & set(category_table({"felt": figures["felt"]}).columns)
