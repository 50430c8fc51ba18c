"""Pictures: one for each image, whatever it is called, with the correction beside Anomalib's panels."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from PIL import Image

from decodiff_anomalib.visualizer import DeCoDiffVisualizer


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Two images of one name in two folders."""
    found = []
    for folder in ("a", "b"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        found.append(str(tmp_path / "images" / folder / "part.png"))
        Image.new("RGB", (32, 32), (200, 0, 0)).save(found[-1])
    return found


def draw(
    paths: list[str], folder: Path, categories: tuple[str, ...] = ("part",), scale: float = 1.0, **fields: object
) -> None:
    batch = ImageBatch(
        image=torch.zeros(2, 3, 32, 32),
        image_path=paths,
        anomaly_map=scale * torch.linspace(0, 1, 32).repeat(2, 32, 1),
        pred_score=torch.tensor([0.2, 0.8]),
    )
    for name, value in fields.items():
        setattr(batch, name, value)
    loader = SimpleNamespace(dataset=SimpleNamespace(image_filenames=paths))
    trainer = SimpleNamespace(predicting=True, predict_dataloaders=loader, default_root_dir=folder)
    DeCoDiffVisualizer().on_test_batch_end(trainer, SimpleNamespace(categories=categories), None, batch, 0)


def test_images_of_one_name_have_a_picture_each(paths: list[str], tmp_path: Path) -> None:
    draw(paths, tmp_path / "run")
    found = sorted(path.relative_to(tmp_path / "run" / "images") for path in (tmp_path / "run").rglob("*.png"))
    assert found == [Path("a/part.png"), Path("b/part.png")]


def test_the_correction_is_the_last_panel(paths: list[str], tmp_path: Path) -> None:
    draw(paths, tmp_path / "without")
    green = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    draw(paths, tmp_path / "with", correction=green, pred_category=["part", "unknown"])
    without, with_it = (Image.open(tmp_path / name / "images" / "a" / "part.png") for name in ("without", "with"))
    side = with_it.height
    assert with_it.width == without.width + side
    panel = np.asarray(with_it)[:, -side:]
    assert np.median(panel[side // 2 :], axis=(0, 1)).tolist() == [0, 255, 0]


def test_raw_maps_above_one_are_scaled_rather_than_wrapped(paths: list[str], tmp_path: Path) -> None:
    draw(paths, tmp_path / "normalised")
    draw(paths, tmp_path / "raw", scale=50.0)
    first, second = (
        np.asarray(Image.open(tmp_path / name / "images" / "a" / "part.png")) for name in ("normalised", "raw")
    )
    assert np.abs(first.astype(int) - second).max() <= 2
