"""The page of a report: everything that it shows in one HTML file, whose script moves thresholds and turns pages."""

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from io import BytesIO
from itertools import zip_longest
from os.path import commonpath
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image as Picture

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.conditioning import UNKNOWN
from decodiff_anomalib.report.figures import BINS, Scores
from decodiff_anomalib.report.plots import COLOURS, histogram, library, precision_recall
from decodiff_anomalib.report.records import FOLDER, THUMBNAILS, Image, ReportFolder, Run
from decodiff_anomalib.scale import HIGHEST, LOWEST, TICKS, colour_bar

EMBEDDED_BYTES = 5_800_000
"""Of thumbnails in a page. Their text is a third longer; with the plotting library, a page stays below 10 MB."""
ALL = "all categories"


@dataclass(frozen=True)
class Section:
    """A category of the report, or all of them.

    Attributes:
        name: Of the category.
        images: Its images.
        threshold: The model's, or where the slider begins if it has none.
        raw_threshold: The raw score that is the threshold, if known.
        pixels: Metrics of pixels.
    """

    name: str
    images: Sequence[Image]
    threshold: float
    raw_threshold: float | None
    pixels: dict[str, float]


def write_page(folder: ReportFolder) -> Path:
    """Write the page of a run from its data; returns its path.

    Raises:
        FileNotFoundError: If there are no data of a report.
        OSError: If the page cannot be written.
        ValueError: If the data are damaged.
    """
    run, images = folder.read()
    text = render(run, images, folder)
    with atomic_write(folder.page) as staged:
        staged.write_text(text, encoding="utf-8")
    return folder.page


def render(run: Run, images: Sequence[Image], folder: ReportFolder) -> str:
    """The page as text.

    Args:
        run: The run.
        images: Of the run, in any order.
        folder: Where the thumbnails are.
    """
    categories = sections(run, images)
    edges = np.linspace(*Scores.of(images).limits(normalised=run.threshold is not None), BINS + 1)
    aspects, thumbnails = _embed(images, categories, folder)
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template("page.html.j2").render(
        run=run,
        images=len(images),
        labelled=any(image.defective is not None for image in images),
        unscored=sum(math.isnan(image.score) for image in images),
        left_out=len(images) - len(thumbnails),
        categories=categories,
        columns=_columns(categories),
        data=_data(run, images, categories, edges, aspects),
        thumbnails=thumbnails,
        plots={"histogram": histogram(edges), "curve": precision_recall()},
        library=Markup(library()),  # noqa: S704 - of the plotting library itself
        style=_own("page.css"),
        script=_own("page.js"),
        colours=COLOURS,
        bar=_data_uri(colour_bar((256, 1))),
        ticks=[((value - LOWEST) / (HIGHEST - LOWEST), text) for value, text in TICKS.items()],
    )


def sections(run: Run, images: Sequence[Image]) -> list[Section]:
    """The categories of the images by name, unknown ones last; before them all together, if there are several."""
    names = sorted({image.category for image in images}, key=lambda name: (name == UNKNOWN, name))
    found = []
    for name in [ALL, *names] if len(names) > 1 else names:
        own = [image for image in images if name in {ALL, image.category}]
        found.append(
            Section(
                name=name,
                images=own,
                threshold=Scores.of(own).starting_threshold() if run.threshold is None else run.threshold,
                raw_threshold=run.raw_thresholds.get(name, run.raw_thresholds.get(UNKNOWN)) if name != ALL else None,
                pixels=run.pixel_metrics.get(name, {}),
            )
        )
    return found


# ---------------------------------------------------------------- the table


def _columns(categories: Sequence[Section]) -> list[dict[str, str]]:
    """Columns of the table: their key, heading and explanation, for what the labels and masks allow."""
    labels = [image.defective for image in categories[0].images] if categories else []
    is_raw = any(category.raw_threshold is not None for category in categories)
    threshold = "Raw threshold" if is_raw else "Threshold"
    above = "Raw score above which an image is anomalous" if is_raw else "Score above which an image is anomalous"
    columns = [("images", "Images", "Number of images")]
    if any(label is not None for label in labels):
        columns += [
            ("normal", "Normal", "Images labelled normal"),
            ("defective", "Defective", "Images labelled defective"),
            ("auroc", "Image AUROC", "Area under the ROC curve of the image scores; of all categories, the mean"),
            ("ap", "Image AP", "Average precision of the image scores; of all categories, the mean"),
            ("threshold", threshold, above),
            ("false_alarms", "False alarms", "Normal images above the threshold, and their share of the normal images"),
            ("misses", "Misses", "Defective images not above the threshold"),
            ("detected", "Detected", "Share of the defective images that are above the threshold"),
        ]
        pixels = {name for category in categories for name in category.pixels}
        names = {"pixel_auroc": "Pixel AUROC", "pixel_ap": "Pixel AP", "pixel_aupro": "Pixel AUPRO"}
        columns += [(key, text, f"{text} of the maps") for key, text in names.items() if key in pixels]
    else:
        columns += [
            ("threshold", threshold, above),
            ("flagged", "Above it", "Images above the threshold, and their share"),
        ]
    return [dict(zip(("key", "heading", "explanation"), column, strict=True)) for column in columns]


