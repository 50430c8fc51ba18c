"""What the demo's page is made of, on a model that answers with chosen numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from decodiff_anomalib import demo as module
from decodiff_anomalib.demo import (
    Inspection,
    build_page,
    command_html,
    demo,
    inspect,
    inspect_all,
    keep_false_alarms,
    verdict_html,
    write_examples,
)
from decodiff_anomalib.image_io import image_files
from decodiff_anomalib.model_file import ModelFile, Outputs
from decodiff_anomalib.post_processor import DeCoDiffPostProcessor

SIDE = 8


@pytest.fixture
def answer() -> dict[str, torch.Tensor]:
    """Raw outputs: three times the threshold of the second category, a map above its threshold in one row."""
    anomaly_map = torch.zeros(1, 1, SIDE, SIDE)
    anomaly_map[..., 0, :] = 2.0
    return {
        "pred_score": torch.tensor([6.0]),
        "anomaly_map": anomaly_map,
        "category_index": torch.tensor([1]),
        "ood_score": torch.tensor([0.2]),
        "correction": torch.ones(1, 3, SIDE, SIDE),
    }


@pytest.fixture
def opened(answer: Outputs) -> ModelFile:
    """A model of two categories, whose image thresholds are 1 and 2, and whose pixel thresholds are 1."""
    post_processor = DeCoDiffPostProcessor()
    post_processor.categories = ("bolt", "felt")
    post_processor._allocate_thresholds()
    post_processor.image_thresholds.copy_(torch.tensor([1.0, 2.0, 1.5]))
    post_processor.pixel_thresholds.fill_(1)

    def save(target: Path) -> None:
        raise AssertionError

    return ModelFile(post_processor, None, lambda image: answer, save, torch.zeros(0, 3, 1, 1))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A grey image of twice the model's size."""
    path = tmp_path / "part.png"
    Image.new("RGB", (2 * SIDE, 2 * SIDE), "#808080").save(path)
    return path


def test_scores_are_normalised_by_the_threshold_of_the_category(opened: ModelFile, file: Path) -> None:
    found = inspect(opened, file)
    assert found.score == pytest.approx(6 / (6 + 2))
    assert found.verdict(0.5) == ("Anomalous: score 0.75 above 0.50 (3 × the threshold)", "category felt, part.png")
    assert set(found.views) == {"image", "correction", "map"}
    assert found.views["correction"].getpixel((0, 0)) == (255, 255, 255)


def test_the_verdict_follows_the_threshold(opened: ModelFile, file: Path) -> None:
    found = inspect(opened, file)
    assert [found.is_anomalous(threshold) for threshold in (0.74, 0.75, 0.76)] == [True, False, False]
    assert found.verdict(0.75)[0] == "Normal: score 0.75 not above 0.75 (1 × the threshold)"
    assert "left: 60.0%" in verdict_html(found, 0.6)


