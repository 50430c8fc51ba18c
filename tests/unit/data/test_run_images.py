"""The images of a run: their folder, their names, and those left out."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from PIL import Image
from torch.utils.data import DataLoader, Subset

from decodiff_anomalib.data.run_images import (
    ImageNumbers,
    common_folder,
    datasets_of,
    leave_out,
    restore,
    shortenable,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/0", "a/1", "b/0"):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return tmp_path / "data"


def loader(data: PredictDataset | Subset, **arguments: object) -> DataLoader:
    return DataLoader(data, collate_fn=ImageBatch.collate, **arguments)


def test_loaders_may_be_one_several_or_other_iterables(folder: Path) -> None:
    first, second = PredictDataset(folder / "a"), PredictDataset(folder / "b")
    assert datasets_of(loader(first)) == [first]
    assert datasets_of([loader(first), loader(second)]) == [first, second]
    assert datasets_of({"x": loader(first), "y": iter([])}) == [first]
    assert datasets_of(None) == []


def test_the_common_folder_is_that_of_all_loaders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = PredictDataset(folder / "a"), PredictDataset(folder / "b")
    assert common_folder([first]) == folder / "a"
    assert common_folder([first, Subset(second, [0])]) == folder
    assert common_folder([SimpleNamespace()]) is common_folder([]) is None
    monkeypatch.chdir(folder)
    assert common_folder([SimpleNamespace(image_filenames=["a/0.png", "b/../b/0.png"])]) == folder


def test_images_left_out_return_and_do_not_move_the_common_folder(folder: Path) -> None:
    data = PredictDataset(folder)
    whole = list(data.image_filenames)
    leave_out(data, {str(folder / "a" / "0.png")})
    leave_out(data, {str(folder / "a" / "1.png")})
    assert data.image_filenames == [folder / "b" / "0.png"]
    assert len(data) == len(loader(data)) == 1
    assert common_folder([data]) == folder
    restore(data)
    assert data.image_filenames == whole
    restore(data)
    assert data.image_filenames == whole


def test_images_are_left_out_only_where_the_order_follows(folder: Path) -> None:
    data = PredictDataset(folder)
    assert shortenable([loader(data, batch_size=2), loader(data, num_workers=1)]) == [data, data]
    for arguments in ({"shuffle": True}, {"sampler": [2, 0]}, {"batch_sampler": [[0, 1], [2]]}, {"batch_size": None}):
        assert shortenable(loader(data, **arguments)) == []
    assert shortenable(loader(Subset(data, [0]))) == []
    assert shortenable(None) == []


def test_images_without_a_path_are_numbered_across_processes() -> None:
    names = []
    for rank in (0, 1):
        numbers = ImageNumbers(SimpleNamespace(global_rank=rank, world_size=2))
        names += numbers.names(ImageBatch(image=torch.zeros(2, 3, 8, 8)))
        names += numbers.names(ImageBatch(image=torch.zeros(2, 3, 8, 8), image_path=["a.png", "b.png"]))
        names += numbers.names(ImageBatch(image=torch.zeros(1, 3, 8, 8)))
    assert names == [
        *("image-000000", "image-000002", "a.png", "b.png", "image-000008"),
        *("image-000001", "image-000003", "a.png", "b.png", "image-000009"),
    ]


@pytest.mark.skipif(os.name == "nt", reason="links need rights")
def test_links_to_one_file_are_two_images(folder: Path) -> None:
    (folder / "c").mkdir()
    (folder / "c" / "0.png").symlink_to(folder / "a" / "0.png")
    assert common_folder([SimpleNamespace(image_filenames=[folder / "c" / "0.png"])]) == folder / "c"
