"""Tables of a benchmark: the results of its runs are collected, summarised over seeds, and written."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.benchmark.grid import MODES
from decodiff_anomalib.benchmark.record import CATEGORY_METRICS, RECORD, Run, reading
from decodiff_anomalib.evaluation import METRICS, RATES

COSTS = ("train_seconds", "ms_batch_1", "ms_batch_8", "memory_mb", "parameters", "state_mb")
OF_CORRECTION = ("normal_change", "correction_psnr")
VALUES = (*METRICS, *RATES, *COSTS, *OF_CORRECTION)
KEYS = ["model", "mode", "category"]
MEAN = "mean"

HEADINGS = {
    **{metric: metric.replace("_", " ").replace("auroc", "AUROC").replace("ap", "AP") for metric in METRICS},
    "image_f1max": "image F1",
    "pixel_f1max": "pixel F1",
    "pixel_aupro": "AUPRO",
    "false_alarm_rate": "false alarms",
    "detection_rate": "detected",
    "train_seconds": "training, s",
    "ms_batch_1": "ms/image, batch 1",
    "ms_batch_8": "ms/image, batch 8",
    "memory_mb": "peak memory, MB",
    "parameters": "parameters, M",
    "state_mb": "model, MB",
    "normal_change": "change on normals",
    "correction_psnr": "correction PSNR",
}
DIGITS = {"train_seconds": 0, "memory_mb": 0, "ms_batch_1": 1, "ms_batch_8": 1, "parameters": 2, "state_mb": 1}
DIGITS |= {"normal_change": 2, "correction_psnr": 1}


def write_tables(grid: Sequence[Run], output: Path) -> pd.DataFrame:
    """Write ``table.csv``, ``.json`` and ``.md`` of the runs that have ended.

    Args:
        grid: All runs of the benchmark; those that have not ended are left out.
        output: The benchmark's folder.

    Returns:
        pd.DataFrame: See :func:`summarise`.
    """
    names = display_names(grid, output)
    results, errors = collect(grid, names, output)
    table = summarise(results, errors, list(names.values()), run_categories(grid))
    with atomic_write(output / "table.csv") as path:
        table.to_csv(path, index=False)
    with atomic_write(output / "table.json") as path:
        table.to_json(path, orient="records", indent=2, double_precision=15)
    with atomic_write(output / "table.md") as path:
        path.write_text(_markdown(table, results, errors, grid))
    return table


# ---------------------------------------------------------------- results


def display_names(grid: Sequence[Run], output: Path) -> dict[str, str]:
    """Name of each model in tables and pictures: with its note, such as a teacher that is not the published one."""
    notes = {run.model: note for run in grid if (note := run.read(output).get("result", {}).get("note"))}
    return {run.model: f"{run.model} ({notes[run.model]})" if run.model in notes else run.model for run in grid}


def run_categories(runs: Sequence[Run]) -> list[str]:
    """Categories of all ``runs``, in their order."""
    return list(dict.fromkeys(category for run in runs for category in run.categories))


def collect(grid: Sequence[Run], names: dict[str, str], output: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Results and errors of the runs that have ended.

    Args:
        grid: All runs of the benchmark.
        names: See :func:`display_names`.
        output: The benchmark's folder.

    Returns:
        tuple[pd.DataFrame, pd.DataFrame]: A row for each run and category with the :data:`VALUES` and the device; and a
        row for each failed run and category with its ``error``. Both have model, mode, category and seed.
    """
    results, errors = [], []
    for run in grid:
        record = run.read(output)
        keys = {"model": names[run.model], "mode": run.mode, "seed": run.seed}
        if "error" in record:
            message = f"seed {run.seed}: {record['error']}"
            errors += [keys | {"category": category, "error": message} for category in run.categories]
        if "result" in record:
            with reading(run.folder(output) / CATEGORY_METRICS):
                metrics = json.loads((run.folder(output) / CATEGORY_METRICS).read_text())
                rows = [row for row in metrics if row["category"] in run.categories]
                numbers = [{name: _number(row.get(name)) for name in (*METRICS, *RATES)} for row in rows]
            with reading(run.folder(output) / RECORD):
                costs = {name: _number(record["result"].get(name)) for name in COSTS}
                device = str(record["result"]["device"])
                for row, values in zip(rows, numbers, strict=True):
                    of_category = {"category": row["category"], "device": device}
                    pictures = {name: _number(record["result"][name].get(row["category"])) for name in OF_CORRECTION}
                    results.append(keys | of_category | values | costs | pictures)
    columns = [*KEYS, "seed"]
    table = pd.DataFrame(results, columns=[*columns, "device", *VALUES])
    return table.astype(dict.fromkeys(VALUES, float)), pd.DataFrame(errors, columns=[*columns, "error"])


