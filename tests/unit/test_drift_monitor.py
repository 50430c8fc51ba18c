"""When a stream of images is called unlike the training set, and how often by mistake."""

import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from decodiff_anomalib.callbacks import DriftMonitor

NORMALS = 24  # held-out images
MEAN, SPREAD = 0.7, 0.3  # of the logarithm of scores


def monitor_of(generator: torch.Generator, normals: int = NORMALS) -> DriftMonitor:
    logs = MEAN + SPREAD * torch.randn(normals, generator=generator)
    usual = torch.tensor([[-0.8, 0.2, normals]])
    module = SimpleNamespace(
        category="inferred",
        post_processor=SimpleNamespace(normal_scores=[logs.exp().tolist()]),
        model=SimpleNamespace(router=SimpleNamespace(usual=usual)),
    )
    monitor = DriftMonitor()
    monitor.setup(None, module, TrainerFn.PREDICTING)
    return monitor


def predict(monitor: DriftMonitor, logs: torch.Tensor, unlikeness: torch.Tensor | None = None) -> None:
    for start in range(0, len(logs), 8):
        scores = logs[start : start + 8].exp()
        ood = torch.full_like(scores, 0.45) if unlikeness is None else unlikeness[start : start + 8]
        batch = SimpleNamespace(
            raw_score=scores, ood_score=ood, category_index=torch.where(ood > 1, 1, torch.zeros(len(scores)).long())
        )
        monitor.on_predict_batch_end(None, None, batch, None, 0)


def test_normal_images_with_defects_among_them_are_no_drift(caplog: pytest.LogCaptureFixture) -> None:
    """Over 100 trainings on 24 held-out images, 5,000 images each, one in twenty defective: hardly a false warning."""
    generator = torch.Generator().manual_seed(0)
    warned = 0
    for _ in range(100):
        monitor = monitor_of(generator)
        logs = MEAN + SPREAD * torch.randn(5000, generator=generator)
        logs += 3 * (torch.rand(5000, generator=generator) < 0.05)
        caplog.clear()
        predict(monitor, logs)
        warned += len(caplog.records)
    assert warned <= 2


def test_a_shift_is_seen_within_a_window_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    monitor = monitor_of(generator)
    predict(monitor, MEAN + SPREAD * torch.randn(200, generator=generator))
    assert not caplog.records
    predict(monitor, MEAN + SPREAD * (2.5 + torch.randn(48, generator=generator)))  # 2.5 standard deviations
    assert len(caplog.records) == 1
    assert "median raw_score lies" in caplog.text
    assert "`decodiff threshold MODEL --images FOLDER`" in caplog.text
    predict(monitor, MEAN + SPREAD * (2.5 + torch.randn(200, generator=generator)))
    assert len(caplog.records) == 1


def test_images_without_a_score_are_a_drift(caplog: pytest.LogCaptureFixture) -> None:
    predict(monitor_of(torch.Generator().manual_seed(0)), torch.full((56,), torch.nan))
    assert "up to number 56" in caplog.text
    assert "median raw_score lies inf" in caplog.text


def test_images_of_no_trained_category_are_a_drift(caplog: pytest.LogCaptureFixture) -> None:
    monitor = monitor_of(torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        predict(monitor, torch.full((48,), MEAN), torch.full((48,), 1.5))
        assert not caplog.records  # fewer than a window
        predict(monitor, torch.full((8,), MEAN), torch.full((8,), 1.5))
    assert "median ood_score lies inf standard deviations above" in caplog.text
    assert "look at the lamp, the focus and the camera" in caplog.text


def test_without_inferred_categories_and_kept_scores_nothing_is_watched() -> None:
    module = SimpleNamespace(
        category="given", post_processor=None, model=SimpleNamespace(router=SimpleNamespace(usual=torch.ones(1, 3)))
    )
    monitor = DriftMonitor()
    monitor.setup(None, module, TrainerFn.PREDICTING)
    predict(monitor, torch.full((100,), 9.0), torch.full((100,), 2.0))
