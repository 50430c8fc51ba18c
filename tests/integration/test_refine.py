"""False alarms become normal, defects stay defects, and nothing else changes."""

import shutil
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine

from decodiff_anomalib import DeCoDiff, MultiCategory
from decodiff_anomalib.__main__ import main as decodiff
from decodiff_anomalib.data import DemoTextures


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
        (checkpoint,): "Give --normal, a folder",
        (checkpoint, "--normal", good): "must be one of brick, gravel",
        (checkpoint, "--normal", few, "--category", "brick"): "has 1 images; 8 or more are needed",
        (tmp_path / "model.onnx", "--normal", good): "is no checkpoint (.ckpt)",
        (checkpoint, "--normal", tmp_path / "none.txt", "--category", "brick"): "No such file",
    }.items():
        with pytest.raises(SystemExit) as stop:
            refine(*arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
