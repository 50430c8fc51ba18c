"""Thresholds from normal images, at the false-alarm rate they state."""

from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch

from decodiff_anomalib.calibration import prediction_limit, promised_rate
from decodiff_anomalib.data.dataset import CategoryBatch
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


def test_scores_below_zero_keep_their_ranking() -> None:
    """EfficientAd's maps are negative on most normal pixels."""
    processor = DeCoDiffPostProcessor()
    calibrate(processor, torch.rand(20) + 0.5, torch.rand(20, 1, 16, 16))
    raw = torch.linspace(-10, 10, 81)
    out = processor(InferenceBatch(pred_score=raw, anomaly_map=raw.view(-1, 1, 1, 1)))
    assert (out.pred_score.diff() > 0).all()
    assert (out.anomaly_map.flatten().diff() > 0).all()
    assert out.pred_score[40] == 0


def test_without_thresholds_scores_stay_raw_and_nothing_is_labelled() -> None:
    raw = torch.tensor([0.1, 5.0])
    out = DeCoDiffPostProcessor()(InferenceBatch(pred_score=raw, anomaly_map=raw.view(-1, 1, 1, 1)))
    assert torch.equal(out.pred_score, raw)
    batch = ImageBatch(image=torch.zeros(2, 3, 1, 1), pred_score=raw, anomaly_map=raw.view(-1, 1, 1, 1))
    DeCoDiffPostProcessor().post_process_batch(batch)
    assert torch.equal(batch.pred_score, raw)
    assert batch.pred_label is None


# ---------------------------------------------------------------- several categories

SCALES = {"bolt": 1.0, "felt": 100.0}


