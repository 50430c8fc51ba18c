"""The child process of ``decodiff benchmark``: one model is trained, tested and measured.

``python -m decodiff_anomalib.benchmark.run FOLDER`` reads the configuration from ``FOLDER/run.json`` and adds the
result, or the error, to that file.
"""

import inspect
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anomalib.models
import numpy as np
import pandas as pd
import torch
from anomalib.data.utils import LabelName
from anomalib.engine import Engine
from anomalib.models import EfficientAd
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, RandomCrop, Resize, Transform

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.benchmark import costs
from decodiff_anomalib.benchmark.costs import GREY_VALUES
from decodiff_anomalib.benchmark.record import CATEGORY_METRICS, CURVES, MAPS, MODEL, RECORD, Run, write_record
from decodiff_anomalib.data import MultiCategory
from decodiff_anomalib.data.dataset import MultiCategoryDataset
from decodiff_anomalib.evaluation import CategoryReport
from decodiff_anomalib.lightning_model import DeCoDiff
from decodiff_anomalib.post_processor import DeCoDiffPostProcessor
from decodiff_anomalib.precision import computes_bfloat16

SHOWN_DEFECTIVE, SHOWN_NORMAL = 3, 1
"""Images of each category on the contact sheet."""


def main(folder: Path) -> None:
    """Execute the run that ``run.json`` in ``folder`` describes, and write its result or error there."""
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


def perform(run: Run, folder: Path, timing_seconds: float) -> dict[str, Any]:
    """Train, test and measure.

    Writes the metrics by category, the precision-recall curves, the maps of the contact sheet and the trained model
    into ``folder``.

    Args:
        run: The model, the data and the seed.
        folder: Folder of the run.
        timing_seconds: Duration of each timing.

    Returns:
        dict[str, Any]: ``note``, ``device`` and the costs: seconds of training, milliseconds for each image by batch
        size, peak memory and state in MB, number of parameters, and ``normal_change`` and ``correction_psnr`` by
        category.
    """
    seed_everything(run.seed, workers=True)
    datamodule = MultiCategory(**run.data, seed=run.seed)
    model = build_model(run)
    output = folder.parents[len(run.folder(Path()).parts) - 1]
    note = _equip(model, run, output / "teacher")
    with TemporaryDirectory(dir=folder) as work:
        engine = Engine(default_root_dir=work, accelerator=run.accelerator, **trainer_arguments(run))
        costs.reset_peak_memory()
        began = time.perf_counter()
        engine.fit(model, datamodule=datamodule)
        if "max_steps" in run.trainer:  # may end within an epoch; thresholds are set at the end of one
            engine.validate(model, datamodule=datamodule, verbose=False)
        train_seconds = time.perf_counter() - began
        engine.test(model, datamodule=datamodule)
        with atomic_write(folder / MODEL) as path:
            engine.trainer.save_checkpoint(path, weights_only=True)
        callbacks: list[Callback] = engine.trainer.callbacks
        (report,) = (callback for callback in callbacks if isinstance(callback, CategoryReport))
        _write_metrics(report, folder)
        device = engine.trainer.strategy.root_device
        memory = costs.peak_memory(device)
        _write_maps(engine, model, datamodule.test_data, folder)

    model.to(device).eval()
    images = costs.timed_images(datamodule.test_data).to(device)
    corrects = isinstance(model, DeCoDiff)
    return {
        "note": note,
        "device": costs.device_name(device),
        "train_seconds": train_seconds,
        **{f"ms_batch_{size}": costs.milliseconds_per_image(model, images, size, timing_seconds) for size in (1, 8)},
        "memory_mb": memory,
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "state_mb": sum(value.nbytes for value in model.state_dict().values() if torch.is_tensor(value)) / 1e6,
        "normal_change": costs.change_on_normal_images(model, datamodule.test_data) if corrects else {},
        "correction_psnr": costs.correction_psnr(model, datamodule.test_data) if corrects else {},
    }


def build_model(run: Run) -> AnomalibModule:
    """The model under the protocol that all models share.

    It gets whole images of ``image_size``, scaled as it needs them, and sets its thresholds by category on held-out
    normal images. The benchmark computes the metrics and draws the pictures itself.
    """
    model_class = getattr(anomalib.models, run.class_path)
    known = inspect.signature(model_class.__init__).parameters
    shared = {name: getattr(run, name) for name in ("seed", "image_size") if name in known}
    parts = {"post_processor": DeCoDiffPostProcessor(), "evaluator": False, "visualizer": False}
    of_class = not inspect.isfunction(inspect.getattr_static(model_class, "configure_pre_processor"))
    if of_class and "image_size" not in known:
        # Some models choose the size of their layers by the size that their pre-processor resizes to.
        parts["pre_processor"] = whole_images(model_class.configure_pre_processor(), run.image_size)
    model: AnomalibModule = model_class(**shared | run.init_args | parts)
    if not isinstance(model.pre_processor, PreProcessor):
        msg = f"{run.class_path} has no pre_processor to resize images with. Leave pre_processor=True."
        raise TypeError(msg)
    model.pre_processor = whole_images(model.pre_processor, run.image_size)
    if run.backbone_weights:
        from decodiff_anomalib.benchmark.baselines import load_backbone_weights

        load_backbone_weights(model, run.backbone_weights)
    return model


