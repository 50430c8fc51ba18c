"""What a run leaves behind for its report: plain JSON and small pictures, in the folder ``report``.

========================  ==============================================================================
``run.json``              the :class:`Run`
``images.jsonl``          a line for each image, an :class:`Image`, as soon as it is predicted
``thumbnails/*.webp``     the views of an image side by side, named by its number
========================  ==============================================================================
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image as Picture

from decodiff_anomalib.atomic_write import append, atomic_write

FOLDER, PAGE = "report", "report.html"
RUN, IMAGES, THUMBNAILS = "run.json", "images.jsonl", "thumbnails"

SIDE = 160
"""Largest width and height of a view in a thumbnail, pixels."""
QUALITY = 50


@dataclass(frozen=True)
class Run:
    """A test or a prediction.

    Attributes:
        title: What was done, with which model.
        data: Names of the data and of their category, if they have one; empty if they have none.
        created: When it began, ISO 8601.
        threshold: Score above which an image is anomalous; ``None`` if the model has no thresholds, and scores are raw.
        raw_thresholds: Category to the raw score of its threshold, where the model has one.
        promises: What the thresholds promise, in words, a sentence for each category.
        pixel_metrics: Category to metrics of its pixels, where there are masks.
    """

    title: str
    data: str
    created: str
    threshold: float | None
    raw_thresholds: dict[str, float] = field(default_factory=dict)
    promises: tuple[str, ...] = ()
    pixel_metrics: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Image:
    """The prediction of an image.

    Attributes:
        number: In the data, unique in a run.
        name: Its path, or its number in words.
        category: Which the data give, else the inferred one.
        defective: Its label; ``None`` if it has none.
        score: NaN if it could not be scored.
        raw_score: Before normalisation.
        inferred: The category that the model inferred.
        ood_score: Above 1 for images of no trained category.
        views: Names of the views in its thumbnail, from left to right.
    """

    number: int
    name: str
    category: str
    defective: bool | None
    score: float
    raw_score: float | None = None
    inferred: str | None = None
    ood_score: float | None = None
    views: tuple[str, ...] = ()


class ReportFolder:
    """The folder of a report's data.

    Args:
        run: Folder of the run, which the page is written to; the data lie in ``report`` below it.
    """

    def __init__(self, run: Path) -> None:
        self.page = run / PAGE
        self.path = run / FOLDER

    def begin(self) -> None:
        """Remove the data and the page of an earlier run in the same folder.

        Raises:
            OSError: If the folder cannot be written to.
        """
        (self.path / THUMBNAILS).mkdir(parents=True, exist_ok=True)
        for file in (self.page, self.path / RUN, *(self.path / THUMBNAILS).glob("*.webp")):
            file.unlink(missing_ok=True)
        (self.path / IMAGES).write_bytes(b"")

    def write_run(self, run: Run) -> None:
        """Write or replace what is known of the run."""
        with atomic_write(self.path / RUN) as staged:
            staged.write_text(json.dumps(asdict(run), indent=2))

    def append(self, images: Iterable[Image]) -> None:
        """Append images; other processes can append theirs."""
        lines = "".join(f"{json.dumps(asdict(image))}\n" for image in images)
        append(self.path / IMAGES, lines.encode())

    def write_thumbnail(self, number: int, views: Iterable[Picture.Image]) -> None:
        """Write the views of an image, all of the same size, side by side."""
        pictures = list(views)
        width, height = pictures[0].size
        strip = Picture.new("RGB", (width * len(pictures), height))
        for place, picture in enumerate(pictures):
            strip.paste(picture, (place * width, 0))
        strip.save(self.thumbnail(number), format="WEBP", quality=QUALITY)

    def thumbnail(self, number: int) -> Path:
        """File of the views of an image."""
        return self.path / THUMBNAILS / f"{number:06d}.webp"

    def read(self) -> tuple[Run, list[Image]]:
        """The run and its images, of an interrupted run those that were done.

        Raises:
            FileNotFoundError: If there are no data of a report.
            ValueError: If they are damaged.
        """
        if not (self.path / RUN).is_file():
            msg = (
                f"'{self.path.parent}' has no {FOLDER}/{RUN}. Name the folder of a run that was made with "
                "--model.report true, where its images folder and tables are."
            )
            raise FileNotFoundError(msg)
        lines = (self.path / IMAGES).read_text().splitlines(keepends=True)
        try:
            run = Run(**json.loads((self.path / RUN).read_text()))
            # half a line is of a run that was killed
            return run, [_image(json.loads(line)) for line in lines if line.endswith("\n")]
        except (TypeError, ValueError) as error:
            msg = f"The data of the report in '{self.path}' are damaged: {error}. Test or predict again."
            raise ValueError(msg) from error


def _image(values: dict[str, Any]) -> Image:
    return Image(**values | {"views": tuple(values.get("views", ()))})
