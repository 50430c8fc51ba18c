"""Predictions and tests through Anomalib's engine lose no image: its picture, its scores, or why it has none."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch, ImageItem, PredictDataset
from anomalib.engine import Engine
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from decodiff_anomalib import DeCoDiff

SMALL = {"image_size": 64, "denoiser": "nano"}


def engine(folder: Path, **arguments: object) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, **arguments)


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("predictions.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pictures(folder: Path) -> set[str]:
    (images,) = (path for path in folder.rglob("images") if path.is_dir())
    return {path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file()}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Files whose names are alike, odd or long, and broken ones, in two folders."""
    folder = tmp_path / "data"
    names = ["a.png", "a.jpg", "a.bmp", "a.jpg.png", "..png", "two words ü.png", "new\nline.png", f"{'x' * 246}.png"]
    for name in [*names, "sub/a.png"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 50).save(folder / name, format="PNG")
    (folder / "broken.png").write_text("no image")
    (folder / "sub" / "empty.png").touch()
    return folder


class Own(Dataset):
    """Images of one's own, labelled, with or without a path."""

    def __init__(self, paths: list[str | None]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageItem:
        defective = bool(index % 2)
        mask = torch.zeros(64, 64, dtype=torch.bool)
        mask[:8] = defective
        image = torch.rand(3, 64, 64)
        return ImageItem(image=image, image_path=self.paths[index], gt_label=torch.tensor(defective), gt_mask=mask)


def loader(dataset: Dataset) -> DataLoader:
    return DataLoader(dataset, collate_fn=ImageBatch.collate, batch_size=2)


def test_every_image_has_a_picture_and_every_file_a_row(images: Path, tmp_path: Path) -> None:
    batches = engine(tmp_path / "run").predict(DeCoDiff(**SMALL), data_path=images)
    assert sum(map(len, batches)) == 9
    found = pictures(tmp_path / "run")
    assert len(found) == 9
    assert {"a.png", "a.jpg.png", "a.bmp.png", "a.jpg.png.png", "..png", "new\nline.png", "sub/a.png"} < found
    table = rows(tmp_path / "run")
    assert sorted(row["path"] for row in table) == sorted(str(path) for path in images.rglob("*") if path.is_file())
    assert {Path(row["path"]).name: row["reason"] for row in table if row["reason"]} == {
        "broken.png": "is in no format that Pillow reads",
        "empty.png": "is empty",
    }


@pytest.mark.parametrize("verb", ["predict", "test"])
def test_loaders_of_ones_own_are_served(verb: str, images: Path, tmp_path: Path) -> None:
    model = DeCoDiff(**SMALL)
    paths = [str(images / name) for name in ("a.png", "a.jpg", "sub/a.png")]
    whole = [path.lstrip("/") + ending for path, ending in zip(paths, ("", ".png", ""), strict=True)]
    numbered = {"image-000000.png", "image-000001.png", "image-000002.png"}
    for name, loaders, expected in (
        ("own", loader(Own(paths)), set(whole)),
        ("subset", loader(Subset(Own(paths), [2, 1])), set(whole[1:])),
        ("frames", loader(Own([None] * 3)), numbered),
        ("several", [loader(Own([None] * 3)), loader(Own(paths))], numbered | set(whole)),
    ):
        getattr(engine(tmp_path / name), verb)(model, dataloaders=loaders)
        assert pictures(tmp_path / name) == expected, name


def test_part_of_a_folder_and_several_folders_are_served(images: Path, tmp_path: Path) -> None:
    model = DeCoDiff(**SMALL)
    for name in ("broken.png", "sub/empty.png"):
        (images / name).unlink()
    data = PredictDataset(images)
    chosen = [index for index, path in enumerate(data.image_filenames) if path.parent.name == "sub"]
    engine(tmp_path / "subset").predict(model, dataloaders=loader(Subset(data, chosen)))
    assert pictures(tmp_path / "subset") == {"sub/a.png"}
    loaders = [loader(PredictDataset(images / name)) for name in ("a.png", "sub")]
    engine(tmp_path / "several").predict(model, dataloaders=loaders)
    assert pictures(tmp_path / "several") == {"a.png", "sub/a.png"}


def test_scores_are_post_processed_and_a_prediction_goes_on(images: Path, tmp_path: Path) -> None:
    (tmp_path / "normal").mkdir()
    for index in range(16):
        Image.effect_noise((64, 64), 50).save(tmp_path / "normal" / f"{index}.png")
    file = tmp_path / "table.csv"
    model = DeCoDiff(**SMALL, predictions=file)
    training = engine(tmp_path / "run", max_steps=1)
    training.fit(model, datamodule=Folder("noise", normal_dir=tmp_path / "normal", num_workers=0))
    assert model.post_processor.has_thresholds
    (sub,) = training.predict(model, data_path=images / "sub")
    others = training.predict(model, data_path=images)
    assert len(others) == 8, "sub/a.png is listed"
    with file.open(newline="") as opened:
        table = {row["path"]: row for row in csv.DictReader(opened)}
    assert len(table) == 11
    for batch in (sub, *others):
        row = table[batch.image_path[0]]
        assert float(row["pred_score"]) == pytest.approx(batch.pred_score.item())
        assert float(row["raw_score"]) == pytest.approx(batch.raw_score.item())
        assert float(row["pred_score"]) < 1
        assert row["pred_label"] == str(int(batch.pred_label.item()))
        assert row["pred_category"] == batch.pred_category[0]
        assert float(row["ood_score"]) == pytest.approx(batch.ood_score.item())

    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    loaded = DeCoDiff.load_from_checkpoint(checkpoint)
    engine(tmp_path / "later").predict(loaded, data_path=images / "sub")
    assert len(rows(tmp_path / "later")) == 2, "a checkpoint does not hand on the file"


def test_an_image_above_the_white_level_is_a_row_with_its_reason(tmp_path: Path) -> None:
    """Whether the level is the model's already, or comes with a checkpoint."""
    folder = tmp_path / "deep"
    folder.mkdir()
    for name, value in {"dark": 1000, "bright": 4000, "above": 5000}.items():
        Image.fromarray(np.full((64, 64), value, np.uint16)).save(folder / f"{name}.png")
    model = DeCoDiff(**SMALL, white_level=4095)
    model.trainer = Trainer(logger=False)
    model.trainer.strategy.connect(model)
    model.trainer.save_checkpoint(tmp_path / "model.ckpt")
    for name, given, checkpoint in (("own", model, None), ("loaded", DeCoDiff(**SMALL), tmp_path / "model.ckpt")):
        batches = engine(tmp_path / name).predict(given, data_path=folder, ckpt_path=checkpoint)
        assert [Path(batch.image_path[0]).stem for batch in batches] == ["bright", "dark"], name
        assert {Path(row["path"]).stem: row["reason"][:51] for row in rows(tmp_path / name) if row["reason"]} == {
            "above": "its highest value 5000 is above the white level 4095"[:51]
        }, name
    refusing = DeCoDiff(**SMALL, white_level=4095, unreadable="refuse")
    with pytest.raises(ValueError, match="1 of 3 image files cannot be read"):
        engine(tmp_path / "refused").predict(refusing, data_path=folder)


def test_broken_files_can_be_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 of 11 image files cannot be read"):
        engine(tmp_path / "run").predict(DeCoDiff(**SMALL, unreadable="refuse"), data_path=images)
    with pytest.raises(ValueError, match="unreadable='drop' is unknown; valid: skip, refuse"):
        DeCoDiff(**SMALL, unreadable="drop")
