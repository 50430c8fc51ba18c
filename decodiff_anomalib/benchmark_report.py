"""Tables and pictures of a benchmark, made from what its runs left behind."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from PIL import Image

from decodiff_anomalib.benchmark_run import CURVES, FIGURES_OF_CATEGORIES, MAPS, Run, replacing
from decodiff_anomalib.evaluation import FIGURES

COSTS = ("train_seconds", "ms_batch_1", "ms_batch_8", "memory_mb", "parameters", "state_mb")
VALUES = (*FIGURES, *COSTS, "normal_change")
KEYS = ["model", "mode", "category"]
MEAN = "mean"

HEADINGS = {
    **{figure: figure.replace("_", " ").replace("auroc", "AUROC").replace("ap", "AP") for figure in FIGURES},
    "image_f1max": "image F1",
    "pixel_f1max": "pixel F1",
    "pixel_aupro": "AUPRO",
    "train_seconds": "training, s",
    "ms_batch_1": "ms/image, batch 1",
    "ms_batch_8": "ms/image, batch 8",
    "memory_mb": "peak memory, MB",
    "parameters": "parameters, M",
    "state_mb": "model, MB",
    "normal_change": "change on normals",
}
DIGITS = {"train_seconds": 0, "memory_mb": 0, "ms_batch_1": 1, "ms_batch_8": 1, "parameters": 2, "state_mb": 1}
DIGITS |= {"normal_change": 2}

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
LINES = {"multi": "-", "single": "--"}
MARKERS = {"multi": "o", "single": "s"}


def write_report(grid: Sequence[Run], output: Path) -> pd.DataFrame:
    """Write ``table.csv``, ``.json`` and ``.md`` and the pictures of the runs that have ended, and print the means.

    Args:
        grid: All runs of the benchmark; those that have not ended are left out.
        output: The benchmark's folder.

    Returns:
        pd.DataFrame: See :func:`summarise`.
    """
    names, categories = shown_names(grid, output), _categories(grid)
    results, errors = collect(grid, names, output)
    table = summarise(results, errors, list(names.values()), categories)
    with replacing(output / "table.csv") as path:
        table.to_csv(path, index=False)
    with replacing(output / "table.json") as path:
        table.to_json(path, orient="records", indent=2, double_precision=15)
    with replacing(output / "table.md") as path:
        path.write_text(_markdown(table, results, errors, grid))
    finished = [run for run in grid if "result" in run.read(output)]
    if finished:
        means = table[table.error.isna()]
        for name, picture in {
            "pixel_ap_vs_ms": accuracy_and_speed(means),
            "per_category": figures_by_category(means),
            "precision_recall": precision_recall_curves(finished, names, output),
            "contact_sheet": contact_sheet(finished, names, output),
        }.items():
            with replacing(output / f"{name}.png") as path:
                picture.savefig(path)
    print(f"\n{_means_table(table)}\n\nTables and pictures: {output}")
    return table


# ---------------------------------------------------------------- numbers


def shown_names(grid: Sequence[Run], output: Path) -> dict[str, str]:
    """Name of each model with what is to be known about it, such as a teacher that is not the published one."""
    notes = {run.model: note for run in grid if (note := run.read(output).get("result", {}).get("note"))}
    return {run.model: f"{run.model} ({notes[run.model]})" if run.model in notes else run.model for run in grid}


def _categories(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(category for run in runs for category in run.categories))


def collect(grid: Sequence[Run], names: dict[str, str], output: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the runs of a benchmark came to.

    Args:
        grid: All runs of the benchmark.
        names: What each model is shown as, see :func:`shown_names`.
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
            result = record["result"]
            figures = json.loads((run.folder(output) / FIGURES_OF_CATEGORIES).read_text())
            for row in figures:
                if row["category"] in run.categories:
                    change = {"normal_change": result["normal_change"].get(row["category"])}
                    results.append(keys | {"category": row["category"]} | row | result | change)
    columns = [*KEYS, "seed"]
    results = pd.DataFrame(results, columns=[*columns, "device", *VALUES])
    return results.astype(dict.fromkeys(VALUES, float)), pd.DataFrame(errors, columns=[*columns, "error"])


def summarise(
    results: pd.DataFrame, errors: pd.DataFrame, models: Sequence[str], categories: Sequence[str]
) -> pd.DataFrame:
    """Mean and standard deviation over seeds.

    Args:
        results: As :func:`collect` gives them.
        errors: The same.
        models: Their names, in the order of the rows.
        categories: The same.

    Returns:
        pd.DataFrame: A row for each model, mode and category, and for the ``mean`` over categories of those seeds that
        have all of them: the number of ``seeds``, the mean of each of the :data:`VALUES` over them, its sample standard
        deviation (``_sd``), and what went wrong (``error``).
    """
    of_seed = results.groupby(["model", "mode", "seed"], sort=False)
    means = of_seed[list(VALUES)].mean()[of_seed.size() == len(categories)].reset_index().assign(category=MEAN)
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
    rows = [(model, mode, category) for model in models for mode in LINES for category in (*categories, MEAN)]
    return table.reindex([row for row in rows if row in table.index]).rename_axis(KEYS).reset_index()


def _show(row: pd.Series, name: str) -> str:
    """A number with its deviation over seeds."""
    mean, deviation = row[name], row[f"{name}_sd"]
    if pd.isna(mean):
        return "–"
    scale, digits = 1e-6 if name == "parameters" else 1, DIGITS.get(name, 3)
    text = f"{scale * mean:,.{digits}f}"
    return text if pd.isna(deviation) or name in {"parameters", "state_mb"} else f"{text} ± {deviation:.{digits}f}"


def _lines(table: pd.DataFrame, keys: Sequence[str], values: Sequence[str]) -> Iterator[str]:
    yield "| " + " | ".join([*keys, *(HEADINGS[name] for name in values)]) + " |"
    yield "|" + "---|" * (len(keys) + len(values))
    for _, row in table.iterrows():
        yield "| " + " | ".join([*(str(row[key]) for key in keys), *(_show(row, name) for name in values)]) + " |"


def _means_table(table: pd.DataFrame) -> str:
    values = [name for name in VALUES if name != "normal_change" or table[name].notna().any()]
    return "\n".join(_lines(table[table.category == MEAN], ["model", "mode", "seeds"], values))


def _markdown(table: pd.DataFrame, results: pd.DataFrame, errors: pd.DataFrame, grid: Sequence[Run]) -> str:
    categories = _categories(grid)
    seeds = list(dict.fromkeys(run.seed for run in grid))
    size, devices = grid[0].image_size, "; ".join(results.device.unique()) or "nothing yet"
    protocol = (
        f"Whole images of {size} × {size} pixels; categories: {', '.join(categories)}; seeds: "
        f"{', '.join(map(str, seeds))}. Thresholds from held-out normal images. Mean ± standard deviation over seeds. "
        f"Measured on: {devices}. Training is of one model, of however many categories; peak memory is of the whole "
        "run; the model is all that inference needs; the change on normals is what a corrected normal image differs by "
        "from its reconstruction, in grey levels of 255."
    )
    lines = [
        "# Benchmark",
        "",
        protocol,
        "",
        "## Mean over categories",
        "",
        _means_table(table),
        "",
        "## By category",
        "",
        *_lines(table[table.category != MEAN], ["category", "model", "mode", "seeds"], FIGURES),
    ]
    if len(errors):
        failed = errors.drop_duplicates(["model", "mode", "error"])
        lines += ["", "## Failed", "", *(f"- {row.model}, {row.mode}, {row.error}" for row in failed.itertuples())]
    return "\n".join([*lines, ""])


# ---------------------------------------------------------------- pictures


def _styles(table: pd.DataFrame) -> dict[tuple[str, str], dict[str, Any]]:
    """Colour and label of each model and mode of a table, in its order."""
    models = list(dict.fromkeys(table.model))
    several = len(set(table["mode"])) > 1
    return {
        (model, mode): {
            "color": COLOURS[models.index(model) % len(COLOURS)],
            "label": f"{model}, {mode}" if several else model,
        }
        for model, mode in dict.fromkeys(zip(table.model, table["mode"], strict=True))
    }


def _legend(figure: Figure, axes: Axes) -> None:
    """One legend for all axes, above them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)


