"""A small benchmark's data, configuration and finished runs, and images to distil a teacher from."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from decodiff_anomalib.benchmark.record import Run, write_record
from decodiff_anomalib.benchmark.report import VALUES
from decodiff_anomalib.evaluation import METRICS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two categories with empty image files, which nothing here reads."""
    for category in ("bolt", "felt"):
        for name in ("train/good/0", "test/good/0", "test/dent/0"):
            path = tmp_path / "data" / category / f"{name}.png"
            path.parent.mkdir(parents=True)
            path.touch()
    return tmp_path / "data"


@pytest.fixture
def layout(root: Path) -> Callable[..., dict]:
    """Configuration of a benchmark of the given models."""

    def make(*models: dict, seed: int | dict = 0) -> dict:
        data = {"class_path": "MultiCategory", "init_args": {"root": str(root)}}
        return {"seed": seed, "model": {"grid": list(models)}, "data": data}

    return make


@pytest.fixture
def finish(tmp_path: Path) -> Callable[..., None]:
    """Write the record and the metrics of a finished run below ``tmp_path``."""

    def write(run: Run, values: dict[str, float], seconds: float, note: str | None = None) -> None:
        costs = dict.fromkeys(VALUES[len(METRICS) :], 1.0)
        result = costs | {
            "device": "cpu",
            "note": note,
            "train_seconds": seconds,
            "normal_change": {},
            "correction_psnr": {},
        }
        write_record(run.folder(tmp_path), {"configuration": asdict(run), "result": result})
        rows = [{"category": category, **dict.fromkeys(METRICS, value)} for category, value in values.items()]
        rows.append({"category": "mean", **dict.fromkeys(METRICS, 0.123)})
        (run.folder(tmp_path) / "categories.json").write_text(json.dumps(rows))

    return write


@pytest.fixture(scope="session")
def write_images() -> Callable[..., Path]:
    """Write grey stripes of random directions and widths into a new folder."""

    def write(folder: Path, count: int, side: int = 64) -> Path:
        folder.mkdir(parents=True)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        for index in range(count):
            generator = torch.Generator().manual_seed(index)
            across, down, phase = torch.rand(3, generator=generator) - 0.5
            wave = (across * columns + down * rows + 6 * phase).sin()
            Image.fromarray((127.5 + 127.5 * wave).byte().numpy()).save(folder / f"{index}.png")
        return folder

    return write


@pytest.fixture(scope="session")
def photographs(write_images: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "photographs", 31)