# ---------------------------------------------------------------- what the script reads


def _data(
    run: Run, images: Sequence[Image], categories: Sequence[Section], edges: np.ndarray, aspects: dict[int, float]
) -> dict[str, Any]:
    """Scores and figures, as JSON can hold them."""
    names = [category.name for category in categories]
    figures = [_figures(category, edges) for category in categories]
    folder = _common_folder([image.name for image in images])
    if len(categories) > 1:  # means over categories; their scores alone would be compared with each other
        for key in ("auroc", "ap", "pixel_auroc", "pixel_ap", "pixel_aupro"):
            values = [figure[key] for figure in figures[1:] if figure.get(key) is not None]
            figures[0][key] = float(np.mean(values)) if values else None
    return {
        "normalised": run.threshold is not None,
        "labelled": any(image.defective is not None for image in images),
        "edges": edges.tolist(),
        "folder": folder,
        "thumbnails": f"{FOLDER}/{THUMBNAILS}",
        "categories": figures,
        "images": [
            {
                "number": image.number,
                "name": image.name.removeprefix(folder),
                "category": names.index(image.category),
                "defective": image.defective,
                "score": _plain(image.score),
                "raw": _plain(image.raw_score),
                "inferred": image.inferred,
                "ood": _plain(image.ood_score),
                "views": image.views,
                "aspect": aspects.get(image.number),
            }
            for image in images
        ],
    }


def _figures(category: Section, edges: np.ndarray) -> dict[str, Any]:
    scores = Scores.of(category.images)
    recall, precision = scores.precision_recall()
    return {
        "name": category.name,
        "threshold": category.threshold,
        "raw": _plain(category.raw_threshold),
        **asdict(scores.counts(category.threshold)),
        "images": len(category.images),
        **{name: _plain(value) for name, value in (scores.metrics() | category.pixels).items()},
        "histogram": scores.histogram(edges),
        "curve": {"recall": recall.tolist(), "precision": precision.tolist()},
    }


def _common_folder(names: Sequence[str]) -> str:
    """What all paths begin with, up to and with a separator, for the page to show what differs; empty without one."""
    folders = {str(Path(name).parent) for name in names}
    if len(names) < 2 or not all(Path(folder).is_absolute() for folder in folders):
        return ""
    common = str(PurePath(commonpath(folders)) / "_").removesuffix("_")
    return common if all(name.startswith(common) for name in names) else ""


def _plain(value: float | None) -> float | None:
    """A number as JSON can hold it; ``None`` for those that are not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


# ---------------------------------------------------------------- what is embedded


def order_of_interest(images: Sequence[Image], thresholds: dict[str, float]) -> list[Image]:
    """Images in the order in which a page takes their thumbnails in as long as there is room.

    Misses and alarms that are not known to be right come first, in turn and the worst first; then the others, those
    nearest to the threshold first.

    Args:
        images: Any.
        thresholds: Of their categories.
    """

    def margin(image: Image) -> float:
        return math.inf if math.isnan(image.score) else image.score - thresholds[image.category]

    misses = [image for image in images if image.defective and margin(image) <= 0]
    alarms = [image for image in images if not image.defective and margin(image) > 0]
    in_turn = zip_longest(sorted(misses, key=margin), sorted(alarms, key=margin, reverse=True))
    first = [image for pair in in_turn for image in pair if image is not None]
    numbers = {image.number for image in first}
    others = [image for image in images if image.number not in numbers]
    return first + sorted(others, key=lambda image: abs(margin(image)))


def _embed(
    images: Sequence[Image], categories: Sequence[Section], folder: ReportFolder
) -> tuple[dict[int, float], dict[int, str]]:
    """Number of each image to the aspect ratio of its views, and to its thumbnail, of as many as there is room for."""
    aspects, embedded, left = {}, {}, EMBEDDED_BYTES
    for image in order_of_interest(images, {category.name: category.threshold for category in categories}):
        file = folder.thumbnail(image.number)
        if not image.views or not file.is_file():
            continue
        with Picture.open(file) as strip:
            aspects[image.number] = round(strip.width / len(image.views) / strip.height, 4)
        left -= file.stat().st_size
        if left >= 0:
            embedded[image.number] = base64.b64encode(file.read_bytes()).decode()
    return aspects, embedded


def _data_uri(picture: Picture.Image) -> str:
    file = BytesIO()
    picture.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _own(name: str) -> Markup:
    """A style sheet or script of this package."""
    return Markup((files(__package__) / name).read_text(encoding="utf-8"))  # noqa: S704
