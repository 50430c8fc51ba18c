"""Data of a report as a run leaves them."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from decodiff_anomalib.report.records import Image, ReportFolder, Run

VIEWS = ("image", "correction", "map", "mask")


def noise(number: int, side: int = 40) -> Picture.Image:
    """As hard to compress as a picture can be."""
    return Picture.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def write_report(tmp_path: Path) -> Callable[..., ReportFolder]:
    """Write the data of a run: its images, and a thumbnail of noise for each."""

    def write(images: list[Image], threshold: float | None = 0.5, **known: object) -> ReportFolder:
        folder = ReportFolder(tmp_path / "run")
        folder.begin()
        folder.write_run(Run("DeCoDiff test", "parts", "2026-01-02T03:04:05+00:00", threshold, **known))
        folder.append(images)
        for one in images:
            if one.views:
                folder.write_thumbnail(one.number, [noise(one.number)] * len(one.views))
        return folder

    return write


@pytest.fixture
def three_categories() -> list[Image]:
    """Scores of 60 labelled images, some on the wrong side of 0.5."""
    generator = np.random.default_rng(0)
    images = []
    for number in range(60):
        defective = bool(generator.random() < 0.4)
        score = 1 / (1 + math.exp(-generator.normal(1 if defective else -1)))
        category = ("bolt", "felt", "unknown")[number % 3]
        images.append(Image(number, f"/data/{category}/{number:04d}.png", category, defective, score, views=VIEWS))
    return images