def accuracy_and_speed(table: pd.DataFrame) -> Figure:
    """Mean pixel AP against milliseconds an image, a point for each model and mode."""
    figure = Figure(figsize=(7, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    rows = table[table.category == MEAN]
    for key, style in _styles(table).items():
        for _, row in rows[(rows.model == key[0]) & (rows["mode"] == key[1])].iterrows():
            axes.errorbar(
                row.ms_batch_1,
                row.pixel_ap,
                xerr=np.nan_to_num(row.ms_batch_1_sd),
                yerr=np.nan_to_num(row.pixel_ap_sd),
                fmt=MARKERS[key[1]],
                markersize=8,
                capsize=3,
                **style,
            )
    axes.set(xlabel="milliseconds an image, batch 1", ylabel="pixel AP, mean over categories")
    axes.set(xlim=(0, _room_above(rows, "ms_batch_1")), ylim=(0, _room_above(rows, "pixel_ap")))
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def _room_above(rows: pd.DataFrame, name: str) -> float:
    """Upper end of an axis: a little above the values; 1 where there are none, as without masks."""
    highest = (rows[name] + rows[f"{name}_sd"].fillna(0)).max()
    return 1.15 * highest if highest > 0 else 1.0


def figures_by_category(table: pd.DataFrame) -> Figure:
    """Pixel AP, AUPRO and image AUROC of each category, a bar for each model and mode."""
    categories, styles = list(dict.fromkeys(table.category)), _styles(table)
    size = max(7, 1.2 + 0.28 * len(categories) * (len(styles) + 1)), 9
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    width = 0.85 / len(styles)
    for axes, name in zip(figure.subplots(3, sharex=True), ("pixel_ap", "pixel_aupro", "image_auroc"), strict=True):
        for place, ((model, mode), style) in enumerate(styles.items()):
            rows = table[(table.model == model) & (table["mode"] == mode)].set_index("category").reindex(categories)
            axes.bar(
                np.arange(len(categories)) + (place - (len(styles) - 1) / 2) * width,
                rows[name],
                width,
                yerr=rows[f"{name}_sd"].fillna(0),
                error_kw={"elinewidth": 1},
                hatch="//" if mode == "single" else None,
                edgecolor="white",
                **style,
            )
        axes.set(ylabel=HEADINGS[name], ylim=(0, 1))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    axes.set_xticks(range(len(categories)), categories, rotation=30 if len(categories) > 6 else 0, ha="center")
    _legend(figure, axes)
    return figure


def precision_recall_curves(runs: Sequence[Run], names: dict[str, str], output: Path) -> Figure:
    """Precision over recall of the pixels of each category; the mean over seeds, and the band of their deviation."""
    categories = _categories(runs)
    styles = _styles(pd.DataFrame([(names[run.model], run.mode) for run in runs], columns=["model", "mode"]))
    columns = min(3, len(categories))
    rows = -(-len(categories) // columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 0.6 + 3.2 * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    recall = np.linspace(0, 1, 200)
    for axes, category in zip(panels, categories, strict=False):
        for (model, mode), style in styles.items():
            curves = []
            for run in runs:
                if (names[run.model], run.mode) == (model, mode) and category in run.categories:
                    seen, precision = json.loads((run.folder(output) / CURVES).read_text())[category]
                    curves += [np.interp(recall, seen, precision)] if seen else []
            mean, deviation = (reduce(curves, axis=0) if curves else np.nan * recall for reduce in (np.mean, np.std))
            axes.plot(recall, mean, LINES[mode], **style)
            axes.fill_between(recall, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(title=category, xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(categories) :]:
        axes.set_visible(False)
    figure.supxlabel("recall of pixels")
    figure.supylabel("precision of pixels")
    _legend(figure, figure.axes[0])
    return figure


def contact_sheet(runs: Sequence[Run], names: dict[str, str], output: Path) -> Figure:
    """The same test images as each model sees them, by the run of the first seed that ended.

    Columns are the image, the image with its defects outlined, and each model's map: white at the threshold of the
    category, red above, blue below, in a scale of its own; beside it the corrected image, where there is one.
    """
    several = len({run.mode for run in runs}) > 1
    seen: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: -run.seed):  # the first seed's come last, and stay
        seen.setdefault((run.model, run.mode), {}).update(_load_pictures(run, output))
    columns: list[tuple[str, str, tuple[str, str], dict[str, Any]]] = []
    for model, mode in dict.fromkeys((run.model, run.mode) for run in runs):
        kept, title = seen[model, mode].values(), f"{names[model]}{f', {mode}' if several else ''}"
        low, high = np.quantile(np.stack([picture["maps"] for picture in kept]).astype(float), (0.005, 0.995))
        scale = {"norm": TwoSlopeNorm(0.5, min(low, 0.45), max(high, 0.55)), "cmap": "RdBu_r"}
        columns.append((title, "maps", (model, mode), scale))
        if any("corrections" in picture for picture in kept):
            columns.append((f"{title}: correction", "corrections", (model, mode), {}))

    order = _categories(runs)
    shown = {path: picture for kept in seen.values() for path, picture in kept.items()}
    shown = dict(sorted(shown.items(), key=lambda item: order.index(item[1]["category"])))
    figure = Figure(figsize=(0.4 + 1.5 * (2 + len(columns)), 0.5 + 1.5 * len(shown)), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(len(shown), 2 + len(columns), squeeze=False)
    for axes, title in zip(grid[0], ["image", "defects", *(column[0] for column in columns)], strict=True):
        axes.set_title(textwrap.fill(title, 22), fontsize=8)
    for (path, picture), row in zip(shown.items(), grid, strict=True):
        row[0].set_ylabel(f"{picture['category']}\n{Path(path).parent.name}", fontsize=8)
        _show_image(row[0], path, "")
        _show_image(row[1], path, picture["mask_path"])
        for axes, (_, kind, key, scale) in zip(row[2:], columns, strict=True):
            values = seen[key].get(path, {}).get(kind)
            if values is not None:
                axes.imshow(values.astype(float) if scale else values, **scale)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def _load_pictures(run: Run, output: Path) -> dict[str, dict[str, Any]]:
    """What a run kept of each image that is shown, by the image's path."""
    with np.load(run.folder(output) / MAPS) as kept:
        fields = {name: kept[name] for name in kept}
    return {path: {name: fields[name][row] for name in fields} for row, path in enumerate(fields["image_path"])}


def _show_image(axes: Axes, path: str, mask_path: str) -> None:
    with Image.open(path) as image:
        axes.imshow(image.convert("RGB"), extent=(0, 1, 1, 0))
    if mask_path:
        with Image.open(mask_path) as mask:
            defect = np.asarray(mask.convert("L")) > 0
        if defect.any():
            axes.contour(defect, levels=[0.5], colors=["#FF3030"], linewidths=1, extent=(0, 1, 0, 1))