def scores_of(category: str, count: int, seed: int) -> torch.Tensor:
    """Log-normal scores on the category's scale."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(0.3).exp() * SCALES[category]


def batch_of(category: str | None, scores: torch.Tensor) -> CategoryBatch:
    return CategoryBatch(
        image=torch.zeros(len(scores), 3, 8, 8),
        pred_score=scores,
        anomaly_map=scores[:, None, None, None] * torch.linspace(0, 1, 64).view(1, 1, 8, 8),
        category=None if category is None else [category] * len(scores),
    )


@pytest.fixture(scope="module")
def two_categories() -> DeCoDiffPostProcessor:
    processor = DeCoDiffPostProcessor(false_alarm_rate=0.05)
    trainer = SimpleNamespace(datamodule=SimpleNamespace(categories=list(SCALES)), **vars(TRAINER))
    processor.setup(trainer, SimpleNamespace(), "fit")
    for category in SCALES:
        processor.on_validation_batch_end(TRAINER, None, batch_of(category, scores_of(category, 60, seed=0)))
    processor.on_validation_epoch_end(TRAINER, None)
    return processor


def test_each_category_keeps_the_false_alarm_rate_by_its_own_threshold(two_categories) -> None:
    for index, category in enumerate(SCALES):
        limit = prediction_limit(scores_of(category, 60, seed=0), 0.05)
        assert two_categories.image_thresholds[index] == pytest.approx(float(limit))
        batch = batch_of(category, scores_of(category, 4000, seed=1))
        raw = batch.pred_score.clone()
        two_categories.post_process_batch(batch)
        assert torch.equal(batch.raw_score, raw)
        assert torch.equal(batch.pred_label, raw > limit)
        assert batch.pred_label.float().mean() == pytest.approx(0.05, abs=0.03)
        torch.testing.assert_close(batch.pred_score, raw / (raw + limit.float()))


def test_scores_of_categories_become_comparable(two_categories) -> None:
    medians = []
    for category in SCALES:
        batch = batch_of(category, scores_of(category, 500, seed=2))
        two_categories.post_process_batch(batch)
        medians.append(batch.pred_score.median())
    assert medians[0] == pytest.approx(float(medians[1]), abs=0.02)


def test_an_exported_graph_and_a_batch_get_the_same(two_categories) -> None:
    scores = scores_of("felt", 5, seed=3)
    batch = batch_of("felt", scores)
    given = batch.anomaly_map.clone()
    graph = SimpleNamespace(
        pred_score=scores, anomaly_map=given, category_index=torch.ones(5, dtype=torch.long), ood_score=torch.zeros(5)
    )
    out = two_categories(graph)
    two_categories.post_process_batch(batch)
    for name in ("pred_score", "anomaly_map", "pred_label", "pred_mask"):
        assert torch.equal(getattr(out, name).squeeze(), getattr(batch, name).squeeze()), name


def test_unknown_and_unnamed_images_are_judged_by_the_threshold_over_all(two_categories) -> None:
    raw = torch.tensor([5.0])
    for category in (None, "cloth"):
        batch = batch_of(category, raw.clone())
        two_categories.post_process_batch(batch)
        torch.testing.assert_close(batch.pred_score, raw / (raw + two_categories.image_thresholds[2]))


def test_an_out_of_distribution_image_is_anomalous_and_other_scores_do_not_change(two_categories) -> None:
    scores, category = torch.full((3,), 1e-3), torch.tensor([0, 0, 2])
    maps = scores.view(3, 1, 1, 1)
    calm = two_categories(SimpleNamespace(pred_score=scores, anomaly_map=maps, category_index=category))
    ood_score = torch.tensor([0.0, 0.9, 3.0])
    out = two_categories(
        SimpleNamespace(pred_score=scores, anomaly_map=maps, category_index=category, ood_score=ood_score)
    )
    assert out.pred_label.tolist() == [False, False, True]
    assert torch.equal(out.pred_score[:2], calm.pred_score[:2])
    assert out.pred_score[2] == pytest.approx(0.75)


def test_the_configuration_of_a_checkpoint_allocates_its_thresholds(two_categories) -> None:
    restored = DeCoDiffPostProcessor()
    restored.load_checkpoint_config(two_categories.checkpoint_config())
    restored.load_state_dict(two_categories.state_dict())
    assert restored.categories == ("bolt", "felt")
    assert torch.equal(restored.image_thresholds, two_categories.image_thresholds)


@pytest.mark.parametrize("name", ["false_alarm_rate", "pixel_false_alarm_rate"])
@pytest.mark.parametrize("rate", [0, 0.5, 2])
def test_impossible_rates(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={rate} must be between 0 and 0.5"):
        DeCoDiffPostProcessor(**{name: rate})


@pytest.mark.parametrize(("count", "is_set"), [(1, False), (3, False), (4, True)])
def test_too_few_normal_images_set_no_threshold(count: int, is_set: bool) -> None:
    """Of two images the limit at 1 % lies 32 standard deviations above their mean."""
    processor = DeCoDiffPostProcessor()
    calibrate(processor, torch.rand(count) + 1, torch.rand(count, 1, 8, 8))
    assert processor.has_thresholds is is_set


def test_what_cannot_be_scored_does_not_pass() -> None:
    """A label is what a line stops on: NaN > 0.5 is false."""
    processor = DeCoDiffPostProcessor()
    calibrate(processor, torch.rand(20) + 1, torch.rand(20, 1, 8, 8))
    predictions = processor(
        InferenceBatch(pred_score=torch.tensor([torch.nan, 1.0]), anomaly_map=torch.full((2, 1, 8, 8), torch.nan))
    )
    assert predictions.pred_label.tolist() == [True, False]
    assert predictions.pred_mask.all()
    with pytest.raises(ValueError, match="score of validation image 1 of a batch is not a number"):
        calibrate(processor, torch.tensor([1.0, torch.nan]), torch.rand(2, 1, 8, 8))


# ---------------------------------------------------------------- what thresholds promise, and moving them


def test_thresholds_say_what_they_promise(two_categories) -> None:
    """Of 60 scores of each category, 5 % of a log-normal distribution lie above its limit."""
    for index, promise in enumerate(two_categories.promises()):
        scores = scores_of(promise.category, 60, seed=0)
        exceeding = int((scores > two_categories.image_thresholds[index]).sum())
        assert promise.normals == 60
        assert promise.false_alarm_rate == promised_rate(60, exceeding)
        assert 0.001 < promise.pixel_false_alarm_rate < 0.01  # the mean share is 0.001
    words = two_categories.describe()
    assert "bolt: at most " in words
    assert "promising the 5 % asked for takes 59" in words


def test_a_rate_can_be_changed_on_the_scores_that_were_kept(two_categories) -> None:
    restored = DeCoDiffPostProcessor()
    restored.load_checkpoint_config(two_categories.checkpoint_config())
    restored.load_state_dict(two_categories.state_dict())
    restored.set_rate(0.2, "felt")
    assert restored.image_thresholds[0] == two_categories.image_thresholds[0]
    assert restored.image_thresholds[1] == pytest.approx(float(prediction_limit(scores_of("felt", 60, seed=0), 0.2)))
    assert restored.false_alarm_rate == two_categories.false_alarm_rate
    restored.set_rate(0.2)
    assert restored.false_alarm_rate == 0.2
    assert restored.image_thresholds[0] == pytest.approx(float(prediction_limit(scores_of("bolt", 60, seed=0), 0.2)))


def test_a_category_with_few_normal_images_has_the_threshold_over_all() -> None:
    processor = DeCoDiffPostProcessor()
    trainer = SimpleNamespace(datamodule=SimpleNamespace(categories=list(SCALES)), **vars(TRAINER))
    processor.setup(trainer, SimpleNamespace(), "fit")
    for category, count in {"bolt": 30, "felt": 3}.items():
        processor.on_validation_batch_end(TRAINER, None, batch_of(category, scores_of(category, count, seed=0)))
    processor.on_validation_epoch_end(TRAINER, None)
    assert processor.image_thresholds[1] == processor.image_thresholds[2] > processor.image_thresholds[0]
    assert [promise.category for promise in processor.promises()] == ["bolt"]


def test_further_normal_images_can_only_raise_thresholds() -> None:
    processor = DeCoDiffPostProcessor()
    trainer = SimpleNamespace(datamodule=SimpleNamespace(categories=["bolt"]), **vars(TRAINER))
    processor.setup(trainer, SimpleNamespace(), "fit")
    calibrate(processor, scores_of("bolt", 20, seed=0), torch.rand(20, 1, 16, 16))
    image, pixel = processor.image_thresholds.clone(), processor.pixel_thresholds.clone()
    alike = torch.full((20,), 1.0)
    processor.add_normals("bolt", alike, processor.highest_pixels(torch.full((20, 1, 16, 16), 0.5)))
    assert torch.equal(processor.image_thresholds, image)
    assert torch.equal(processor.pixel_thresholds, pixel)
    assert len(processor.normal_scores[0]) == 40
    processor.add_normals("bolt", 9 * alike, processor.highest_pixels(torch.full((20, 1, 16, 16), 5.0)))
    assert (processor.image_thresholds > image).all()
    assert (processor.pixel_thresholds == 5).all()
