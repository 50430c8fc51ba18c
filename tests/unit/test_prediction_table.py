"""The table of predictions: a row for each image at once, whatever happens, with a model that only counts."""

import csv
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from decodiff_anomalib.callbacks import ImageFiles, PredictionTable
from decodiff_anomalib.callbacks.prediction_table import COLUMNS


class Counting(LightningModule):
    """Scores images by their place; may stop before one."""

    white_level = None

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.stop = stop
        self.seen = 0

    def predict_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> ImageBatch:
        if batch_idx == self.stop:
            msg = "stopped"
            raise RuntimeError(msg)
        first, self.seen = self.seen, self.seen + len(batch)
        batch.pred_score = torch.arange(first, self.seen) / 10
        batch.pred_category = ["part, left"] * len(batch)
        return batch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and a broken file between them."""
    (tmp_path / "data").mkdir()
    for name in ("0", "2", "3"):
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / f"{name}.png")
    (tmp_path / "data" / "1.png").write_text("no image")
    return tmp_path / "data"


@pytest.fixture
def predict(tmp_path: Path) -> Callable[..., list[ImageBatch]]:
    def run(
        data: Path | Dataset, file: Path | None = None, unreadable: str = "skip", stop: int | None = None, **arguments
    ) -> list[ImageBatch]:
        dataset = PredictDataset(data) if isinstance(data, Path) else data
        files = ImageFiles()
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path / "run",
            callbacks=[files, PredictionTable(file, unreadable, files)],
        )
        return trainer.predict(Counting(stop), DataLoader(dataset, collate_fn=ImageBatch.collate, **arguments)) or []

    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def names(path: Path) -> list[str]:
    return [Path(row["path"]).name for row in rows(path)]


@pytest.mark.parametrize("workers", [0, 1])
def test_each_image_has_a_row_and_each_broken_file_its_reason(
    folder: Path, predict, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = PredictDataset(folder)
    batches = predict(dataset, num_workers=workers, batch_size=2)
    assert [len(batch) for batch in batches] == [2, 1]
    broken, *others = rows(tmp_path / "run" / "predictions.csv")
    empty = dict.fromkeys(COLUMNS, "")
    assert broken == empty | {"path": str(folder / "1.png"), "reason": "is in no format that Pillow reads"}
    assert others == [
        empty | {"path": str(folder / f"{name}.png"), "pred_score": score, "pred_category": "part, left"}
        for name, score in (("0", "0"), ("2", "0.100000001"), ("3", "0.200000003"))
    ]
    assert "left out: 1, such as" in caplog.text
    assert len(dataset) == 4, "the dataset is given back as it came"


def test_values_are_those_after_the_post_processor() -> None:
    table = PredictionTable(None, "skip", ImageFiles())
    table._numbers = type("Numbers", (), {"names": lambda self, batch: ["a", "b"]})()
    written: list[list[str]] = []
    table._append = written.extend
    batch = ImageBatch(image=torch.zeros(2, 3, 8, 8))
    batch.pred_score, batch.raw_score = torch.tensor([[0.25], [0.75]]), torch.tensor([1.0, float("nan")])
    batch.pred_label, batch.ood_score = torch.tensor([False, True]), torch.tensor([0.5, 2.0], dtype=torch.bfloat16)
    table.on_predict_batch_end(None, None, batch, batch, 0)
    assert written == [["a", "0.25", "1", "0", "", "0.5", ""], ["b", "0.75", "nan", "1", "", "2", ""]]


def test_rows_are_written_after_each_batch_and_a_prediction_goes_on(folder: Path, predict, tmp_path: Path) -> None:
    file = tmp_path / "new" / "table.csv"
    with pytest.raises(RuntimeError, match="stopped"):
        predict(folder, file, stop=1)
    assert names(file) == ["1.png", "0.png"]
    with file.open("ab") as opened:
        opened.write(f'"{folder}/2.p'.encode())  # half a row, as a crash leaves it
    assert [len(batch) for batch in predict(folder, file)] == [1, 1]
    assert names(file) == ["1.png", "0.png", "2.png", "3.png"]
    assert predict(folder, file) == []
    assert names(file) == ["1.png", "0.png", "2.png", "3.png"]


def test_a_file_goes_on_with_other_folders(folder: Path, predict, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "other" / "0.png")
    file = tmp_path / "table.csv"
    file.touch()
    predict(folder, file)
    file.write_bytes(file.read_bytes().rstrip())  # as an editor may leave it
    predict(tmp_path / "other", file)
    assert names(file) == ["1.png", "0.png", "2.png", "3.png", "0.png"]


def test_the_default_file_is_new_and_an_earlier_one_kept(folder: Path, predict, tmp_path: Path) -> None:
    for _ in range(3):
        predict(folder)
    found = sorted((tmp_path / "run").glob("*.csv"))
    assert [path.name for path in found] == ["predictions-1.csv", "predictions-2.csv", "predictions.csv"]
    assert [names(path) for path in found] == [["1.png", "0.png", "2.png", "3.png"]] * 3


def test_broken_files_can_be_refused(folder: Path, predict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 4 image files cannot be read:\n.*1\.png"):
        predict(folder, unreadable="refuse")
    with pytest.raises(ValueError, match="unreadable='ignore' is unknown; valid: skip, refuse"):
        PredictionTable(None, "ignore", ImageFiles())


def test_broken_files_are_refused_where_the_order_is_the_users(folder: Path, predict) -> None:
    with pytest.raises(ValueError, match="1 of 4 image files cannot be read"):
        predict(folder, sampler=[3, 0])


def test_nothing_to_predict_is_no_error(tmp_path: Path, predict) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_text("no image")
    assert predict(tmp_path / "data") == []
    assert names(tmp_path / "run" / "predictions.csv") == ["0.png"]


class Frames(Dataset):
    """Images in memory, without a path."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> ImageItem:
        return ImageItem(image=torch.zeros(3, 8, 8))


def test_images_without_a_path_have_their_number(predict, tmp_path: Path) -> None:
    predict(Frames(), batch_size=2)
    assert names(tmp_path / "run" / "predictions.csv") == ["image-000000", "image-000001", "image-000002"]


def test_names_of_any_bytes_are_found_again(predict, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    odd = ["a,b.png", 'say "x".png', "new\nline.png", "return\r.png", "größe.png", "\udcff.png"]
    for name in odd:
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name)
    file = tmp_path / "table.csv"
    assert len(predict(tmp_path / "data", file)) == len(odd)
    assert set(names(file)) == {*odd[:-1], "\\udcff.png"}
    assert predict(tmp_path / "data", file) == []


@pytest.mark.parametrize("content", [b"path,score\n1,2\n", b"hello", b"\x89PNG\x00\xff\x00", b"path"])
def test_other_files_are_not_appended_to(folder: Path, predict, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "other.csv"
    file.write_bytes(content)
    if content == b"path":  # the beginning of our own heading, as a crash may leave it
        predict(folder, file)
        assert len(rows(file)) == 4
        return
    with pytest.raises(ValueError, match="Name a file that predictions were written to before, or a new one"):
        predict(folder, file)
    assert file.read_bytes() == content


def test_a_folder_that_cannot_be_written_to_ends_only_the_table(
    folder: Path, predict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert len(predict(folder)) == 3
    assert "predictions=FILE writes them elsewhere" in caplog.text
    with pytest.raises(OSError, match="run"):
        predict(folder, tmp_path / "run" / "table.csv")
