"""Collecting what a report shows, batch by batch, and writing it at the end of a test or prediction."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from decodiff_anomalib.conditioning import DEFAULT_CATEGORY, UNKNOWN, category_names
from decodiff_anomalib.data.run_images import ImageNumbers
from decodiff_anomalib.post_processor import DeCoDiffPostProcessor
from decodiff_anomalib.report.records import SIDE, Image, ReportFolder, Run
from decodiff_anomalib.views import label_threshold, views

if TYPE_CHECKING:
    from decodiff_anomalib.evaluation.category_metrics import CategoryMetrics

logger = logging.getLogger(__name__)

PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_aupro")
STAGES = {TrainerFn.TESTING: "test", TrainerFn.PREDICTING: "prediction"}


def require_report() -> None:
    """Check that what a report is made with is installed.

    Raises:
        ModuleNotFoundError: If it is not; says what to install.
    """
    missing = [package for package in ("bokeh", "jinja2") if find_spec(package) is None]
    if missing:
        msg = f'A report needs {", ".join(missing)}: pip install "decodiff_anomalib[report]"'
        raise ModuleNotFoundError(msg, name=missing[0])


class ReportWriter(Callback):
    """Writes ``report.html`` at the end of a test or prediction, and before that the data it is made from.

    The data are in ``report`` in the run's folder, see :mod:`decodiff_anomalib.report.records`: each image has a line
    and a thumbnail as soon as it is done, so that memory does not grow with their number, and ``decodiff report RUN``
    makes the page of an interrupted run too. Earlier ones in the same folder are replaced. Metrics of pixels need up to
    11 MB for each category.

    The callback belongs behind the post-processor, which is one too. It serves any of Anomalib's models.

    Raises:
        ModuleNotFoundError: If the extra ``report`` is not installed.
    """

    def __init__(self) -> None:
        require_report()
        self._folder: ReportFolder | None = None
        self._metrics: dict[str, CategoryMetrics] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the data.

        Raises:
            OSError: If the run's folder cannot be written to.
        """
        self._folder = ReportFolder(Path(trainer.default_root_dir))
        self._numbers = ImageNumbers(trainer)
        names = () if trainer.datamodule is None else category_names(trainer.datamodule)
        self._lone_category = names[0] if len(names) == 1 else None
        from decodiff_anomalib.evaluation.category_metrics import CategoryMetrics  # imports SciPy

        is_test = trainer.state.fn == TrainerFn.TESTING
        self._metrics = {name: CategoryMetrics(name) for name in names} if is_test else {}
        data = filter(None, [getattr(trainer.datamodule, "name", None), self._lone_category])
        self._run = Run(
            title=f"{type(pl_module).__name__} {STAGES[trainer.state.fn]}",
            data=", ".join(dict.fromkeys(data)),
            created=datetime.now().astimezone().isoformat(timespec="seconds"),
            threshold=None,
        )
        if trainer.is_global_zero:
            self._folder.begin()
            self._folder.write_run(self._run)
        trainer.strategy.barrier("report")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: ImageBatch, *_: object, **__: object
    ) -> None:
        """Append the images of a batch."""
        self._append(outputs, trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        del pl_module
        pixels = {name: _finite(metrics.compute()) for name, metrics in self._metrics.items()}
        self._metrics = {}
        trainer.strategy.barrier("report")
        if not trainer.is_global_zero or self._folder is None:
            return
        from decodiff_anomalib.report.page import write_page

        with self._tolerated():
            known = {name: values for name, values in pixels.items() if values}
            self._folder.write_run(replace(self._run, pixel_metrics=known))
            logger.info("Report: %s", write_page(self._folder))

    on_predict_start, on_predict_batch_end, on_predict_end = on_test_start, on_test_batch_end, on_test_end

    # ---------------------------------------------------------------- images

    def _append(self, batch: ImageBatch, trainer: Trainer, pl_module: LightningModule) -> None:
        categories = self._categories(batch)
        for metrics in self._metrics.values():
            metrics.update(_with_categories(batch, categories))
        if self._folder is None:
            return
        with self._tolerated():
            if batch.pred_label is not None and self._run.threshold is None:
                self._run = replace(
                    self._run,
                    threshold=label_threshold(pl_module),
                    raw_thresholds=_raw_thresholds(pl_module),
                    promises=_promises(pl_module),
                )
                if trainer.is_global_zero:
                    self._folder.write_run(self._run)
            images = []
            for index, (number, name) in enumerate(self._numbers.numbered(batch)):
                shown = views(batch, index, (SIDE, SIDE), getattr(pl_module, "white_level", None))
                self._folder.write_thumbnail(number, shown.values())
                images.append(_image(batch, index, number, name, categories[index], tuple(shown)))
            self._folder.append(images)

    def _categories(self, batch: ImageBatch) -> Sequence[str]:
        """Category of each image: which the data give, else the inferred one."""
        given, inferred = (getattr(batch, field, None) for field in ("category", "pred_category"))
        if given is None and self._lone_category is not None:
            given = [self._lone_category] * len(batch)
        return given or inferred or [DEFAULT_CATEGORY] * len(batch)

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Test or predict to the end even if the report cannot be written."""
        try:
            yield
        except OSError as error:
            logger.warning(
                "The report is not written: %s. Make room; `decodiff report %s` makes it of the images so far.",
                error,
                self._folder and self._folder.path.parent,
            )
            self._folder = None


def _image(batch: ImageBatch, index: int, number: int, name: str, category: str, shown: tuple[str, ...]) -> Image:
    def element(field: str) -> Any:
        values = getattr(batch, field, None)
        return None if values is None else values[index].item() if isinstance(values, torch.Tensor) else values[index]

    label, score = element("gt_label"), element("pred_score")
    return Image(
        number=number,
        name=name,
        category=category,
        defective=None if label is None else bool(label),
        score=math.nan if score is None else score,
        raw_score=element("raw_score"),
        inferred=element("pred_category"),
        ood_score=element("ood_score"),
        views=shown,
    )


def _with_categories(batch: ImageBatch, categories: Sequence[str]) -> SimpleNamespace:
    """What :class:`CategoryMetrics` reads of a batch."""
    fields = ("pred_score", "pred_label", "gt_label", "anomaly_map", "gt_mask")
    return SimpleNamespace(category=categories, **{field: getattr(batch, field) for field in fields})


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of pixels that are defined."""
    return {name: metrics[name] for name in PIXEL_METRICS if math.isfinite(metrics[name])}


def _raw_thresholds(model: LightningModule) -> dict[str, float]:
    """Category to the raw score of its threshold, of models whose post-processor sets them by category."""
    post_processor = getattr(model, "post_processor", None)
    if not isinstance(post_processor, DeCoDiffPostProcessor):
        return {}
    *own, shared = post_processor.image_thresholds.tolist()
    known = {
        name: shared if math.isnan(value) else value for name, value in zip(post_processor.categories, own, strict=True)
    }
    return known | {UNKNOWN: shared}


def _promises(model: LightningModule) -> tuple[str, ...]:
    """What its thresholds promise, in words."""
    post_processor = getattr(model, "post_processor", None)
    return tuple(post_processor.describe().splitlines()) if isinstance(post_processor, DeCoDiffPostProcessor) else ()
