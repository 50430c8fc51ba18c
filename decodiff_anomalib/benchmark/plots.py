"""Pictures of a benchmark: accuracy and speed, metrics by category, precision-recall curves, and a contact sheet."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.benchmark.record import CURVES, MAPS, Run, reading
from decodiff_anomalib.benchmark.report import HEADINGS, MEAN, display_names, run_categories
from decodiff_anomalib.scale import COLOURS as COLOURS_OF_MAPS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
LINES = {"multi": "-", "single": "--"}
MARKERS = {"multi": "o", "single": "s"}


def write_plots(grid: Sequence[Run], table: pd.DataFrame, output: Path) -> None:
    """Write the pictures of the runs that have ended, if there are any.

    Args:
        grid: All runs of the benchmark.
        table: See :func:`decodiff_anomalib.benchmark.report.summarise`.
        output: The benchmark's folder.
    """
    finished = [run for run in grid if "result" in run.read(output)]
    if not finished:
        return
    names, means = display_names(grid, output), table[table.error.isna()]
    for name, figure in {
        "pixel_ap_vs_ms": accuracy_and_speed(means),
        "per_category": metrics_by_category(means),
        "precision_recall": precision_recall_curves(finished, names, output),
        "contact_sheet": contact_sheet(finished, names, output),
    }.items():
        with atomic_write(output / f"{name}.png") as path:
            figure.savefig(path)


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


def _add_legend(figure: Figure, axes: Axes) -> None:
    """One legend above all axes."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)


# ---------------------------------------------------------------- metrics


def accuracy_and_speed(table: pd.DataFrame) -> Figure:
    """Mean pixel AP against milliseconds for each image, a point for each model and mode."""
    figure = Figure(figsize=(7, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    rows = table[table.category == MEAN]
    for (model, mode), style in _styles(table).items():
        for _, row in rows[(rows.model == model) & (rows["mode"] == mode)].iterrows():
            axes.errorbar(
                row.ms_batch_1,
                row.pixel_ap,
                xerr=np.nan_to_num(row.ms_batch_1_sd),
                yerr=np.nan_to_num(row.pixel_ap_sd),
                fmt=MARKERS[mode],
                markersize=8,
                capsize=3,
                **style,
            )
    axes.set(xlabel="milliseconds an image, batch 1", ylabel="pixel AP, mean over categories")
    axes.set(xlim=(0, _upper_limit(rows, "ms_batch_1")), ylim=(0, _upper_limit(rows, "pixel_ap")))
    axes.grid(alpha=0.3)
    _add_legend(figure, axes)
    return figure


def _upper_limit(rows: pd.DataFrame, name: str) -> float:
    """Upper limit of an axis: a little above the values; 1 where there are none, such as pixel AP without masks."""
    highest = (rows[name] + rows[f"{name}_sd"].fillna(0)).max()
    return 1.15 * highest if highest > 0 else 1.0


def metrics_by_category(table: pd.DataFrame) -> Figure:
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
    _add_legend(figure, axes)
    return figure


def precision_recall_curves(runs: Sequence[Run], names: dict[str, str], output: Path) -> Figure:
    """Pixel precision over recall for each category: the mean over seeds, and a band of one standard deviation."""
    categories = run_categories(runs)
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
                    with reading(run.folder(output) / CURVES):
                        known, precision = json.loads((run.folder(output) / CURVES).read_text())[category]
                    curves += [np.interp(recall, known, precision)] if known else []
            mean, deviation = (reduce(curves, axis=0) if curves else np.nan * recall for reduce in (np.mean, np.std))
            axes.plot(recall, mean, LINES[mode], **style)
            axes.fill_between(recall, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(title=category, xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(categories) :]:
        axes.set_visible(False)
    figure.supxlabel("recall of pixels")
    figure.supylabel("precision of pixels")
    _add_legend(figure, figure.axes[0])
    return figure


# ---------------------------------------------------------------- images and maps


def contact_sheet(runs: Sequence[Run], names: dict[str, str], output: Path) -> Figure:
    """The same test images with the maps of each model, from its finished run of the first seed.

    Columns are the image, the image with its defects outlined, and each model's map: white at the category's threshold,
    red above, blue below, with a colour scale for each model; beside it the corrected image, if the model makes one.
    """
    several = len({run.mode for run in runs}) > 1
    kept: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: -run.seed):  # the first seed is read last and replaces the others
        kept.setdefault((run.model, run.mode), {}).update(_read_maps(run, output))
    columns: list[tuple[str, str, tuple[str, str], dict[str, Any]]] = []
    for model, mode in dict.fromkeys((run.model, run.mode) for run in runs):
        images, title = kept[model, mode].values(), f"{names[model]}{f', {mode}' if several else ''}"
        low, high = np.quantile(np.stack([image["maps"] for image in images]).astype(float), (0.005, 0.995))
        scale = {"norm": TwoSlopeNorm(0.5, min(low, 0.45), max(high, 0.55)), "cmap": COLOURS_OF_MAPS}
        columns.append((title, "maps", (model, mode), scale))
        if any("corrections" in image for image in images):
            columns.append((f"{title}: correction", "corrections", (model, mode), {}))

    order = run_categories(runs)
    shown = {path: fields for images_of_model in kept.values() for path, fields in images_of_model.items()}
    shown = dict(sorted(shown.items(), key=lambda item: order.index(item[1]["category"])))
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    figure = Figure(figsize=(0.4 + 1.5 * (2 + len(columns)), 0.5 + 1.5 * len(shown)), dpi=110, layout=layout)
    cells = figure.subplots(len(shown), 2 + len(columns), squeeze=False)
    for axes, title in zip(cells[0], ["image", "defects", *(column[0] for column in columns)], strict=True):
        axes.set_title(textwrap.fill(title, 22), fontsize=8)
    for (path, fields), row in zip(shown.items(), cells, strict=True):
        row[0].set_ylabel(f"{fields['category']}\n{Path(path).parent.name}", fontsize=8)
        _show_image(row[0], path, "")
        _show_image(row[1], path, fields["mask_path"])
        for axes, (_, kind, key, scale) in zip(row[2:], columns, strict=True):
            values = kept[key].get(path, {}).get(kind)
            if values is not None:
                axes.imshow(values.astype(float) if scale else values, **scale)
    for axes in cells.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def _read_maps(run: Run, output: Path) -> dict[str, dict[str, Any]]:
    """Path of each image on the contact sheet to its map, category, mask and, if there is one, correction."""
    path = run.folder(output) / MAPS
    with reading(path), np.load(path) as file:
        fields = {name: file[name] for name in file}
    return {path: {name: fields[name][row] for name in fields} for row, path in enumerate(fields["image_path"])}


def _show_image(axes: Axes, path: str, mask_path: str) -> None:
    """Draw an image, and the outline of its defects if it has a mask."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("F" if image.mode.startswith("I") else "RGB"))
    axes.imshow(pixels, cmap="gray", extent=(0, 1, 1, 0))  # of deep images the whole range, not its first 8 bits
    if mask_path:
        with Image.open(mask_path) as mask:
            defect = np.asarray(mask.convert("L")) > 0
        if defect.any():
            axes.contour(defect, levels=[0.5], colors=["#FF3030"], linewidths=1, extent=(0, 1, 0, 1))
