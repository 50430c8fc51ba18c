"""What is collected of a run, batch by batch."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image as Picture

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.post_processor import DeCoDiffPostProcessor
from decodiff_anomalib.report import ReportWriter, writer
from decodiff_anomalib.report.records import ReportFolder


def trainer_of(folder: Path, fn: TrainerFn, datamodule: object = None) -> SimpleNamespace:
    return SimpleNamespace(
        default_root_dir=folder,
        datamodule=datamodule,
        state=SimpleNamespace(fn=fn),
        is_global_zero=True,
        global_rank=0,
        world_size=1,
        strategy=SimpleNamespace(barrier=lambda name: None),
    )


def batch_of(**fields: object) -> ImageBatch:
    """Two images: a normal one and a defective one, with the highest map where the mask is."""
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[1, :4] = True
    known = {
        "pred_score": torch.tensor([0.25, 0.75]),
        "pred_label": torch.tensor([False, True]),
        "anomaly_map": 0.5 * mask + 0.25,
        "gt_label": torch.tensor([False, True]),
        "gt_mask": mask,
    }
    batch = ImageBatch(image=torch.zeros(2, 3, 8, 8))
    for name, value in (known | fields).items():
        setattr(batch, name, value)
    return batch


def collect(folder: Path, *batches: ImageBatch, datamodule: object = None) -> ReportFolder:
    """A test if there is a datamodule, else a prediction."""
    callback, model = ReportWriter(), SimpleNamespace()
    trainer = trainer_of(folder, TrainerFn.TESTING if datamodule else TrainerFn.PREDICTING, datamodule)
    stage = "test" if datamodule else "predict"
    getattr(callback, f"on_{stage}_start")(trainer, model)
    for index, batch in enumerate(batches):
        getattr(callback, f"on_{stage}_batch_end")(trainer, model, batch, batch, index)
    getattr(callback, f"on_{stage}_end")(trainer, model)
    return ReportFolder(folder)


def test_a_test_of_one_category_has_its_labels_thumbnails_and_pixels(tmp_path: Path) -> None:
    datamodule = SimpleNamespace(name="parts", category="bolt")
    correction = torch.full((2, 3, 8, 8), 0.5)
    folder = collect(tmp_path, *[batch_of(correction=correction) for _ in range(2)], datamodule=datamodule)
    run, images = folder.read()
    assert (run.title, run.data, run.threshold) == ("SimpleNamespace test", "parts, bolt", 0.5)
    assert run.pixel_metrics == {"bolt": pytest.approx({"pixel_auroc": 1, "pixel_ap": 1, "pixel_aupro": 1})}
    assert [(one.number, one.name) for one in images] == [(number, f"image-{number:06d}") for number in range(4)]
    assert [one.defective for one in images] == [False, True] * 2
    assert {one.category for one in images} == {"bolt"}
    assert {one.views for one in images} == {("image", "correction", "map", "mask")}
    for one in images:
        with Picture.open(folder.thumbnail(one.number)) as strip:
            assert strip.size == (4 * 160, 160)
    assert folder.page.is_file()


def test_a_prediction_without_labels_is_sorted_by_the_inferred_category(tmp_path: Path) -> None:
    batch = batch_of(gt_label=None, gt_mask=None, pred_category=["bolt", "unknown"], ood_score=torch.tensor([0.5, 2.0]))
    run, images = collect(tmp_path, batch).read()
    assert [(one.category, one.inferred, one.defective, one.ood_score) for one in images] == [
        ("bolt", "bolt", None, 0.5),
        ("unknown", "unknown", None, 2.0),
    ]
    assert run.pixel_metrics == {}
    assert images[0].views == ("image", "map")


def test_a_model_without_thresholds_and_scores_that_are_no_numbers(tmp_path: Path) -> None:
    run, images = collect(tmp_path, batch_of(pred_label=None, pred_score=torch.tensor([math.nan, 7.0]))).read()
    assert run.threshold is None
    assert math.isnan(images[0].score)
    assert images[1].score == 7


def test_images_are_there_before_the_run_ends(tmp_path: Path) -> None:
    callback, trainer = ReportWriter(), trainer_of(tmp_path, TrainerFn.PREDICTING)
    callback.on_predict_start(trainer, SimpleNamespace())
    callback.on_predict_batch_end(trainer, SimpleNamespace(), batch_of(), None, 0)
    run, images = ReportFolder(tmp_path).read()
    assert (run.threshold, len(images)) == (0.5, 2)


def test_raw_thresholds_are_those_of_the_post_processor() -> None:
    post_processor = DeCoDiffPostProcessor()
    post_processor.categories, post_processor.image_thresholds = ("bolt", "felt"), torch.tensor([2.0, math.nan, 3.0])
    model = SimpleNamespace(post_processor=post_processor)
    assert writer._raw_thresholds(model) == {"bolt": 2, "felt": 3, "unknown": 3}


def test_promises_are_those_of_the_post_processor() -> None:
    post_processor = DeCoDiffPostProcessor(false_alarm_rate=0.05)
    post_processor.categories, post_processor.image_thresholds = ("bolt",), torch.tensor([2.0, 2.0])
    post_processor.normal_scores, post_processor.normal_pixel_rates = [[1.0] * 29], [[]]
    promises = writer._promises(SimpleNamespace(post_processor=post_processor))
    assert len(promises) == 1
    assert "bolt: at most 9.81 % of normal images above the threshold" in promises[0]
    assert "promising the 5 % asked for takes 59" in promises[0]


def test_a_full_disk_ends_the_report_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        msg = "No space left on device"
        raise OSError(msg)

    monkeypatch.setattr(ReportFolder, "write_thumbnail", fail)
    with caplog.at_level(logging.WARNING):
        folder = collect(tmp_path, batch_of(), batch_of())
    assert "The report is not written: No space left on device" in caplog.text
    assert caplog.text.count("The report is not written") == 1
    assert not folder.page.exists()


def test_a_missing_library_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "find_spec", lambda package: None if package == "bokeh" else package)
    with pytest.raises(ModuleNotFoundError, match=r'A report needs bokeh: pip install "decodiff_anomalib\[report\]"'):
        DeCoDiff(image_size=64, report=True)


def test_a_checkpoint_does_not_hand_on_that_a_report_was_asked_for() -> None:
    assert DeCoDiff(image_size=64, report=True).hparams["report"] is False
