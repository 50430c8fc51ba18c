"""One run of ``decodiff benchmark``: a model is trained, tested and measured, in a process of its own.

``python -m decodiff_anomalib.benchmark_run FOLDER`` reads what to do from ``FOLDER/run.json`` and writes there what
came of it.
"""

import inspect
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data.utils import LabelName
from anomalib.engine import Engine
from anomalib.models import EfficientAd
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, RandomCrop, Resize, Transform

from decodiff_anomalib.data import MultiCategory
from decodiff_anomalib.data.multi_category import MultiCategoryDataset
from decodiff_anomalib.evaluation import CategoryReport
from decodiff_anomalib.lightning_model import DeCoDiff
from decodiff_anomalib.post_processor import DeCoDiffPostProcessor

RECORD, LOG, MAPS, CURVES, FIGURES_OF_CATEGORIES = "run.json", "log.txt", "maps.npz", "curves.json", "categories.json"

SHOWN_DEFECTIVE, SHOWN_NORMAL = 3, 1
TIMED_IMAGES, WARM_UP, MIN_REPEATS = 16, 2, 5
NORMALS_OF_CATEGORY = 16
LEVELS = 255


@dataclass(frozen=True)
class Run:
    """What is trained and tested, and how: plain data, by which a finished run is recognised.

    Attributes:
        model: Name it is shown by.
        class_path: Anomalib's name of it.
        mode: ``multi``, one model of all categories, or ``single``.
        seed: Of the data's splits and order, and of all else that is random.
        image_size: Side that whole images are resized to, in pixels.
        accelerator: As Lightning's.
        data: Arguments of :class:`~decodiff_anomalib.data.MultiCategory`.
        init_args: Arguments of the model.
        trainer: Arguments of Lightning's trainer.
        backbone_weights: See :func:`decodiff_anomalib.rivals.load_backbone_weights`; ``None`` for the model's own.
        photographs: See :func:`decodiff_anomalib.rivals.equip_efficient_ad`; of that model only.
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

    @property
    def categories(self) -> list[str]:
        """Names of the categories it is trained and tested on."""
        return self.data["categories"]

    @property
    def title(self) -> str:
        """Model, what of, and seed, in one line."""
        of = "multi" if self.mode == "multi" else f"single {self.categories[0]}"
        return f"{self.model} · {of} · seed {self.seed}"

    def folder(self, output: Path) -> Path:
        """Where it is kept."""
        of = ("multi",) if self.mode == "multi" else ("single", self.categories[0])
        return output.joinpath("runs", file_name(self.model), *of, f"seed{self.seed}")

    def read(self, output: Path) -> dict[str, Any]:
        """Its record, with a ``result`` or an ``error`` if it ended, or nothing if none has its settings."""
        path = self.folder(output) / RECORD
        record = json.loads(path.read_text()) if path.is_file() else {}
        return record if record.get("configuration") == asdict(self) else {}


def file_name(name: str) -> str:
    """A name with what no file system minds."""
    return re.sub(r"[^\w.=,+-]+", "-", name)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` once it is whole: nobody reads or keeps half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write ``run.json``."""
    with replacing(folder / RECORD) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")


# ---------------------------------------------------------------- the model


def build_model(run: Run) -> AnomalibModule:
    """The model under the protocol that all share.

    It sees whole images of ``image_size``, scaled as it wants them, and sets its thresholds on held-out normal images
    by category. Figures and pictures are the benchmark's.
    """
    import anomalib.models

    model_class = getattr(anomalib.models, run.class_path)
    known = inspect.signature(model_class.__init__).parameters
    shared = {name: getattr(run, name) for name in ("seed", "image_size") if name in known}
    parts = {"post_processor": DeCoDiffPostProcessor(), "evaluator": False, "visualizer": False}
    if not inspect.isfunction(inspect.getattr_static(model_class, "configure_pre_processor")):
        # Some models build themselves to the size that their pre-processor says.
        parts["pre_processor"] = whole_images(model_class.configure_pre_processor(), run.image_size)
    model: AnomalibModule = model_class(**shared | run.init_args | parts)
    model.pre_processor = whole_images(model.pre_processor, run.image_size)
    if run.backbone_weights:
        from decodiff_anomalib.rivals import load_backbone_weights

        load_backbone_weights(model, run.backbone_weights)
    return model


