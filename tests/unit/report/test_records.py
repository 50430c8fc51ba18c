"""What a run leaves behind can be read again, whatever happened to it."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from decodiff_anomalib.report.records import Image, ReportFolder


def test_a_run_is_read_as_it_was_written(write_report: Callable[..., ReportFolder]) -> None:
    images = [
        Image(
            0,
            "/a/ü\udcff\n.png",
            "bolt",
            defective=None,
            score=0.75,
            raw_score=3.0,
            inferred="felt",
            ood_score=1.5,
            views=("image", "map"),
        ),
        Image(1, "image-000001", "unknown", None, 0.25),
    ]
    folder = write_report(images[:1], raw_thresholds={"bolt": 1.0}, pixel_metrics={"bolt": {"pixel_ap": 0.5}})
    folder.append(images[1:])
    run, found = folder.read()
    assert found == images
    assert (run.threshold, run.raw_thresholds, run.pixel_metrics) == (0.5, {"bolt": 1.0}, {"bolt": {"pixel_ap": 0.5}})


def test_a_score_that_is_not_a_number_stays_one(write_report: Callable[..., ReportFolder]) -> None:
    _, (found,) = write_report([Image(0, "a", "bolt", None, math.nan)]).read()
    assert math.isnan(found.score)


def test_half_a_line_of_a_killed_run_is_left_out(write_report: Callable[..., ReportFolder]) -> None:
    folder = write_report([Image(0, "a", "bolt", None, 0.5, views=("image",))])
    with (folder.path / "images.jsonl").open("a") as file:
        file.write('{"number": 1, "na')
    assert len(folder.read()[1]) == 1


def test_damaged_data_are_refused(write_report: Callable[..., ReportFolder]) -> None:
    folder = write_report([])
    (folder.path / "images.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(ValueError, match=r"data of the report in .* are damaged.*Test or predict again"):
        folder.read()


def test_a_folder_without_a_report_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no report/run.json.*--model\.report true"):
        ReportFolder(tmp_path).read()


def test_a_run_begins_without_what_an_earlier_one_left(write_report: Callable[..., ReportFolder]) -> None:
    folder = write_report([Image(0, "a", "bolt", None, 0.5, views=("image",))])
    folder.page.write_text("page")
    (folder.path / "note.txt").write_text("somebody else's")
    folder.begin()
    left = sorted(path.relative_to(folder.path.parent).as_posix() for path in folder.path.parent.rglob("*.*"))
    assert left == ["report/images.jsonl", "report/note.txt"]


def test_views_lie_side_by_side(write_report: Callable[..., ReportFolder]) -> None:
    folder = write_report([])
    folder.write_thumbnail(7, [Picture.new("RGB", (30, 20), colour) for colour in ("#FF0000", "#0000FF")])
    with Picture.open(folder.thumbnail(7)) as strip:
        pixels = np.asarray(strip.convert("RGB")).astype(int)
    assert pixels.shape == (20, 60, 3)
    assert pixels[10, 10, 0] - pixels[10, 10, 2] > 100, "red on the left"
    assert pixels[10, 50, 2] - pixels[10, 50, 0] > 100, "blue on the right"
