"""The table of the metrics of several categories."""

from types import SimpleNamespace

import numpy as np
import torch

from decodiff_anomalib.evaluation import CategoryMetrics, category_table


def metrics_of(maps, masks, category="part", **given):
    fields = {
        "category": ["part"] * len(maps),
        "pred_score": maps.amax((1, 2)),
        "gt_label": masks.flatten(1).any(1),
        "pred_label": None,
        "anomaly_map": maps,
        "gt_mask": masks,
    }
    metrics = CategoryMetrics(category)
    metrics.update(SimpleNamespace(**fields | given))
    return metrics.compute()


def test_table_ends_with_the_mean_and_the_worst_ignoring_nan():
    masks = torch.zeros(8, 16, 16, dtype=torch.bool)
    masks[::2, 3:7, 5:9] = True
    maps = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0))
    alarms = torch.tensor([True, False] * 4)
    predicted = ["part", "unknown"] + ["part"] * 6
    metrics = {
        "bolt": metrics_of(maps, masks, pred_label=alarms, pred_category=predicted),
        "felt": metrics_of(maps[:6], masks[:6], gt_mask=None, pred_label=~alarms[:6]),
        "absent": metrics_of(maps, masks, category="absent"),
    }
    table = category_table(metrics)
    assert list(table.index) == ["bolt", "felt", "mean", "worst"]
    assert list(table.normal[:2]) == [4, 3]
    assert table.loc["mean", "pixel_ap"] == table.loc["worst", "pixel_ap"] == metrics["bolt"]["pixel_ap"]
    assert metrics["bolt"]["image_ap"] != metrics["felt"]["image_ap"]
    assert table.loc["mean", "image_ap"] == np.mean([metrics["bolt"]["image_ap"], metrics["felt"]["image_ap"]])
    assert table.loc["worst", "image_ap"] == min(metrics["bolt"]["image_ap"], metrics["felt"]["image_ap"])
    assert (table.loc["worst", "false_alarm_rate"], table.loc["worst", "detection_rate"]) == (1, 0)
    assert (table.loc["worst", "category_accuracy"], table.loc["worst", "unknown_rate"]) == (7 / 8, 1 / 8)
    assert not {"category_accuracy", "unknown_rate"} & set(category_table({"felt": metrics["felt"]}).columns)