def _number(value: float | None) -> float:
    """A value of a record, where what is undefined is null."""
    return math.nan if value is None else float(value)


def summarise(
    results: pd.DataFrame, errors: pd.DataFrame, models: Sequence[str], categories: Sequence[str]
) -> pd.DataFrame:
    """Mean and standard deviation over seeds.

    Args:
        results: From :func:`collect`.
        errors: From :func:`collect`.
        models: Names of the models, in the order of the rows.
        categories: Names of the categories, in the order of the rows.

    Returns:
        pd.DataFrame: A row for each model, mode and category, and for the ``mean`` over categories of those seeds that
        have all of them: the number of ``seeds``, the mean of each of the :data:`VALUES` over them, its sample standard
        deviation (``_sd``), and the messages of failed runs (``error``).
    """
    by_seed = results.groupby(["model", "mode", "seed"], sort=False)
    means = by_seed[list(VALUES)].mean()[by_seed.size() == len(categories)].reset_index().assign(category=MEAN)
    by = pd.concat([results.drop(columns="device"), means], ignore_index=True).groupby(KEYS, sort=False)
    table = pd.concat(
        [
            by.size().rename("seeds"),
            by[list(VALUES)].mean(),
            by[list(VALUES)].std().add_suffix("_sd"),
        ],
        axis=1,
    )
    table = table[["seeds", *(name + end for name in VALUES for end in ("", "_sd"))]]
    failures = pd.concat([errors, errors.assign(category=MEAN)]).groupby(KEYS)["error"]
    table = table.join(failures.agg(lambda messages: "; ".join(dict.fromkeys(messages))), how="outer")
    table["seeds"] = table.seeds.fillna(0).astype(int)
    rows = [(model, mode, category) for model in models for mode in MODES for category in (*categories, MEAN)]
    return table.reindex([row for row in rows if row in table.index]).rename_axis(KEYS).reset_index()


# ---------------------------------------------------------------- tables in markdown


def means_table(table: pd.DataFrame) -> str:
    """The means over categories as a markdown table."""
    values = [name for name in VALUES if name not in OF_CORRECTION or table[name].notna().any()]
    return "\n".join(_lines(table[table.category == MEAN], ["model", "mode", "seeds"], values))


def _lines(table: pd.DataFrame, keys: Sequence[str], values: Sequence[str]) -> Iterator[str]:
    yield "| " + " | ".join([*keys, *(HEADINGS[name] for name in values)]) + " |"
    yield "|" + "---|" * (len(keys) + len(values))
    for _, row in table.iterrows():
        yield "| " + " | ".join([*(str(row[key]) for key in keys), *(_format(row, name) for name in values)]) + " |"


def _format(row: pd.Series, name: str) -> str:
    """A mean with its deviation over seeds."""
    mean, deviation = row[name], row[f"{name}_sd"]
    if pd.isna(mean):
        return "–"
    scale, digits = 1e-6 if name == "parameters" else 1, DIGITS.get(name, 3)
    text = f"{scale * mean:,.{digits}f}"
    return text if pd.isna(deviation) or name in {"parameters", "state_mb"} else f"{text} ± {deviation:.{digits}f}"


def _markdown(table: pd.DataFrame, results: pd.DataFrame, errors: pd.DataFrame, grid: Sequence[Run]) -> str:
    categories = run_categories(grid)
    seeds = list(dict.fromkeys(run.seed for run in grid))
    size, devices = grid[0].image_size, "; ".join(results.device.unique()) or "nothing yet"
    protocol = (
        f"Whole images of {size} × {size} pixels; categories: {', '.join(categories)}; seeds: "
        f"{', '.join(map(str, seeds))}. Thresholds from held-out normal images; false alarms and detected are "
        "the shares of normal and of defective images above them. Mean ± standard deviation over seeds. "
        f"Measured on: {devices}. The training time is that of one model, whatever its number of categories; peak "
        "memory is that of the whole run; the size of the model counts everything that inference needs; the change on "
        "normals is the mean absolute difference between the correction of a normal image and its reconstruction, in "
        "grey values from 0 to 255; the correction PSNR, in dB, compares the correction of normal images with drawn "
        "defects with the images before, in the defects."
    )
    lines = [
        "# Benchmark",
        "",
        protocol,
        "",
        "## Mean over categories",
        "",
        means_table(table),
        "",
        "## By category",
        "",
        *_lines(table[table.category != MEAN], ["category", "model", "mode", "seeds"], (*METRICS, *RATES)),
    ]
    if len(errors):
        failed = errors.drop_duplicates(["model", "mode", "error"])
        lines += ["", "## Failed", "", *(f"- {row.model}, {row.mode}, {row.error}" for row in failed.itertuples())]
    return "\n".join([*lines, ""])
