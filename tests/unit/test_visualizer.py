"""Pictures: one for each image, whatever it is called, with the correction beside Anomalib's panels."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from PIL import Image

from decodiff_anomalib.visualizer import DeCoDiffVisualizer, picture_name


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
    paths: list[str] | None,
    folder: Path,
    categories: tuple[str, ...] = ("part",),
    scale: float = 1.0,
    told: list[str] | None = None,
    **fields: object,
) -> None:
    """Draw a batch; its loader tells of the paths ``told``, by default of all."""
    batch = ImageBatch(
        image=torch.zeros(2, 3, 32, 32),
        image_path=paths,
        anomaly_map=scale * torch.linspace(0, 1, 32).repeat(2, 32, 1),
        pred_score=torch.tensor([0.2, 0.8]),
    )
    for name, value in fields.items():
        setattr(batch, name, value)
    loader = SimpleNamespace(dataset=SimpleNamespace(image_filenames=told if told is not None else paths or []))
    trainer = SimpleNamespace(predict_dataloaders=loader, default_root_dir=folder, global_rank=0, world_size=1)
    visualizer, model = DeCoDiffVisualizer(), SimpleNamespace(categories=categories)
    visualizer.on_predict_start(trainer, model)
    visualizer.on_predict_batch_end(trainer, model, batch, batch, 0)


def pictures(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder / "images").as_posix() for path in folder.rglob("*.png"))


def test_images_of_one_name_have_a_picture_each(paths: list[str], tmp_path: Path) -> None:
    draw(paths, tmp_path / "run")
    assert pictures(tmp_path / "run") == ["a/part.png", "b/part.png"]


@pytest.mark.parametrize("told", [[], ["elsewhere/part.png"]])
def test_images_that_no_loader_tells_of_keep_their_whole_path(
    paths: list[str], tmp_path: Path, told: list[str]
) -> None:
    draw(paths, tmp_path / "run", told=[str(tmp_path / path) for path in told])
    assert pictures(tmp_path / "run") == [path.lstrip("/") for path in paths]


def test_paths_that_lead_upwards_stay_in_the_folder_of_pictures(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "images" / "a")
    draw(["../b/part.png", "part.png"], tmp_path / "run", told=["part.png"])
    assert pictures(tmp_path / "run") == sorted(["part.png", paths[1].lstrip("/")])


def test_images_without_a_path_have_their_number_and_show_what_the_model_was_given(tmp_path: Path) -> None:
    green = torch.tensor([-1.0, 1.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    draw(None, tmp_path / "run", image=green)
    assert pictures(tmp_path / "run") == ["image-000000.png", "image-000001.png"]
    picture = np.asarray(Image.open(tmp_path / "run" / "images" / "image-000000.png"))
    assert np.median(picture[-128:, :256], axis=(0, 1)).tolist() == [0, 255, 0]


def test_images_turned_by_exif_are_upright_in_the_picture(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 64, 32))  # red above blue
    exif = Image.Exif()
    exif[274] = 3  # stored upside down
    image.rotate(180).save(tmp_path / "turned.png", exif=exif)
    draw([str(tmp_path / "turned.png")] * 2, tmp_path / "run")
    picture = np.asarray(Image.open(tmp_path / "run" / "images" / "turned.png"))
    assert np.median(picture[60:120, :256], axis=(0, 1)).tolist() == [255, 0, 0]
    assert np.median(picture[140:, :256], axis=(0, 1)).tolist() == [0, 0, 255]


def test_every_name_has_a_picture_of_its_own(tmp_path: Path) -> None:
    names = [
        "a.png", "a.jpg", "a.bmp", "A.PNG", "a.jpg.png", "a.jpg.png.png", "a.png.png", "..png", ".png", "b", "c.raw",
        "a b.png", "größe.tif", "new\nline.png", f"{'x' * 246}.png", f"{'x' * 245}y.png", f"{'ü' * 125}.jpg", "a.2.png",
    ]  # fmt: skip
    found = [picture_name(name) for name in names]
    assert len(set(found)) == len(names)
    assert found[:2] + found[-1:] == ["a.png", "a.jpg.png", "a.2.png"]
    for name in found:
        assert name.endswith(".png")
        (tmp_path / f".12345-{name}").touch()  # room for what an atomic write puts before it


def test_odd_names_are_drawn(tmp_path: Path) -> None:
    odd = [str(tmp_path / name) for name in ("..png", f"{'x' * 240}\n ü.png")]
    for path in odd:
        Image.new("RGB", (32, 32)).save(path, format="PNG")
    draw(odd, tmp_path / "run")
    assert len(list((tmp_path / "run" / "images").iterdir())) == 2


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
