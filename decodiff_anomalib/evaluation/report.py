"""Table of the metrics of each category, computed, logged, saved and printed at the end of a test."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.evaluation.category_metrics import CategoryMetrics
from decodiff_anomalib.evaluation.metrics import CATEGORY_RATES, COUNTS, METRICS, RATES

if TYPE_CHECKING:
    import numpy as np

LOWER_IS_BETTER = ("false_alarm_rate", "unknown_rate")
HEADINGS: dict[str, tuple[str, ...]] = {
    "normal": ("images", "normal"),
    "defective": ("images", "defective"),
    **{name: tuple(name.split("_")) for name in METRICS},
    "false_alarm_rate": ("alarms", "normal"),
    "detection_rate": ("alarms", "defective"),
    "category_accuracy": ("category", "right"),
    "unknown_rate": ("category", "unknown"),
}
"""Column of the table to the two lines of its printed heading."""


def category_table(metrics: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Put the metrics of several categories into one table.

    Args:
        metrics: Category to the result of :meth:`CategoryMetrics.compute`.

    Returns:
        pd.DataFrame: A row for each category with images, then their ``mean`` and ``worst``, which ignore NaN. The
        columns :data:`CATEGORY_RATES` exist only if the model predicted categories.
    """
    table = pd.DataFrame.from_dict(metrics, orient="index")
    table = table[table.normal + table.defective > 0]
    table = table.drop(columns=[name for name in CATEGORY_RATES if table[name].isna().all()])
    rates = table.drop(columns=list(COUNTS))
    worst = rates.min().where(~rates.columns.isin(LOWER_IS_BETTER), rates.max())
    # With dtype object, counts stay integers although the mean and the worst row have none.
    table = pd.concat(
        [table.astype(dict.fromkeys(COUNTS, object)), pd.DataFrame({"mean": rates.mean(), "worst": worst}).T]
    )
    return table.rename_axis("category")


class CategoryReport(Callback):
    """Reports the metrics of each category, their mean and the worst at the end of a test of any Anomalib model.

    ``MultiCategory`` attaches it to every test. The metrics follow Anomalib's protocol, with the model's own score of
    each image. The table is printed last and written to ``categories.csv`` and ``categories.json`` in the trainer's
    root folder. The trainer's loggers receive ``CATEGORY/METRIC``; ``mean/METRIC`` and ``worst/METRIC`` are logged by
    the model, so that ``Engine.test`` returns them and ``anomalib benchmark`` has them as columns.

    Batches without categories or labels are ignored; without any others, there is no report. If several processes share
    a test, Lightning repeats a few images so that all have equally many, and these count each time.

    Args:
        categories: Names of all categories that may occur, the same in every process.

    Attributes:
        table: Result of :func:`category_table` for the last test; ``None`` before.
        curves: Category to the result of :meth:`CategoryMetrics.precision_recall` for the last test.
    """

    def __init__(self, categories: Sequence[str]) -> None:
        self.categories = tuple(categories)
        self.table: pd.DataFrame | None = None
        self.curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._metrics: dict[str, CategoryMetrics] = {}

    @classmethod
    def attach(cls, trainer: Trainer, categories: Sequence[str]) -> None:
        """Add a report to a trainer, in place of any it has.

        It comes last: a model's post-processor is a callback too, and the report needs its results.
        """
        callbacks: list[Callback] = trainer.callbacks
        others = [callback for callback in callbacks if not isinstance(callback, cls)]
        trainer.callbacks = [*others, cls(categories)]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the results of the last test."""
        del trainer, pl_module
        self.table, self.curves = None, {}
        self._metrics = {category: CategoryMetrics(category) for category in self.categories}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch after its post-processing."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        for metrics in self._metrics.values():
            metrics.update(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the table and log it."""
        if trainer.world_size > 1:  # processes exchange tensors on their own device
            for metrics in self._metrics.values():
                metrics.to(pl_module.device)
        table = category_table({category: metrics.compute() for category, metrics in self._metrics.items()})
        self.curves = {category: metrics.precision_recall() for category, metrics in self._metrics.items()}
        self._metrics = {}
        categories, summaries = table[:-2], table[-2:]
        if categories.empty:
            return
        self.table = table
        # The names do not depend on the model, because the benchmark joins models by their columns. Not `self.log`,
        # which Lightning gave only to the callbacks it found before this one was attached.
        for summary, row in summaries.iterrows():
            for name in (*METRICS, *RATES):
                pl_module.log(f"{summary}/{name}", float(row[name]), sync_dist=True)
        named = {
            f"{row}/{name}": value for row, values in categories.iterrows() for name, value in values.dropna().items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the table and print it, after Lightning has printed its own."""
        del pl_module
        if stage != "test" or self.table is None or not trainer.is_global_zero:
            return
        path, saved = Path(trainer.default_root_dir) / "categories.csv", ""
        records = path.with_suffix(".json")
        try:
            with atomic_write(path) as staged:
                self.table.to_csv(staged)
            with atomic_write(records) as staged:
                self.table.reset_index().to_json(staged, orient="records", indent=2, double_precision=15)
            saved = f", saved to {path} and {records.name}"
        except OSError as error:
            rank_zero_warn(
                f"The metrics of the categories could not be saved to '{path}' and are only printed: {error}. Make the "
                "folder writable, or choose another with default_root_dir."
            )
        if trainer.test_loop.verbose:
            shown = self.table.set_axis(pd.MultiIndex.from_tuples(HEADINGS[name] for name in self.table), axis=1)
            text = shown.rename_axis(index=None).to_string(float_format="{:.3f}".format, na_rep="-")
            print(f"\nBy category{saved}:\n{text}\n")
