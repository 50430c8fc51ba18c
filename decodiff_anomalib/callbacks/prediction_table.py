"""The table of predictions, which grows as they are made."""

import csv
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from decodiff_anomalib.atomic_write import append, atomic_write
from decodiff_anomalib.callbacks.image_files import ImageFiles
from decodiff_anomalib.data.run_images import ImageNumbers, leave_out, put_back, restore, shortenable
from decodiff_anomalib.image_io import WHITE_LEVELS

if TYPE_CHECKING:
    from anomalib.data.predict import PredictDataset

logger = logging.getLogger(__name__)

FILE = "predictions.csv"
COLUMNS = ["path", "pred_score", "raw_score", "pred_label", "pred_category", "ood_score", "reason"]
SKIP, REFUSE = "skip", "refuse"


class PredictionTable(Callback):
    """Writes a row of a CSV file for each predicted image, as soon as its batch is done.

    The columns are ``path`` (or the number of an image that has none), ``pred_score``, ``raw_score`` (before
    normalisation), ``pred_label`` (1 is anomalous), ``pred_category``, ``ood_score``, and ``reason``: why a file could
    not be read, whose other columns are empty. What the model or its post-processor does not give is empty too. The
    callback belongs behind the post-processor, which is one too.

    Files that cannot be read are left out and listed. An interrupted prediction can go on: what the file lists is left
    out, a file that was repaired since too, until its row is deleted. Both hold for Anomalib's ``PredictDataset``
    (``--data FOLDER``) in its own order; all images of other loaders are predicted, and :class:`ImageFiles` refuses
    those that it knows and cannot read.

    Several processes append to the same file, a batch in one write, which file systems of one machine keep whole.

    Args:
        path: File to append to. By default ``predictions.csv`` in the trainer's root folder, begun anew; one that is
            there is kept as ``predictions-1.csv``.
        unreadable: ``skip`` leaves files out that cannot be read, ``refuse`` raises an error that names them.
        image_files: Reads the files.

    Raises:
        ValueError: If ``unreadable`` is another word.
    """

    def __init__(self, path: str | Path | None, unreadable: str, image_files: ImageFiles) -> None:
        if unreadable not in {SKIP, REFUSE}:
            msg = f"unreadable={unreadable!r} is unknown; valid: {SKIP}, {REFUSE}."
            raise ValueError(msg)
        self.path = path
        self.unreadable = unreadable
        self._image_files = image_files
        self._file: Path | None = None
        self._shortened: list[PredictDataset] = []
        self._too_bright: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin the file, and leave images out before loaders tell their length and worker processes start.

        Raises:
            OSError: If the file that was asked for cannot be written.
            ValueError: If it is another kind of file.
        """
        if stage != TrainerFn.PREDICTING:
            return
        self._is_first = trainer.is_global_zero
        self._numbers = ImageNumbers(trainer)
        self._file = Path(trainer.default_root_dir) / FILE if self.path is None else Path(self.path)
        if self._is_first:
            self._begin()
        trainer.strategy.barrier("predictions")
        # Lightning tells loaders later on, and those of a datamodule are made then; without any, none is shortened.
        source = getattr(getattr(trainer.predict_loop, "_data_source", None), "instance", None)
        self._shortened = shortenable(source)
        self._leave_out_listed()
        if self.unreadable == SKIP:
            paths = (str(path) for dataset in self._shortened for path in dataset.image_filenames)
            reasons = self._image_files.sort_out(paths)
            self._leave_out(reasons)
            self._list(reasons)
            self.leave_out_too_bright(getattr(pl_module, "white_level", None))

    def leave_out_too_bright(self, white_level: float | None) -> None:
        """Leave out images above a white level, without one above all that can be chosen.

        A checkpoint may bring another level after :meth:`setup`: these images are listed when the prediction starts.
        """
        if self.unreadable == SKIP:
            for dataset in self._shortened:
                put_back(dataset, self._too_bright)
            self._too_bright = self._image_files.too_bright(WHITE_LEVELS[-1] if white_level is None else white_level)
            self._leave_out(self._too_bright)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """List the images that are too bright."""
        del trainer, pl_module
        self._list_too_bright()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        *_: object,
        **__: object,
    ) -> None:
        """Append the rows of a batch."""
        del trainer, pl_module
        names = self._numbers.names(outputs)
        columns = [names, *(_column(getattr(outputs, name, None), len(names)) for name in COLUMNS[1:-1])]
        self._append([*row, ""] for row in zip(*columns, strict=True))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give datasets back as they came."""
        del pl_module
        if stage == TrainerFn.PREDICTING:
            self._list_too_bright()  # where no image is left, no prediction has started
            self._restore()
            if trainer.is_global_zero and self._file is not None:
                logger.info("Predictions: %s", self._file)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give datasets back as they came."""
        del trainer, pl_module, exception
        self._restore()

    # ---------------------------------------------------------------- images left out

    def _leave_out_listed(self) -> None:
        if self.path is None:
            return
        listed = {row[0] for row in _read(Path(self.path))[0] if row}
        for dataset in self._shortened:
            before = dataset.image_filenames
            known = {str(path) for path in before if _cell(path) in listed}
            leave_out(dataset, known)
            if known:
                logger.info("%s lists %d of %d images, which are left out.", self.path, len(known), len(before))

    def _leave_out(self, reasons: dict[str, str]) -> None:
        """Leave out the files with these paths."""
        if reasons:
            for dataset in self._shortened:
                leave_out(dataset, reasons)

    def _list_too_bright(self) -> None:
        self._list(self._too_bright)
        self._too_bright = {}

    def _list(self, reasons: dict[str, str]) -> None:
        """Write a row with the reason for each file that was left out."""
        if reasons and self._is_first:
            empty = [""] * (len(COLUMNS) - 2)
            self._append([path, *empty, reason.removeprefix(f"{path}: ")] for path, reason in reasons.items())
            logger.warning(
                "Files that cannot be read are left out: %d, such as %s%s",
                len(reasons),
                next(iter(reasons.values())),
                f"; {self._file} lists them." if self._file else ".",
            )

    def _restore(self) -> None:
        for dataset in self._shortened:
            restore(dataset)
        self._shortened, self._too_bright = [], {}

    # ---------------------------------------------------------------- the file

    def _begin(self) -> None:
        """Begin the file, or make one whole that a crash has left with half a row."""
        with self._tolerated():
            assert self._file is not None
            rows, is_whole = ([], False) if self.path is None else _read(self._file)
            if self.path is None and self._file.is_file() and self._file.stat().st_size > len(_encode([COLUMNS])):
                earlier = (self._file.with_stem(f"{self._file.stem}-{number}") for number in count(1))
                self._file.rename(next(path for path in earlier if not path.exists()))
            if not is_whole:
                with atomic_write(self._file) as staged:
                    staged.write_bytes(_encode([COLUMNS, *rows]))

    def _append(self, rows: Iterable[Sequence[object]]) -> None:
        with self._tolerated():
            if self._file is not None:
                append(self._file, _encode(rows))

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Predict without a table where its folder cannot be written to, unless the file was asked for."""
        try:
            yield
        except OSError as error:
            if self.path is not None:
                raise
            logger.warning(
                "The predictions are not written to %s: %s. predictions=FILE writes them elsewhere.", self._file, error
            )
            self._file = None


