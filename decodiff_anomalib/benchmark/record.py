"""One run of a benchmark as plain data: what is trained and tested, its folder, and the record of its result."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.folder_names import check_folder_name

RECORD, LOG, MODEL, MAPS = "run.json", "log.txt", "model.ckpt", "maps.npz"
CURVES, CATEGORY_METRICS = "curves.json", "categories.json"
"""Files in the folder of a run."""


@dataclass(frozen=True)
class Run:
    """One model, trained and tested on some categories with one seed. A finished run is recognised by these values.

    Attributes:
        model: Name in tables and pictures.
        class_path: Name of the model's class in ``anomalib.models``.
        mode: ``multi``, one model of all categories, or ``single``, a model of one category.
        seed: Of the data's splits and order, and of every other random number.
        image_size: Side in pixels that whole images are resized to.
        accelerator: As in Lightning's trainer.
        data: Arguments of :class:`~decodiff_anomalib.data.MultiCategory`.
        init_args: Arguments of the model.
        trainer: Arguments of Lightning's trainer; ``precision`` may also be ``auto``, see
            :func:`decodiff_anomalib.benchmark.run.trainer_arguments`.
        backbone_weights: See :func:`decodiff_anomalib.benchmark.baselines.load_backbone_weights`; ``None`` keeps the
            weights that the model built itself with.
        photographs: See :func:`decodiff_anomalib.benchmark.baselines.equip_efficient_ad`; only for that model.

    Raises:
        ValueError: If the name of the model or of a category cannot be that of a folder.
    """

    model: str
    class_path: str
    mode: str
    seed: int
    image_size: int
    accelerator: str
    data: dict[str, Any]
    init_args: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    backbone_weights: str | None = None
    photographs: str | None = None

    def __post_init__(self) -> None:
        check_folder_name(file_name(self.model), "model")  # of which the folder is named, and may be cleared
        for category in self.categories:
            check_folder_name(category, "category")

    @property
    def categories(self) -> list[str]:
        """Names of the categories it is trained and tested on."""
        return self.data["categories"]

    @property
    def title(self) -> str:
        """Model, mode, category and seed in one line."""
        scope = "multi" if self.mode == "multi" else f"single {self.categories[0]}"
        return f"{self.model} · {scope} · seed {self.seed}"

    def folder(self, output: Path) -> Path:
        """Its folder below the benchmark's folder ``output``."""
        scope = ("multi",) if self.mode == "multi" else ("single", self.categories[0])
        return output.joinpath("runs", file_name(self.model), *scope, f"seed{self.seed}")

    def read(self, output: Path) -> dict[str, Any]:
        """Its record, with a ``result`` or an ``error`` once it has ended; empty if there is none of these settings.

        Raises:
            ValueError: If it is damaged.
        """
        path = self.folder(output) / RECORD
        with reading(path):
            record = json.loads(path.read_text()) if path.is_file() else {}
            is_own = record.get("configuration") == asdict(self)
            record.get("result", {}).get("note")  # both are dictionaries
        return record if is_own else {}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Read a file of a finished run; what is wrong with it becomes an error that names it.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        yield
    except (AttributeError, BadZipFile, EOFError, LookupError, TypeError, ValueError) as error:
        msg = f"{path} is damaged ({type(error).__name__}: {error}). Remove its folder to repeat the run."
        raise ValueError(msg) from error


def file_name(name: str) -> str:
    """``name`` without the characters that some file systems refuse."""
    return re.sub(r"[^\w.=,+-]+", "-", name)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of the run in ``folder``."""
    with atomic_write(folder / RECORD) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