def whole_images(pre_processor: PreProcessor, image_size: int) -> PreProcessor:
    """A pre-processor that resizes to ``image_size`` and cuts nothing off; what else it did, it does."""

    def steps(transform: Transform | None) -> list[Transform]:
        if isinstance(transform, Compose):
            return [step for part in transform.transforms for step in steps(part)]
        return [] if transform is None or isinstance(transform, Resize | CenterCrop | RandomCrop) else [transform]

    resize = Resize((image_size, image_size), antialias=True)
    return PreProcessor(Compose([resize, *steps(pre_processor.transform)]))


def _equip(model: AnomalibModule, run: Run, folder: Path) -> str | None:
    """Give EfficientAd its teacher; says what is to be known about it.

    Args:
        model: Of any kind.
        run: With photographs, or the model fetches what it needs itself.
        folder: For a teacher, shared by all runs.
    """
    if not isinstance(model, EfficientAd) or run.photographs is None:
        return None
    from decodiff_anomalib.rivals import equip_efficient_ad

    kind = equip_efficient_ad(model, Path(run.photographs), None, folder)
    seed_everything(run.seed, workers=True)  # a teacher made now must not lead to other results than one made before
    return f"{kind} teacher" if kind != "published" else None


# ---------------------------------------------------------------- the run


def perform(run: Run, folder: Path, timing_seconds: float) -> dict[str, Any]:
    """Train, test and measure.

    Writes the figures by category, the precision-recall curves and the maps of the contact sheet into ``folder``.

    Args:
        run: What to do.
        folder: Of the run.
        timing_seconds: How long each timing goes on.

    Returns:
        dict[str, Any]: ``note``, ``device`` and the costs: seconds of training, milliseconds an image by batch size,
        peak memory and state in MB, number of parameters, and ``normal_change`` by category.
    """
    seed_everything(run.seed, workers=True)
    datamodule = MultiCategory(**run.data, seed=run.seed)
    model = build_model(run)
    teachers = next(parent.parent for parent in folder.parents if parent.name == "runs") / "teacher"
    note = _equip(model, run, teachers)
    with TemporaryDirectory(dir=folder) as work:
        engine = Engine(
            default_root_dir=work,
            accelerator=run.accelerator,
            **{"devices": 1, "logger": False, "enable_progress_bar": False} | run.trainer,
        )
        _forget_peak_memory()
        began = time.perf_counter()
        engine.fit(model, datamodule=datamodule)
        if "max_steps" in run.trainer:  # may end within an epoch; thresholds are of the end of one
            engine.validate(model, datamodule=datamodule, verbose=False)
        train_seconds = time.perf_counter() - began
        engine.test(model, datamodule=datamodule)
        (report,) = (callback for callback in engine.trainer.callbacks if isinstance(callback, CategoryReport))
        report.table.reset_index().to_json(folder / FIGURES_OF_CATEGORIES, orient="records", double_precision=15)
        curves = {name: [values.tolist() for values in curve] for name, curve in report.curves.items()}
        (folder / CURVES).write_text(json.dumps(curves))
        memory = _peak_memory(device := engine.trainer.strategy.root_device)
        _keep_maps(engine, model, datamodule.test_data, folder)

    model.to(device).eval()
    images = _test_images(datamodule.test_data).to(device)
    change = _change_on_normals(model, datamodule.test_data) if isinstance(model, DeCoDiff) else {}
    return {
        "note": note,
        "device": _device_name(device),
        "train_seconds": train_seconds,
        **{f"ms_batch_{size}": _milliseconds(model, images, size, timing_seconds) for size in (1, 8)},
        "memory_mb": memory,
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "state_mb": sum(value.nbytes for value in model.state_dict().values() if torch.is_tensor(value)) / 1e6,
        "normal_change": change,
    }


