"""Area under the per-region overlap from counts of pixels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.metrics import AUPRO

from decodiff_anomalib.evaluation.aupro import anomalib_aupro, region_shares


def test_pixels_share_their_region_with_those_that_touch_at_corners():
    mask = np.array([[1, 1, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    assert region_shares(mask) == pytest.approx([1 / 3, 1 / 3, 1, 1 / 3])


def test_anomalib_aupro_equals_anomalibs_class():
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 32, 32), bool)
    masks[0, 4:9, 4:9] = masks[0, 20:30, 3:5] = masks[2, 10:20, 10:20] = True
    values = (rng.integers(20, size=masks.shape) + 4 * masks) / 24
    distinct, position = np.unique(values, return_inverse=True)
    position = position.reshape(masks.shape)
    shares = np.concatenate([region_shares(mask) for mask in masks if mask.any()])
    found = anomalib_aupro(
        np.bincount(position[~masks], minlength=len(distinct)),
        np.bincount(position[masks], weights=shares, minlength=len(distinct)),
    )
    metric = AUPRO(fields=("anomaly_map", "gt_mask"))
    metric.update(SimpleNamespace(anomaly_map=torch.from_numpy(values).float(), gt_mask=torch.from_numpy(masks).int()))
    assert found == pytest.approx(float(metric.compute()), abs=1e-6)