def test_the_mask_is_outlined_on_the_image(opened: ModelFile, file: Path) -> None:
    found = inspect(opened, file)
    changed = np.any(np.asarray(found.outlined()) != np.asarray(found.views["image"]), axis=-1)
    height = changed.shape[0]
    assert changed[height // SIDE : height // 4].any()
    assert not changed[height // 2 :].any()


def test_an_image_of_no_category_is_anomalous_at_any_threshold(
    opened: ModelFile, file: Path, answer: dict[str, torch.Tensor]
) -> None:
    answer |= {"category_index": torch.tensor([2]), "ood_score": torch.tensor([1.5]), "pred_score": torch.tensor([0.1])}
    found = inspect(opened, file)
    assert found.score == pytest.approx(1.5 / 2.5)
    assert found.verdict(0.99) == ("Anomalous whatever the threshold", "of no trained category, part.png")


def test_what_cannot_be_scored_does_not_pass(opened: ModelFile, file: Path, answer: dict[str, torch.Tensor]) -> None:
    answer["pred_score"] = torch.tensor([math.nan])
    found = inspect(opened, file)
    assert found.is_anomalous(0.99)
    assert "could not be scored" in verdict_html(found, 0.5)


def test_without_that_output_there_is_no_correction(
    opened: ModelFile, file: Path, answer: dict[str, torch.Tensor]
) -> None:
    del answer["correction"]
    assert set(inspect(opened, file).views) == {"image", "map"}


def test_an_unreadable_file_is_named_without_its_folder_and_the_others_are_inspected(
    opened: ModelFile, file: Path
) -> None:
    text = file.with_name("notes.png")
    text.write_text("no image")
    found, problems = inspect_all(opened, [text, file])
    assert [one.file for one in found] == [file]
    assert problems == ["notes.png: is in no format that Pillow reads"]


def test_names_of_files_are_text(opened: ModelFile, file: Path) -> None:
    hostile = file.rename(file.with_name("<s>x.png"))
    assert "<s>" not in verdict_html(inspect(opened, hostile), 0.5)


def test_the_page_says_how_to_keep_a_threshold() -> None:
    assert command_html(Path("my model.ckpt"), 0.5, 0.5) == ""
    assert "decodiff threshold &#x27;my model.ckpt&#x27; --score 0.62" in command_html(Path("my model.ckpt"), 0.62, 0.5)


def test_examples_are_exemplars_with_and_without_defects(opened: ModelFile, tmp_path: Path) -> None:
    drawn = write_examples(opened, tmp_path)
    assert len(drawn) == 6
    opened.exemplars = torch.full((12, 3, 32, 32), 0.5)
    files = write_examples(opened, tmp_path)
    assert len(files) == 12
    grey = {file.name for file in files if np.ptp(np.asarray(Image.open(file))) == 0}
    assert {f"{number}-normal.png" for number in range(1, 7)} <= grey
    assert len(grey) < 12


# ---------------------------------------------------------------- false alarms


def test_false_alarms_are_copied_once_to_the_folder_of_their_category(
    opened: ModelFile, file: Path, tmp_path: Path
) -> None:
    """The copy outlives the upload, and images of the same name do not replace each other."""
    other = tmp_path / "other" / file.name
    other.parent.mkdir()
    Image.new("RGB", (SIDE, SIDE), "#ff0000").save(other)
    kept, categories = tmp_path / "kept", opened.post_processor.categories
    found, contents = [inspect(opened, file), inspect(opened, other)], {file.read_bytes(), other.read_bytes()}
    for _ in range(2):
        said = keep_false_alarms(found, 0.5, kept, categories, Path("model.ckpt"))
    file.unlink()
    copies = image_files(kept / "felt")
    assert {copy.read_bytes() for copy in copies} == contents
    assert len(copies) == len(image_files(kept)) == 2
    command = f"decodiff refine model.ckpt --normal {kept / 'felt'} --category felt"
    assert f"2 in {kept / 'felt'}; to learn from them: <code>{command}</code> It takes 8 images or more." in said
    assert "part.png is no longer on the server" in keep_false_alarms(found, 0.5, kept, categories, Path("model.ckpt"))


def test_images_that_are_not_anomalous_are_no_false_alarms(opened: ModelFile, file: Path, tmp_path: Path) -> None:
    said = keep_false_alarms(
        [inspect(opened, file)], 0.8, tmp_path / "kept", opened.post_processor.categories, Path("model.ckpt")
    )
    assert "Nothing was marked" in said
    assert not (tmp_path / "kept").exists()


def test_the_command_for_false_alarms_of_one_category_names_none(opened: ModelFile, file: Path, tmp_path: Path) -> None:
    said = keep_false_alarms([inspect(opened, file)], 0.5, tmp_path / "my kept", ("part",), Path("model.onnx"))
    assert f"decodiff refine CHECKPOINT --normal &#x27;{tmp_path}/my kept&#x27;</code>" in said
    assert "CHECKPOINT is what model.onnx was exported from" in said
    assert len(list((tmp_path / "my kept").glob("*.png"))) == 1


def test_images_of_no_category_wait_for_one(
    opened: ModelFile, file: Path, answer: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    answer |= {"category_index": torch.tensor([2]), "ood_score": torch.tensor([1.5])}
    categories = opened.post_processor.categories
    said = keep_false_alarms([inspect(opened, file)], 0.99, tmp_path / "kept", categories, Path("model.ckpt"))
    assert f"--normal {tmp_path / 'kept' / 'unknown'} --category NAME</code>" in said
    assert "NAME is the category that the images are of" in said


def test_only_with_a_folder_can_false_alarms_be_marked(opened: ModelFile, file: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    for folder, expected in {None: set(), tmp_path: {"mark", "mark-all"}}.items():
        page = build_page(opened, [file], Path("model.ckpt"), folder)
        assert {block.elem_id for block in page.blocks.values() if block.get_block_name() == "button"} == expected
    (mark,) = (event.fn for event in page.fns.values() if event.name == "keep_one")
    before, found = image_files(tmp_path), [inspect(opened, file), inspect(opened, file)]
    assert f"decodiff refine model.ckpt --normal {tmp_path / 'felt'}" in mark(found, 1, 0.5)
    assert len(image_files(tmp_path)) == len(before) + 1


# ---------------------------------------------------------------- errors


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch, opened: ModelFile) -> None:
    """Any file is the model."""
    monkeypatch.setattr(module, "open_model", lambda file: opened)


def message(capsys: pytest.CaptureFixture[str], *arguments: Path) -> str:
    with pytest.raises(SystemExit) as ended:
        demo(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_model_that_does_not_exist_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    assert f"decodiff demo: {tmp_path / 'none.ckpt'} does not exist. Give" in message(capsys, tmp_path / "none.ckpt")
    (tmp_path / "model.pt").touch()
    assert "model.pt is no checkpoint (.ckpt), ONNX" in message(capsys, tmp_path / "model.pt")
    (tmp_path / "model.ckpt").write_text("no checkpoint")
    assert "model.ckpt cannot be loaded" in message(capsys, tmp_path / "model.ckpt")


def test_a_folder_without_examples_is_named(opens: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    assert f"--examples {tmp_path} has no images. Give" in message(capsys, tmp_path / "model.ckpt", tmp_path)


def test_a_folder_of_false_alarms_that_cannot_be_made_is_named(
    opens: None, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    with pytest.raises(SystemExit):
        demo(Path("model.ckpt"), file.parent, false_alarms=file)
    assert f"--false_alarms {file} cannot be made" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert 'needs gradio: pip install "decodiff_anomalib[app]"' in message(capsys, Path("model.ckpt"))


def test_inspections_hold_no_pixels_at_full_size(opened: ModelFile, file: Path) -> None:
    """A page keeps every inspection."""
    found: Inspection = inspect(opened, file)
    assert found.batch.image.numel() < 10
