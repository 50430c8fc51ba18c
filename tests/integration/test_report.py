"""The report in a browser, as a person uses it, of a test through Anomalib's engine."""

from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.engine import Engine
from PIL import Image as Picture
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from torch.utils.data import DataLoader, Dataset

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.report.page import write_page
from decodiff_anomalib.report.records import Image, ReportFolder, Run

SCORES = [0.01 * number + 0.005 for number in range(100)]
DEFECTIVE = [number % 3 == 0 for number in range(100)]


class Labelled(Dataset):
    """Images with labels and masks, without files."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> ImageItem:
        mask = torch.zeros(64, 64, dtype=torch.bool)
        mask[:8] = bool(index % 2)
        return ImageItem(image=torch.rand(3, 64, 64), gt_label=torch.tensor(bool(index % 2)), gt_mask=mask)


def test_a_test_ends_with_a_report(tmp_path: Path) -> None:
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    loader = DataLoader(Labelled(), collate_fn=ImageBatch.collate, batch_size=4)
    engine.test(DeCoDiff(image_size=64, denoiser="nano", report=True), dataloaders=loader)
    (page,) = tmp_path.rglob("report.html")
    run, images = ReportFolder(page.parent).read()
    assert run.title == "DeCoDiff test"
    assert [image.defective for image in images] == [False, True] * 3
    assert {image.views for image in images} == {("image", "correction", "map", "mask")}
    page.unlink()
    assert write_page(ReportFolder(page.parent)) == page


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ReportFolder:
    """A report of 100 images of one category and one image of none."""
    found = ReportFolder(tmp_path_factory.mktemp("report"))
    found.begin()
    found.write_run(Run("DeCoDiff test", "parts", "2026-01-02T03:04:05+00:00", 0.5, {"bolt": 2.0, "unknown": 4.0}))
    views = ("image", "map")
    images = [
        Image(number, f"/parts/{number:03d}.png", "bolt", defective, score, views=views)
        for number, (score, defective) in enumerate(zip(SCORES, DEFECTIVE, strict=True))
    ]
    found.append([*images, Image(100, "/parts/100.png", "unknown", defective=None, score=0.9, views=views)])
    for number in range(101):
        found.write_thumbnail(number, [Picture.new("RGB", (32, 24), colour) for colour in ("#CC0000", "#0000CC")])
    write_page(found)
    return found


@pytest.fixture
def page(browser: Chrome, folder: ReportFolder) -> Chrome:
    """The page, opened anew."""
    browser.get(folder.page.as_uri())
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    WebDriverWait(browser, 20).until(lambda opened: opened.execute_script("return plots !== null"))
    return browser


def of(page: Chrome, selector: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, selector)


def text_of(page: Chrome, selector: str) -> str:
    return of(page, selector).get_attribute("textContent").strip()


def click(page: Chrome, selector: str) -> None:
    page.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", of(page, selector))


def choose_bolt(page: Chrome) -> None:
    click(page, "[data-choose='1']")


def move_to(page: Chrome, threshold: float) -> None:
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    page.execute_script(script, of(page, "#slider"), threshold)
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def expected(threshold: float) -> tuple[int, int]:
    """False alarms and misses."""
    pairs = list(zip(SCORES, DEFECTIVE, strict=True))
    false_alarms = sum(score > threshold and not defective for score, defective in pairs)
    return false_alarms, sum(score <= threshold and defective for score, defective in pairs)


def names(page: Chrome) -> list[str]:
    return [name.text.strip("\u200e") for name in page.find_elements(By.CSS_SELECTOR, ".item .name")]


def test_the_page_opens_without_an_error_or_a_request(page: Chrome) -> None:
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    loaded = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [address for address in loaded if not address.startswith("data:")] == []
    assert page.execute_script("return [...document.images].every((image) => image.complete && image.naturalWidth)")


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.801])
def test_the_slider_updates_counts_table_and_gallery(page: Chrome, threshold: float) -> None:
    choose_bolt(page)
    move_to(page, threshold)
    false_alarms, misses = expected(threshold)
    assert text_of(page, "[data-tile=false_alarms]").startswith(f"{false_alarms}{100 * false_alarms / 66:.1f} % of 66")
    assert text_of(page, "[data-tile=misses]").startswith(f"{misses}{100 * misses / 34:.1f} % of 34")
    assert text_of(page, "tr[data-category='1'] [data-figure=misses]") == str(misses)
    assert text_of(page, "tr[data-category='0'] [data-figure=misses]") == str(misses)
    assert text_of(page, "[data-count=misses]") == str(misses)
    raw = 2 * threshold / (1 - threshold)
    assert float(text_of(page, "tr[data-category='1'] [data-figure=threshold]")) == pytest.approx(raw, rel=1e-3)
    click(page, "[value=misses]")
    assert names(page) == [f"{number:03d}.png" for number in range(0, 100, 3)][: min(misses, 20)]
    line = page.execute_script("return plots.find('histogram', 'threshold').location")
    assert line == pytest.approx(threshold)


def test_the_keyboard_moves_the_slider_and_reset_brings_it_back(page: Chrome) -> None:
    choose_bolt(page)
    before = text_of(page, "[data-tile=false_alarms]")
    slider = of(page, "#slider")
    slider.send_keys(*[Keys.ARROW_RIGHT] * 5)
    WebDriverWait(page, 5).until(lambda opened: text_of(opened, "[data-tile=false_alarms]") != before)
    click(page, "#reset")
    WebDriverWait(page, 5).until(lambda opened: text_of(opened, "[data-tile=false_alarms]") == before)
    assert text_of(page, "#meaning") == "The model's own threshold, raw score 2."


def test_all_categories_keep_their_thresholds(page: Chrome) -> None:
    choose_bolt(page)
    move_to(page, 0.95)
    click(page, "[data-choose='0']")
    assert not of(page, "#slider").is_displayed()
    assert text_of(page, "[data-count=all]") == "101"
    click(page, "[data-choose='2']")
    assert text_of(page, "#value") == ""
    assert of(page, "#value").get_attribute("value") == "0.5"


def test_colours_are_light_or_dark_at_choice_and_remembered(page: Chrome) -> None:
    def ground() -> str:
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    def axis() -> str:
        return page.execute_script("return plots.figures.histogram.below[0].axis_label_text_color")

    light, light_axis = ground(), axis()
    click(page, "#theme")
    dark = ground()
    assert light != dark
    assert axis() != light_axis
    assert text_of(page, "#theme") == "Light"
    page.refresh()
    assert ground() == dark
    click(page, "#theme")
    assert ground() == light


def test_the_gallery_is_paged(page: Chrome) -> None:
    choose_bolt(page)
    click(page, "[value=all]")
    assert text_of(page, "#pages") == "5"
    seen = names(page)
    assert seen[0] == "099.png"
    assert of(page, "#previous").get_attribute("disabled")
    for _ in range(4):
        click(page, "#next")
        seen += names(page)
    assert seen == [f"{number:03d}.png" for number in reversed(range(100))]
    assert of(page, "#next").get_attribute("disabled")
    click(page, "#first")
    assert names(page) == seen[:20]


def test_images_are_nearest_to_the_threshold_first_and_found_by_name(page: Chrome) -> None:
    choose_bolt(page)
    click(page, "[value=nearest]")
    assert set(names(page)[:2]) == {"049.png", "050.png"}
    of(page, "#search").send_keys("07")
    assert set(names(page)) == {f"{number:03d}.png" for number in (7, *range(70, 80))}


def test_an_image_is_enlarged_and_the_keyboard_leads_to_the_next(page: Chrome) -> None:
    choose_bolt(page)
    click(page, "[value=false_alarms]")
    of(page, ".item .views").send_keys(Keys.ENTER)
    assert of(page, "#detail").get_attribute("open")
    assert text_of(page, "#detail-title") == "098.png"
    assert len(page.find_elements(By.CSS_SELECTOR, "#detail img")) == 2
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert text_of(page, "#detail-title") == "097.png"
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not of(page, "#detail").get_attribute("open")


def test_marked_images_are_counted_and_stay_marked(page: Chrome) -> None:
    choose_bolt(page)
    click(page, "[value=false_alarms]")
    click(page, ".item .mark")
    assert text_of(page, "#marked") == "1 marked."
    assert of(page, "#download").is_enabled()
    click(page, "[value=all]")
    assert [mark.is_selected() for mark in page.find_elements(By.CSS_SELECTOR, ".item .mark")][:3] == [
        False,
        True,
        False,
    ]


def test_everything_has_a_name_and_nothing_is_wider_than_a_telephone(page: Chrome) -> None:
    controls = page.find_elements(By.CSS_SELECTOR, "button, input, select")
    assert all(control.accessible_name for control in controls if control.is_displayed())
    override = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", override)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
