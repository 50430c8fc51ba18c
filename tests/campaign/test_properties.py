"""What must hold for any input, tried on inputs that hypothesis looks for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.calibration import CommonShift, NormalRange, normals_needed, prediction_limit, promised_rate
from decodiff_anomalib.data import MultiCategory
from decodiff_anomalib.evaluation.metrics import ranking_metrics, tally
from decodiff_anomalib.folder_names import check_folder_name
from decodiff_anomalib.image_io import WHITE_LEVELS, Depth, choose_white_level, read_image

THOROUGH = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW = settings(THOROUGH, max_examples=25)

positive = st.floats(1e-6, 1e6)
rates = st.floats(1e-4, 0.49)


# ---------------------------------------------------------------- numbers


@THOROUGH
@given(st.lists(positive, min_size=2, max_size=40), rates, rates, st.floats(1e-3, 1e3))
def test_a_limit_rises_as_the_rate_falls_and_scales_with_the_scores(
    scores: list[float], rate: float, other: float, factor: float
) -> None:
    values = torch.tensor(scores, dtype=torch.float64)
    limit, scaled = float(prediction_limit(values, rate)), float(prediction_limit(factor * values, rate))
    assume(limit < 1e300)
    assert scaled == pytest.approx(factor * limit, rel=1e-6)
    low, high = sorted((rate, other))
    assert prediction_limit(values, low) >= prediction_limit(values, high)
    assert limit >= float(values.log().mean().exp())  # rates are below one half


@THOROUGH
@given(st.integers(1, 2000), st.data())
def test_a_promise_covers_what_was_seen_and_is_kept_by_more_images(count: int, data: st.DataObject) -> None:
    exceeding = data.draw(st.integers(0, count))
    promised = promised_rate(count, exceeding)
    assert exceeding / count <= promised <= 1
    assert promised_rate(count + 1, exceeding) <= promised
    rate = data.draw(rates)
    needed = normals_needed(rate)
    assert promised_rate(needed) <= rate * (1 + 1e-9)
    assert needed == 1 or promised_rate(needed - 1) > rate


@THOROUGH
@given(
    arrays.arrays(np.float32, st.integers(2, 60), elements=st.sampled_from([0, 0.1, 0.25, 0.5, 0.75, 1])),
    st.data(),
)
def test_ranking_metrics_are_those_of_scikit_learn_with_ties_too(scores: np.ndarray, data: st.DataObject) -> None:
    labels = data.draw(arrays.arrays(bool, len(scores)))
    assume(0 < labels.sum() < len(labels))
    found = ranking_metrics(*tally(scores, labels))
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["ap"] == pytest.approx(average_precision_score(labels, scores))


@THOROUGH
@given(arrays.arrays(np.float32, (3, 1, 24, 32), elements=st.floats(0, 1e6, width=32)), st.floats(0.1, 100))
def test_ranges_and_shifts_keep_the_order_within_an_image_and_stay_finite(maps: np.ndarray, factor: float) -> None:
    values = torch.from_numpy(maps)
    normal_range, shift = NormalRange(["latent"], 1), CommonShift(1)
    normal_range.fit(0, "latent", values)
    shift.fit(0, values)
    category = torch.zeros(3, dtype=torch.long)
    shifted = shift(values * factor, category)
    excess = normal_range(shifted, "latent", category)
    assert excess.isfinite().all()
    assert (excess >= 1).all()
    for before, after in zip((values * factor).flatten(1), shifted.flatten(1), strict=True):
        assert (after[before.argsort()].diff() >= 0).all()
    assert (shifted <= values * factor * (1 + 1e-6)).all()


@THOROUGH
@given(st.lists(st.builds(Depth, st.floats(0, 65535), st.booleans()), min_size=1, max_size=5))
def test_a_white_level_covers_all_images_and_no_smaller_one_does(depths: list[Depth]) -> None:
    level, highest = choose_white_level(depths), max(depth.highest for depth in depths)
    assert level >= highest
    smaller = [known for known in WHITE_LEVELS if highest <= known < level]
    assert not [known for known in smaller if known > 1 or all(depth.is_float for depth in depths)]


@THOROUGH
@given(st.text(max_size=30))
def test_an_accepted_name_is_one_folder_below_another(name: str) -> None:
    try:
        check_folder_name(name, "category")
    except ValueError:
        return
    assert (Path("/root") / name).parent == Path("/root")
    assert Path("/root", name).name == name


# ---------------------------------------------------------------- images


@THOROUGH
@given(
    st.sampled_from([np.uint8, np.uint16]).flatmap(
        lambda dtype: arrays.arrays(dtype, st.tuples(st.integers(1, 20), st.integers(1, 20)))
    ),
    st.sampled_from(["PNG", "TIFF"]),
)
def test_every_grey_value_is_read_as_it_was_written(tmp_path: Path, pixels: np.ndarray, form: str) -> None:
    path = tmp_path / f"image.{form.lower()}"
    Image.fromarray(pixels).save(path, format=form)
    white = 255 if pixels.dtype == np.uint8 else 65535
    expected = torch.from_numpy(pixels.astype(np.float32) / white).expand(3, -1, -1)
    torch.testing.assert_close(read_image(path, 65535), expected)


@pytest.fixture(scope="module")
def trained(checkpoint: Path) -> DeCoDiff:
    return DeCoDiff.load_from_checkpoint(checkpoint).eval()


@FEW
@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31))
@torch.inference_mode()
def test_an_image_is_scored_alike_alone_and_in_a_batch_of_any_size(
    trained: DeCoDiff, count: int, height: int, width: int, seed: int
) -> None:
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    together = trained(images)
    assert together.anomaly_map.isfinite().all()
    assert together.pred_score.isfinite().all()
    assert ((together.pred_score >= 0) & (together.pred_score <= 1)).all()
    for index in range(count):
        alone = trained(images[index : index + 1])
        torch.testing.assert_close(alone.pred_score[0], together.pred_score[index], atol=1e-4, rtol=1e-4)


@FEW
@given(arrays.arrays(np.float32, (1, 3, 64, 64), elements=st.sampled_from([0.0, 0.5, 1.0, 1e-30])))
@torch.inference_mode()
def test_extreme_images_have_finite_scores(trained: DeCoDiff, pixels: np.ndarray) -> None:
    outputs = trained(torch.from_numpy(pixels))
    assert outputs.anomaly_map.isfinite().all()
    assert outputs.pred_score.isfinite().all()


# ---------------------------------------------------------------- whole trainings


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_has_finite_maps_and_thresholds(
    noise_root: Path, new_model: Callable[..., DeCoDiff], tmp_path: Path, precision: str
) -> None:
    model = new_model()
    engine = Engine(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, precision=precision
    )
    engine.fit(model, datamodule=MultiCategory(noise_root, num_workers=0))
    assert model.post_processor.image_thresholds.isfinite().all()
    batches = engine.predict(model, dataset=PredictDataset(noise_root / "bolt" / "test"))
    assert len(batches) == 12
    assert all(batch.anomaly_map.isfinite().all() and batch.pred_score.isfinite().all() for batch in batches)


@pytest.mark.parametrize("learning_rate", [1e-12, 1.0, 1e4, 1e30])
def test_any_learning_rate_ends_with_finite_weights_or_a_sentence(
    noise_root: Path, new_model: Callable[..., DeCoDiff], tmp_path: Path, learning_rate: float
) -> None:
    model = new_model(learning_rate=learning_rate)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    try:
        engine.fit(model, datamodule=MultiCategory(noise_root, num_workers=0))
    except ValueError as error:
        message = str(error)
    else:
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert model.post_processor.image_thresholds.isfinite().all()
        return
    assert "The training loss is nan in step" in message
    assert "Train with a smaller --model.learning_rate" in message