def _column(values: torch.Tensor | Sequence[str] | None, count: int) -> Sequence[str]:
    """The cells ``(count,)`` of one value for each image; nine digits tell any two 32-bit floats apart."""
    if values is None:
        return [""] * count
    return [f"{value:.9g}" for value in values.flatten().tolist()] if isinstance(values, torch.Tensor) else values


def _cell(value: object) -> str:
    """Text that UTF-8 can hold: names of files may be any bytes."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _encode(rows: Iterable[Sequence[object]]) -> bytes:
    text = StringIO(newline="")
    csv.writer(text).writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def _read(path: Path) -> tuple[list[list[str]], bool]:
    """The whole rows of a table, and whether they are all that it has, with a heading above and a line's end below.

    Raises:
        ValueError: If it is another file than a table of predictions.
    """
    if not path.exists():
        return [], False
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        text = file.read()
    try:
        columns, *rows = csv.reader(StringIO(text, newline="")) if text else [COLUMNS]
    except csv.Error:
        columns, rows = [], []
    if columns != COLUMNS and not _encode([COLUMNS]).decode().startswith(text):
        msg = (
            f"predictions='{path}' has the columns {', '.join(columns)[:100]}, not {', '.join(COLUMNS)}. Name a file "
            "that predictions were written to before, or a new one."
        )
        raise ValueError(msg)
    if rows and len(rows[-1]) < len(COLUMNS):  # the rest of it was never written
        return rows[:-1], False
    return rows, text.endswith("\n")
