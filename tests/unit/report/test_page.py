"""The page of a report: what is in it, what is left out, and that it needs nothing else."""

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from decodiff_anomalib.report import page as page_module
from decodiff_anomalib.report import report
from decodiff_anomalib.report.page import order_of_interest, write_page
from decodiff_anomalib.report.records import Image, ReportFolder

Write = Callable[..., ReportFolder]


def image(number: int, score: float, *, defective: bool | None = None, category: str = "bolt") -> Image:
    views = ("image", "correction", "map", "mask")
    return Image(number, f"/data/{category}/{number:04d}.png", category, defective, score, views=views)


def read(folder: ReportFolder) -> str:
    return write_page(folder).read_text(encoding="utf-8")


def embedded(text: str, name: str) -> Any:
    (found,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


class Assets(HTMLParser):
    """Addresses that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data"}]


def test_the_page_refers_to_nothing_outside_itself(write_report: Write, three_categories: list[Image]) -> None:
    assets = Assets()
    assets.feed(read(write_report(three_categories)))
    assert assets.addresses
    assert all(address.startswith(("#", "data:")) for address in assets.addresses)


def test_figures_of_the_page_are_those_of_the_images(write_report: Write, three_categories: list[Image]) -> None:
    data = embedded(read(write_report(three_categories, pixel_metrics={"felt": {"pixel_ap": 0.25}})), "data")
    everything, bolt, felt, unknown = data["categories"]
    assert [category["name"] for category in data["categories"]] == ["all categories", "bolt", "felt", "unknown"]
    own = [one for one in three_categories if one.category == "felt"]
    assert felt["images"] == 20
    assert felt["misses"] == sum(one.defective and one.score <= 0.5 for one in own)
    assert felt["false_alarms"] == sum(not one.defective and one.score > 0.5 for one in own)
    assert everything["misses"] == bolt["misses"] + felt["misses"] + unknown["misses"]
    assert everything["auroc"] == pytest.approx((bolt["auroc"] + felt["auroc"] + unknown["auroc"]) / 3)
    assert (felt["pixel_ap"], everything["pixel_ap"]) == (0.25, 0.25)


def test_names_are_short_and_the_folder_is_kept(write_report: Write) -> None:
    data = embedded(read(write_report([image(0, 0.1), image(1, 0.2, category="felt")])), "data")
    assert (data["folder"], [one["name"] for one in data["images"]]) == ("/data/", ["bolt/0000.png", "felt/0001.png"])


def test_names_cannot_leave_their_place(write_report: Write) -> None:
    bad = '</script><script>alert("x")</script><s>&amp;'
    folder = write_report([Image(0, bad, bad, defective=None, score=0.9, inferred=bad, views=("image",))])
    text = read(folder)
    body = text.rpartition("\n<body>")[2]
    assert "<s>" not in body
    assert body.count("<script>") == 1, "the page's own"
    assert embedded(text, "data")["images"][0]["name"] == bad


@pytest.mark.parametrize(
    ("images", "threshold"),
    [
        ([], None),
        ([image(0, 0.7)], 0.5),
        ([image(0, math.nan, defective=True)], 0.5),
        ([image(number, 0.1 * number, defective=False) for number in range(9)], 0.5),
        ([image(number, 0.1 * number, defective=True) for number in range(9)], 0.5),
        ([image(number, 10.0 * number, defective=number > 5) for number in range(9)], None),
        ([image(0, 0.2), image(1, 0.3, category="unknown")], 0.5),
        ([image(0, -3.0, defective=False), image(1, math.nan), image(2, 1.0, defective=True)], 0.5),
    ],
)
def test_every_run_has_a_page(write_report: Write, images: list[Image], threshold: float | None) -> None:
    text = read(write_report(images, threshold))
    assert len(embedded(text, "data")["images"]) == len(images)
    if images:
        assert ("have no labels" in text) == all(one.defective is None for one in images)
        assert ("no thresholds" in text) == (threshold is None)
        assert ("no score" in text.partition("</main>")[0]) == any(math.isnan(one.score) for one in images)


def test_misses_and_false_alarms_come_first_in_turn_then_what_is_near_the_threshold() -> None:
    scores = {0: 0.1, 1: 0.3, 2: 0.9, 3: 0.7, 4: 0.48, 5: 0.0, 6: 0.6, 7: math.nan}
    defective = {0: True, 1: True, 6: True}
    images = [image(number, score, defective=defective.get(number, False)) for number, score in scores.items()]
    assert [one.number for one in order_of_interest(images, {"bolt": 0.5})] == [0, 7, 1, 2, 3, 4, 6, 5]


def test_thumbnails_beyond_the_limit_are_left_out_and_the_page_says_so(
    write_report: Write, three_categories: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_report(three_categories)
    size = max(folder.thumbnail(one.number).stat().st_size for one in three_categories)
    monkeypatch.setattr(page_module, "EMBEDDED_BYTES", 20 * size)
    text = read(folder)
    kept = embedded(text, "thumbnails")
    assert 20 <= len(kept) < 60
    assert f"The pictures of {60 - len(kept)} of 60 images are left out" in text
    wrong = {str(one.number) for one in three_categories if one.defective != (one.score > 0.5)}
    assert wrong <= kept.keys()


def test_the_command_makes_the_page_again(write_report: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_report([image(0, 0.7)])
    report(folder.page.parent)
    assert capsys.readouterr().out == f"{folder.page}\n"
    assert folder.page.is_file()


def test_the_page_says_what_thresholds_promise(write_report: Write, three_categories: list[Image]) -> None:
    assert "<li>bolt: at most 5 %.</li>" in read(write_report(three_categories, promises=("bolt: at most 5 %.",)))
    assert "thresholds promise" not in read(write_report(three_categories))
