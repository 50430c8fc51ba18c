"""The demo on a trained model: a checkpoint and an export predict alike, and a person uses the page in a browser."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.data import DemoTextures
from decodiff_anomalib.demo import build_page, inspect, serve, write_examples
from decodiff_anomalib.model_file import ModelFile, open_model


@pytest.fixture(scope="module")
def checkpoint(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(DeCoDiff("fast", 64, train_steps=5), datamodule=DemoTextures(root=data_root))
    return next(folder.rglob("model.ckpt"))


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> ModelFile:
    return open_model(checkpoint)


@pytest.fixture(scope="module")
def defect(gravel: Path) -> Path:
    return gravel / "test" / "foreign" / "000.png"


def test_an_exported_file_predicts_and_corrects_as_the_checkpoint(
    checkpoint: Path, opened: ModelFile, defect: Path, anomalib: Callable[..., str], tmp_path: Path
) -> None:
    names = {"output_names": ["pred_score", "anomaly_map", "correction"]}
    arguments = ["--ckpt_path", checkpoint, "--export_type", "onnx", "--export_root", tmp_path]
    anomalib(tmp_path, "export", "--model", "DeCoDiff", *arguments, "--onnx_kwargs", json.dumps(names))
    exported, trained = (inspect(model, defect) for model in (open_model(next(tmp_path.rglob("*.onnx"))), opened))
    assert exported.score == pytest.approx(trained.score, abs=1e-3)
    assert exported.verdict(0.5) == trained.verdict(0.5)
    torch.testing.assert_close(exported.batch.correction, trained.batch.correction, atol=1e-2, rtol=0)


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def false_alarms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("false-alarms")


@pytest.fixture(scope="module")
def address(
    browser: Chrome, opened: ModelFile, false_alarms: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The page, served to this computer."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    examples = write_examples(opened, tmp_path_factory.mktemp("examples"))
    page = build_page(opened, examples, Path("model.ckpt"), false_alarms)
    yield serve(page, "127.0.0.1", port)
    page.close()


@pytest.fixture
def page(browser: Chrome, address: str) -> Chrome:
    browser.get(address)
    wait(browser).until(lambda shown: shown.find_elements(By.CSS_SELECTOR, "#uploads input[type=file]"))
    return browser


def wait(page: Chrome) -> WebDriverWait:
    return WebDriverWait(page, 60)


def upload(page: Chrome, *files: Path) -> None:
    page.find_element(By.CSS_SELECTOR, "#uploads input[type=file]").send_keys("\n".join(map(str, files)))


def wait_for(page: Chrome, place: str, text: str) -> None:
    wait(page).until(lambda shown: text in shown.find_element(By.ID, place).text)


def move_threshold(page: Chrome, value: str) -> None:
    number = page.find_element(By.CSS_SELECTOR, "#threshold input[type=number]")
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys(value, Keys.ENTER)


def test_an_uploaded_image_is_scored_and_the_slider_moves_the_verdict(
    page: Chrome, opened: ModelFile, defect: Path
) -> None:
    said, facts = inspect(opened, defect).verdict(0.5)
    upload(page, defect)
    wait_for(page, "verdict", said)
    assert facts in page.find_element(By.ID, "verdict").text
    assert len(page.find_elements(By.CSS_SELECTOR, "#views img")) == 4
    move_threshold(page, "0.99")
    wait_for(page, "verdict", "Normal")
    wait_for(page, "command", "decodiff threshold model.ckpt --score 0.99")


def test_several_images_can_be_looked_at_in_turn_and_unreadable_ones_are_named(
    page: Chrome, opened: ModelFile, gravel: Path, defect: Path, tmp_path: Path
) -> None:
    text = tmp_path / "notes.png"
    text.write_text("no image")
    good = gravel / "test" / "good" / "001.png"
    upload(page, defect, text, good)
    wait_for(page, "verdict", inspect(opened, defect).verdict(0.5)[0])
    wait_for(page, "problems", "Not read: notes.png: is in no format that Pillow reads")
    _, second = page.find_elements(By.CSS_SELECTOR, "#results .thumbnail-item")
    second.click()
    wait_for(page, "verdict", "001.png")
    assert f"{inspect(opened, good).score:.2f}" in second.text


def test_an_image_is_marked_as_a_false_alarm(page: Chrome, opened: ModelFile, defect: Path, false_alarms: Path) -> None:
    upload(page, defect)
    wait_for(page, "verdict", inspect(opened, defect).verdict(0.5)[0])
    move_threshold(page, "0.01")
    wait_for(page, "verdict", "Anomalous")
    page.find_element(By.ID, "mark").click()
    wait_for(page, "marked", f"1 in {false_alarms}; to learn from them: decodiff refine model.ckpt --normal")
    (copy,) = false_alarms.iterdir()
    assert copy.read_bytes() == defect.read_bytes()


def test_an_example_is_inspected_with_a_click(page: Chrome) -> None:
    page.find_elements(By.CSS_SELECTOR, "#examples .thumbnail-item")[0].click()
    wait_for(page, "verdict", "category gravel")


def test_the_page_loads_nothing_from_elsewhere(page: Chrome, address: str) -> None:
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded
    assert [name for name in loaded if not name.startswith((address, "data:", "blob:"))] == []