def shown_samples(samples: pd.DataFrame) -> list[int]:
    """Which test images the contact sheet shows: some of each category, of as many defects as can be.

    The images do not depend on the model, nor on which other categories there are.

    Args:
        samples: Of a :class:`~decodiff_anomalib.data.multi_category.MultiCategoryDataset`.
    """
    chosen = []
    for _, of_category in samples.groupby("category", sort=False):
        drawn = of_category.sample(frac=1, random_state=0)
        defective, normal = (drawn[drawn.label_index == label] for label in (LabelName.ABNORMAL, LabelName.NORMAL))
        turns = defective.groupby("label").cumcount().sort_values(kind="stable").index
        chosen += [*turns[:SHOWN_DEFECTIVE], *normal.index[:SHOWN_NORMAL]]
    return chosen


def _keep_maps(engine: Engine, model: AnomalibModule, data: MultiCategoryDataset, folder: Path) -> None:
    """Write what the model makes of the images that are shown."""
    shown = data.subsample(shown_samples(data.samples))
    batches = engine.predict(model, dataloaders=DataLoader(shown, batch_size=1, collate_fn=shown.collate_fn))
    # EfficientAd's maps reach below 0, and there the post-processor's scale has no floor.
    maps = [batch.anomaly_map.flatten(0, -2).nan_to_num(0).clamp(0, 1).half().cpu().numpy() for batch in batches]
    kept = {
        "maps": np.stack(maps),
        **{name: shown.samples[name].to_numpy(str) for name in ("category", "image_path", "mask_path")},
    }
    if isinstance(model, DeCoDiff):
        corrections = torch.cat([batch.correction for batch in batches]).float().cpu()
        kept["corrections"] = (LEVELS * corrections.clamp(0, 1)).byte().movedim(1, -1).numpy()
    np.savez_compressed(folder / MAPS, **kept)


# ---------------------------------------------------------------- costs


def _test_images(data: MultiCategoryDataset) -> torch.Tensor:
    """Images from the whole of the test data, ``(N, 3, H, W)`` in [0, 1], of the working size."""
    rows = np.linspace(0, len(data) - 1, TIMED_IMAGES).astype(int)
    return torch.stack([data[row].image for row in rows])


def _milliseconds(model: AnomalibModule, images: torch.Tensor, batch_size: int, seconds: float) -> float:
    """Median milliseconds an image: pre-processing, model and post-processing.

    Args:
        model: In evaluation mode.
        images: ``(N, 3, H, W)`` in [0, 1].
        batch_size: A divisor of ``N``.
        seconds: Repeats take so long, altogether.
    """
    batches, times = cycle(images.split(batch_size)), []
    with torch.inference_mode():
        for batch in islice(batches, WARM_UP):
            model(batch)
        while sum(times) < seconds or len(times) < MIN_REPEATS:
            _synchronise(images.device)
            began = time.perf_counter()
            model(next(batches))
            _synchronise(images.device)
            times.append(time.perf_counter() - began)
    return 1000 * median(times) / batch_size


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def _change_on_normals(model: DeCoDiff, data: MultiCategoryDataset) -> dict[str, float]:
    """Mean absolute difference of corrections and reconstructions of normal images, by category, in grey levels."""
    change = {}
    normal = data.samples[data.samples.label_index == LabelName.NORMAL]
    for category, rows in normal.groupby("category", sort=False):
        sums = []
        for row in rows.index[:NORMALS_OF_CATEGORY]:
            seen = model.model(model.pre_processor.transform(data[row].image[None].to(model.device)))
            sums.append((seen.correction - seen.reconstruction).abs().mean() / 2 * LEVELS)
        change[category] = float(torch.stack(sums).mean())
    return change


PROCESS = Path("/proc/self")


def _forget_peak_memory() -> None:
    """Begin anew, so that a teacher which is made before training does not count."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # only Linux has it
        (PROCESS / "clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> float:
    """Peak memory in MB: of the accelerator, else of this process without loader processes; NaN if unknown.

    Not ``ru_maxrss``, which on Linux starts at what the process that started this one had.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())[1]) * 1024 / 1e6
    return float("nan")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def main(folder: Path) -> None:
    """Do what ``run.json`` asks for, and record there what came of it."""
    record = json.loads((folder / RECORD).read_text())
    run = Run(**record["configuration"])
    try:
        record["result"] = perform(run, folder, record["timing_seconds"])
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
        if run.class_path == EfficientAd.__name__ and run.photographs is None:
            record["error"] += " Without a network, --photographs FOLDER makes the teacher from photographs."
        raise  # into the log
    finally:
        write_record(folder, record)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