def whole_images(pre_processor: PreProcessor, image_size: int) -> PreProcessor:
    """A pre-processor that resizes to ``image_size`` without cropping, followed by the other steps of the given one."""

    def steps(transform: Transform | None) -> list[Transform]:
        if isinstance(transform, Compose):
            return [step for part in transform.transforms for step in steps(part)]
        return [] if transform is None or isinstance(transform, Resize | CenterCrop | RandomCrop) else [transform]

    resize = Resize((image_size, image_size), antialias=True)
    return PreProcessor(Compose([resize, *steps(pre_processor.transform)]))


def _equip(model: AnomalibModule, run: Run, folder: Path) -> str | None:
    """Give EfficientAd its teacher.

    Args:
        model: Any model; others are left as they are.
        run: Without photographs, the model downloads what it needs itself.
        folder: For a teacher that all runs share.

    Returns:
        str | None: Note for the tables if the teacher is not the published one.
    """
    if not isinstance(model, EfficientAd) or run.photographs is None:
        return None
    from decodiff_anomalib.benchmark.baselines import equip_efficient_ad

    source = equip_efficient_ad(model, Path(run.photographs), None, folder)
    seed_everything(run.seed, workers=True)  # the same results, whether the teacher was distilled now or before
    return f"{source} teacher" if source != "published" else None


def trainer_arguments(run: Run) -> dict[str, Any]:
    """Arguments of the run's Lightning trainer besides its folder and accelerator.

    ``precision: auto`` becomes ``bf16-mixed`` if the accelerator's device computes bfloat16 natively, else ``32-true``.
    """
    arguments = {"devices": 1, "logger": False, "enable_progress_bar": False} | run.trainer
    if arguments.get("precision") == "auto":
        # Lightning's own choice of the device, which only a trainer tells
        trainer = Trainer(
            accelerator=run.accelerator, devices=arguments["devices"], logger=False, enable_checkpointing=False
        )
        arguments["precision"] = "bf16-mixed" if computes_bfloat16(trainer.strategy.root_device) else "32-true"
    return arguments


def _write_metrics(report: CategoryReport, folder: Path) -> None:
    with atomic_write(folder / CATEGORY_METRICS) as path:
        assert report.table is not None
        report.table.reset_index().to_json(path, orient="records", double_precision=15)
    curves = {name: [values.tolist() for values in curve] for name, curve in report.curves.items()}
    with atomic_write(folder / CURVES) as path:
        path.write_text(json.dumps(curves))


def shown_samples(samples: pd.DataFrame) -> list[int]:
    """Rows of the test images on the contact sheet: some of each category, with as many kinds of defect as possible.

    The choice depends neither on the model nor on the other categories.

    Args:
        samples: Of a :class:`~decodiff_anomalib.data.dataset.MultiCategoryDataset`.
    """
    chosen: list[int] = []
    for _, rows in samples.groupby("category", sort=False):
        drawn = rows.sample(frac=1, random_state=0)
        defective, normal = (drawn[drawn.label_index == label] for label in (LabelName.ABNORMAL, LabelName.NORMAL))
        turns = defective.groupby("label").cumcount().sort_values(kind="stable").index
        chosen += [*turns[:SHOWN_DEFECTIVE], *normal.index[:SHOWN_NORMAL]]
    return chosen


def _write_maps(engine: Engine, model: AnomalibModule, data: MultiCategoryDataset, folder: Path) -> None:
    """Write the model's maps, and corrections if it has them, of the images on the contact sheet."""
    shown = data.subsample(shown_samples(data.samples))
    loader = DataLoader(shown, batch_size=1, collate_fn=shown.collate_fn)
    batches: list[Any] = engine.predict(model, dataloaders=loader) or []
    # EfficientAd's maps reach below 0, and there the post-processor's scale has no floor.
    maps = [batch.anomaly_map.flatten(0, -2).nan_to_num(0).clamp(0, 1).half().cpu().numpy() for batch in batches]
    kept = {
        "maps": np.stack(maps),
        **{name: shown.samples[name].to_numpy(str) for name in ("category", "image_path", "mask_path")},
    }
    if isinstance(model, DeCoDiff):
        corrections = torch.cat([batch.correction for batch in batches]).float().cpu()
        kept["corrections"] = (GREY_VALUES * corrections.clamp(0, 1)).byte().movedim(1, -1).numpy()
    with atomic_write(folder / MAPS) as path:
        np.savez_compressed(path, **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
