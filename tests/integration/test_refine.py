"""False alarms become normal, regions are ignored, defects stay defects, and nothing else changes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from PIL import Image

from decodiff_anomalib import DeCoDiff, MultiCategory
from decodiff_anomalib.__main__ import main as decodiff
from decodiff_anomalib.data import DemoTextures, read_image
from decodiff_anomalib.model_file import Outputs, open_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo textures without their validation images: held-out images overlap with training images."""
    demo = DemoTextures(root=tmp_path_factory.mktemp("data"))
    demo.prepare_data()
    for folder in Path(demo.root).glob("*/validation"):
        shutil.move(folder / "good", folder.parent / "marked")
    return Path(demo.root)


@pytest.fixture(scope="module")
def checkpoint(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    data = MultiCategory(root, categories=["brick", "gravel"], num_workers=0, train_batch_size=16)
    model = DeCoDiff(image_size=64, train_steps=20, visualizer=False, evaluator=False)
    Engine(default_root_dir=folder, accelerator="cpu", logger=False).fit(model, datamodule=data)
    return next(folder.rglob("model.ckpt"))


def load(file: Path) -> DeCoDiff:
    return DeCoDiff.load_from_checkpoint(file, map_location="cpu", visualizer=False, evaluator=False).eval()


def refine(*arguments: object) -> None:
    decodiff(["refine", *map(str, arguments)])


def test_marked_images_become_normal(
    checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list of files serves as a folder does; the model's own file and the other category stay as they were."""
    marked = sorted((root / "brick" / "marked").glob("*.png"))
    listed = tmp_path / "marked-images.txt"
    listed.write_text("\n".join(map(str, marked)) + "\n", encoding="utf-8")
    before, refined = checkpoint.read_bytes(), tmp_path / "refined.ckpt"
    refine(checkpoint, "--normal", listed, "--category", "brick", "--output", refined)
    assert f"{len(marked)} normal: " in capsys.readouterr().out
    assert checkpoint.read_bytes() == before
    old, new = load(checkpoint), load(refined)
    index, other = old.categories.index("brick"), old.categories.index("gravel")
    for name, bank in new.model.memory_banks.items():
        assert torch.equal(bank.bank[other], old.model.memory_banks[name].bank[other])
        assert not torch.equal(bank.bank[index], old.model.memory_banks[name].bank[index])
    assert new.post_processor.image_thresholds[other] == old.post_processor.image_thresholds[other]
    scores = new.post_processor.normal_scores[index]
    assert len(scores) == len(old.post_processor.normal_scores[index]) + len(marked)
    assert sum(score > new.post_processor.image_thresholds[index] for score in scores) <= 0.1 * len(scores)


def test_a_model_that_would_miss_defects_is_not_saved(
    checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defects that are stated to be normal are no longer detected."""
    defects = root / "gravel" / "test" / "foreign"
    refined = tmp_path / "refined.ckpt"
    arguments = (checkpoint, "--normal", defects, "--defective", defects, "--category", "gravel", "--output", refined)
    with pytest.raises(SystemExit) as stop:
        refine(*arguments)
    assert stop.value.code == 1
    assert "of the defective images are no longer detected" in capsys.readouterr().err
    assert not refined.exists()
    refine(*arguments, "--force", "true")
    assert refined.exists()


def test_bad_requests_are_refused(
    checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(next((root / "brick" / "test" / "good").iterdir()), few)
    good = root / "brick" / "test" / "good"
    for arguments, message in {
        (checkpoint,): "Give --normal, a folder of normal images or a list of them, or --ignore",
        (checkpoint, "--normal", good): "must be one of brick, gravel",
        (checkpoint, "--normal", few, "--category", "brick"): "has 1 images; 8 or more are needed",
        (tmp_path / "model.onnx", "--normal", good): "is no checkpoint (.ckpt)",
        (checkpoint, "--normal", tmp_path / "none.txt", "--category", "brick"): "No such file",
    }.items():
        with pytest.raises(SystemExit) as stop:
            refine(*arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------- regions to ignore


def mask(file: Path, *, rows: slice = slice(0), columns: slice = slice(None), size: int = 128) -> Path:
    """A black image that is white in some rows and columns."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[rows, columns] = 255
    Image.fromarray(pixels).save(file)
    return file


def list_first(folder: Path, count: int, target: Path) -> Path:
    """A list of the first images of a folder."""
    target.write_text("\n".join(map(str, sorted(folder.glob("*.png"))[:count])), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def upper_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mask(tmp_path_factory.mktemp("masks") / "upper-half.png", rows=slice(64))


@pytest.fixture(scope="module")
def ignoring(checkpoint: Path, upper_half: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, which ignores the upper half of gravel."""
    file = tmp_path_factory.mktemp("ignoring") / "model.ckpt"
    refine(checkpoint, "--ignore", upper_half, "--category", "gravel", "--output", file)
    return file


@pytest.fixture(scope="module")
def spots(root: Path) -> dict[str, torch.Tensor]:
    """A normal image of gravel ``(1, 3, H, W)`` in [0, 1] with a white spot in its upper or lower half, or none."""
    image = read_image(root / "gravel" / "test" / "good" / "001.png")[None]
    height, width = image.shape[-2:]
    spots = {"none": image, "upper": image.clone(), "lower": image.clone()}
    for name, middle in {"upper": height // 4, "lower": 3 * height // 4}.items():
        reach, column = height // 24, width // 2
        spots[name][..., middle - reach : middle + reach, column - reach : column + reach] = 1
    return spots


def outputs(file: Path, image: torch.Tensor) -> Outputs:
    """Raw outputs of a checkpoint."""
    return open_model(file).infer(image)


def test_a_defect_in_an_ignored_region_is_not_detected_and_one_elsewhere_is(
    checkpoint: Path, ignoring: Path, spots: dict[str, torch.Tensor]
) -> None:
    old, new = ({name: outputs(file, image) for name, image in spots.items()} for file in (checkpoint, ignoring))
    for name in spots:
        assert (new[name]["anomaly_map"][..., :32, :] == 0).all()
        assert torch.equal(new[name]["anomaly_map"][..., 32:, :], old[name]["anomaly_map"][..., 32:, :])
    threshold = load(ignoring).post_processor.image_thresholds[load(ignoring).categories.index("gravel")]
    assert old["upper"]["pred_score"] > threshold
    assert new["upper"]["pred_score"] <= threshold
    assert new["lower"]["pred_score"] == old["lower"]["pred_score"] > threshold


def test_the_corrected_image_is_the_image_in_an_ignored_region(
    checkpoint: Path, ignoring: Path, spots: dict[str, torch.Tensor]
) -> None:
    image = load(ignoring).pre_processor.transform(spots["upper"])
    corrected = outputs(ignoring, spots["upper"])["correction"]
    assert torch.equal(corrected[..., :32, :], image[..., :32, :])
    assert not torch.equal(outputs(checkpoint, spots["upper"])["correction"][..., :32, :], image[..., :32, :])


def test_other_categories_and_thresholds_stay_and_a_black_mask_takes_regions_back(
    checkpoint: Path, ignoring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = load(checkpoint), load(ignoring)
    gravel = new.categories.index("gravel")
    assert new.model.ignored[gravel].sum() == 32 * 64
    assert new.model.ignored.sum() == 32 * 64
    assert torch.equal(new.post_processor.image_thresholds, old.post_processor.image_thresholds)
    black = mask(tmp_path / "black.png")
    refine(ignoring, "--ignore", black, "--category", "gravel", "--output", tmp_path / "all.ckpt")
    assert "gravel: 0.00% of each image ignored" in capsys.readouterr().out
    assert not load(tmp_path / "all.ckpt").model.ignored.any()


def test_regions_and_normal_images_are_learnt_together(
    checkpoint: Path, root: Path, upper_half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refined, marked = tmp_path / "refined.ckpt", list_first(root / "gravel" / "marked", 8, tmp_path / "marked.txt")
    arguments = ("--normal", marked, "--ignore", upper_half, "--category", "gravel", "--output", refined)
    refine(checkpoint, *arguments)
    said = capsys.readouterr().out
    assert "gravel: 50.00% of each image ignored" in said
    assert "8 normal: " in said
    old, new = load(checkpoint), load(refined)
    index = new.categories.index("gravel")
    assert new.model.ignored[index].any()
    assert len(new.post_processor.normal_scores[index]) == len(old.post_processor.normal_scores[index]) + 8


def test_regions_over_the_defects_are_not_saved(
    checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    most = mask(tmp_path / "most.png", rows=slice(112))
    refined = tmp_path / "refined.ckpt"
    defects = list_first(root / "gravel" / "test" / "foreign", 8, tmp_path / "defects.txt")
    with pytest.raises(SystemExit) as stop:
        refine(checkpoint, "--ignore", most, "--defective", defects, "--category", "gravel", "--output", refined)
    assert stop.value.code == 1
    assert "are no longer detected" in capsys.readouterr().err
    assert not refined.exists()


def test_exports_ignore_the_same(ignoring: Path, spots: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """OpenVINO's files are made of the same ONNX graph."""
    file = load(ignoring).to_onnx(tmp_path, output_names=["pred_score", "anomaly_map", "correction"])
    exported = open_model(file)
    for image in spots.values():
        expected, found = outputs(ignoring, image), exported.infer(image)
        assert (found["anomaly_map"][..., :32, :] == 0).all()
        torch.testing.assert_close(found["pred_score"], expected["pred_score"], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(found["correction"], expected["correction"], rtol=0, atol=1e-2)


def test_a_checkpoint_of_before_regions_ignores_none(
    checkpoint: Path, upper_half: Path, spots: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for state in ("state_dict", "current_model_state"):
        del content[state]["model.ignored"]
    older, refined = tmp_path / "older.ckpt", tmp_path / "refined.ckpt"
    torch.save(content, older)
    assert torch.equal(
        outputs(older, spots["upper"])["anomaly_map"], outputs(checkpoint, spots["upper"])["anomaly_map"]
    )
    refine(older, "--ignore", upper_half, "--category", "gravel", "--output", refined)
    content = torch.load(refined, map_location="cpu", weights_only=True)
    assert content["state_dict"]["model.ignored"].any()
    assert content["current_model_state"]["model.ignored"].any()  # a training that goes on keeps them


def test_bad_masks_are_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    white = mask(tmp_path / "white.png", rows=slice(None))
    thin = mask(tmp_path / "thin.png", rows=slice(3, 4), columns=slice(3, 4), size=512)
    for file, message in {
        tmp_path / "none.png": "none.png: does not exist",
        text: "text.png: is in no format that Pillow reads",
        white: "white.png leaves 0.00% of the image",
        thin: "thin.png: nothing white is left at the model's 64 x 64 pixels. Draw it larger",
    }.items():
        with pytest.raises(SystemExit) as stop:
            refine(checkpoint, "--ignore", file, "--category", "brick")
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
