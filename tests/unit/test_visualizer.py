"""Pictures: one for each image, whatever it is called; what their panels show and their text says."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from PIL import Image

from decodiff_anomalib.scale import colour_bar
from decodiff_anomalib.visualizer import DeCoDiffVisualizer, Panel, compose, headline, picture_name

SIDE, GAP, BELOW = 256, 13, 46
"""Pixels of a panel, between panels and below them."""


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


def panel(file: Path, place: int) -> np.ndarray:
    """Pixels ``(N, 3)`` of a panel of a picture with square panels."""
    left, picture = GAP + place * (SIDE + GAP), np.asarray(Image.open(file))
    top = picture.shape[0] - BELOW - SIDE
    return picture[top : top + SIDE, left : left + SIDE].reshape(-1, 3)


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
    assert np.unique(panel(tmp_path / "run" / "images" / "image-000000.png", 0), axis=0).tolist() == [[0, 255, 0]]


def test_images_turned_by_exif_are_upright_in_the_picture(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 64, 32))  # red above blue
    exif = Image.Exif()
    exif[274] = 3  # stored upside down
    image.rotate(180).save(tmp_path / "turned.png", exif=exif)
    draw([str(tmp_path / "turned.png")] * 2, tmp_path / "run")
    shown = panel(tmp_path / "run" / "images" / "turned.png", 0).reshape(SIDE, SIDE, 3)
    assert shown[60, 60].tolist() == [255, 0, 0]
    assert shown[-60, 60].tolist() == [0, 0, 255]


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


def test_the_correction_is_the_second_panel(paths: list[str], tmp_path: Path) -> None:
    draw(paths, tmp_path / "without")
    green = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    draw(paths, tmp_path / "with", correction=green, pred_category=["part", "unknown"])
    files = [tmp_path / name / "images" / "a" / "part.png" for name in ("without", "with")]
    without, with_it = (Image.open(file) for file in files)
    assert with_it.width == without.width + SIDE + GAP
    assert np.unique(panel(files[1], 1), axis=0).tolist() == [[0, 255, 0]]


def test_nothing_is_written_on_the_image(paths: list[str], tmp_path: Path) -> None:
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, 8:16, 8:16] = True
    draw(paths, tmp_path, pred_label=torch.tensor([False, True]), pred_mask=mask, gt_mask=mask, gt_label=mask[:, 9, 9])
    file = tmp_path / "images" / "a" / "part.png"
    assert np.unique(panel(file, 0), axis=0).tolist() == [[200, 0, 0]]
    outlined = panel(file, 2).reshape(SIDE, SIDE, 3)
    assert (outlined[70:120, 70:120] == (200, 0, 0)).all(), "what is outlined stays visible"
    assert len(np.unique(outlined.reshape(-1, 3), axis=0)) == 3, "image, outline and its border"


@pytest.mark.parametrize("label", [True, False])
def test_maps_have_one_scale_with_the_threshold_at_its_middle(paths: list[str], tmp_path: Path, label: bool) -> None:
    draw(paths, tmp_path, pred_label=torch.tensor([label, label]), anomaly_map=torch.full((2, 32, 32), 0.5))
    assert np.unique(panel(tmp_path / "images" / "a" / "part.png", 1), axis=0).min() > 240, "white"


def test_raw_maps_are_shown_up_to_their_highest_value(paths: list[str], tmp_path: Path) -> None:
    draw(paths, tmp_path / "once")
    draw(paths, tmp_path / "scaled", scale=50.0)
    once, scaled = (panel(tmp_path / name / "images" / "a" / "part.png", 1) for name in ("once", "scaled"))
    assert np.abs(once.astype(int) - scaled).max() <= 2


@pytest.mark.parametrize("side", [256, 2000])
def test_text_grows_with_the_panels_and_fits(paths: list[str], tmp_path: Path, side: int) -> None:
    image = Image.new("RGB", (side, side))
    picture = compose(
        ("W" * 200, "a\nb" * 200), [Panel("W" * 99, image, bar=(colour_bar((side, 9)), {0.0: "a", 1.0: "b"}))]
    )
    pixels = np.asarray(picture)
    border = np.concatenate([pixels[:, :5].reshape(-1, 3), pixels[:, -5:].reshape(-1, 3), pixels[-5:].reshape(-1, 3)])
    assert (border == 255).all()
    assert (pixels.min(axis=(1, 2)) < 100).sum() > side


def test_the_verdict_is_said_in_words() -> None:
    batch = ImageBatch(
        image=torch.zeros(3, 3, 8, 8),
        pred_score=torch.tensor([0.25, 0.75, float("nan")]),
        pred_label=torch.tensor([False, True, True]),
        gt_label=torch.tensor([False, True, False]),
    )
    batch.pred_category = ["bolt", "unknown", "bolt"]
    assert [headline(batch, index, 0.5, "folder/a.png") for index in range(3)] == [
        ("Normal: score 0.25 not above 0.50 (0.33 × the threshold)", "category bolt, labelled normal, a.png"),
        ("Anomalous: score 0.75 above 0.50 (3 × the threshold)", "of no trained category, labelled defective, a.png"),
        ("Anomalous: the image could not be scored", "category bolt, labelled normal, a.png"),
    ]


def test_pictures_keep_the_aspect_ratio(tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), (200, 0, 0)).save(tmp_path / "wide.png")
    draw([str(tmp_path / "wide.png")] * 2, tmp_path / "run")
    picture = np.asarray(Image.open(tmp_path / "run" / "images" / "wide.png"))
    rows, columns = np.nonzero((picture == (200, 0, 0)).all(-1))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (256, 171)
