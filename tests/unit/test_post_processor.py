"""Thresholds from normal images, at the false-alarm rate they state."""

from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch

from decodiff_anomalib.post_processor import DeCoDiffPostProcessor

TRAINER = SimpleNamespace(sanity_checking=False, is_global_zero=True)


def calibrate(processor: DeCoDiffPostProcessor, scores: torch.Tensor, maps: torch.Tensor, labels=None) -> None:
    for indices in torch.arange(len(scores)).split(7):
        batch = ImageBatch(
            image=torch.zeros(len(indices), 3, *maps.shape[-2:]),
            pred_score=scores[indices],
            anomaly_map=maps[indices],
            gt_label=None if labels is None else labels[indices],
        )
        processor.on_validation_batch_end(TRAINER, None, batch)
    processor.on_validation_epoch_end(TRAINER, None)


@pytest.mark.parametrize("count", [10, 24, 100])
def test_realised_false_alarm_rate(count: int) -> None:
    """Over many calibrations on few log-normal scores, fresh ones exceed the threshold as often as asked."""
    generator = torch.Generator().manual_seed(0)
    processor = DeCoDiffPostProcessor(false_alarm_rate=0.05)
    rates = []
    for _ in range(300):
        scores = torch.randn(count, generator=generator).mul(0.4).exp()
        threshold = processor._prediction_limit(scores)
        rates.append((torch.randn(2000, generator=generator).mul(0.4).exp() > threshold).float().mean())
    assert torch.stack(rates).mean() == pytest.approx(0.05, abs=0.01)


def test_pixel_threshold_is_the_quantile_of_all_normal_pixels() -> None:
    maps = torch.rand(20, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 1, 20).view(
        -1, 1, 1, 1
    )
    processor = DeCoDiffPostProcessor(pixel_false_alarm_rate=0.01)
    calibrate(processor, maps.amax((1, 2, 3)), maps)
    flagged = (maps > processor.pixel_threshold).float().mean()
    assert flagged == pytest.approx(0.01, abs=1e-4)


def test_anomalies_do_not_move_thresholds() -> None:
    scores, maps = torch.rand(30) + 0.5, torch.rand(30, 1, 16, 16)
    labels = torch.arange(30) >= 20
    with_anomalies, normal_only = DeCoDiffPostProcessor(), DeCoDiffPostProcessor()
    calibrate(with_anomalies, torch.where(labels, scores * 100, scores), maps, labels)
    calibrate(normal_only, scores[:20], maps[:20])
    assert with_anomalies.image_threshold == normal_only.image_threshold
    assert with_anomalies.pixel_threshold == normal_only.pixel_threshold


def test_normalised_scores_keep_the_ranking_without_ties() -> None:
    processor = DeCoDiffPostProcessor()
    calibrate(processor, torch.rand(20) + 0.5, torch.rand(20, 1, 16, 16))
    raw = torch.logspace(-2, 3, 50)
    out = processor(InferenceBatch(pred_score=raw, anomaly_map=raw.view(-1, 1, 1, 1)))
    assert (out.pred_score.diff() > 0).all()
    assert out.pred_score.max() < 1
    assert torch.equal(out.pred_label, raw > processor.image_threshold)
    assert torch.equal(out.pred_score > 0.5, raw > processor.image_threshold)


def test_without_calibration_scores_stay_raw() -> None:
    raw = torch.tensor([0.1, 5.0])
    out = DeCoDiffPostProcessor()(InferenceBatch(pred_score=raw, anomaly_map=raw.view(-1, 1, 1, 1)))
    assert torch.equal(out.pred_score, raw)


@pytest.mark.parametrize("name", ["false_alarm_rate", "pixel_false_alarm_rate"])
@pytest.mark.parametrize("rate", [0, 0.5, 2])
def test_impossible_rates(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={rate} must be between 0 and 0.5"):
        DeCoDiffPostProcessor(**{name: rate})
