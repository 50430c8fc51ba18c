"""Three small categories on disk, and a datamodule of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from decodiff_anomalib.data import MultiCategory

# All images of a category have the same grey value, so that the pixels identify the category.
GREY_VALUES = {"bolt": 40, "felt": 120, "tile": 200}
SIZES = {"bolt": (48, 64), "felt": (80, 40), "tile": (32, 32)}
TRAIN = {"bolt": 40, "felt": 20, "tile": 8}
TEST = {
    "bolt": {"good": 4, "dent": 2, "scratch": 3},
    "felt": {"good": 3, "hole": 2},
    "tile": {"good": 2, "crack": 4},
}


@pytest.fixture(scope="session")
def grey_values() -> dict[str, int]:
    """Grey value of all images of each category."""
    return GREY_VALUES


@pytest.fixture(scope="session")
def sizes() -> dict[str, tuple[int, int]]:
    """Width and height of the images of each category."""
    return SIZES


@pytest.fixture(scope="session")
def write_image() -> Callable[..., None]:
    """Function that writes an image of one grey value."""

    def write(path, size, value, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, value).convert(mode).save(path)

    return write


@pytest.fixture(scope="session")
def write_category(write_image) -> Callable[..., None]:
    """Function that writes the images of a category; each mask marks the left half of its image."""

    def write(folder, name, suffix=".png", mode="RGB", masks=True):
        width, height = SIZES[name]
        for index in range(TRAIN[name]):
            path = folder / name / "train" / "good" / f"{index:03d}{suffix}"
            write_image(path, (width, height), GREY_VALUES[name], mode)
        for label, count in TEST[name].items():
            for index in range(count):
                path = folder / name / "test" / label / f"{index:03d}{suffix}"
                write_image(path, (width, height), GREY_VALUES[name], mode)
                if masks and label != "good":
                    mask = np.zeros((height, width), np.uint8)
                    mask[:, : width // 2] = 255
                    path = folder / name / "ground_truth" / label / f"{index:03d}_mask.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(path)

    return write


@pytest.fixture(scope="session")
def root(tmp_path_factory, write_category) -> Path:
    """Colour with masks, grey JPEG without masks, grey with masks; and two folders that are not categories."""
    root = tmp_path_factory.mktemp("data") / "parts"
    write_category(root, "bolt")
    write_category(root, "felt", suffix=".jpg", mode="L", masks=False)
    write_category(root, "tile", mode="L")
    (root / "notes").mkdir()
    (root / ".hidden" / "train").mkdir(parents=True)
    return root


@pytest.fixture(scope="session")
def set_up() -> Callable[..., MultiCategory]:
    """Function that builds a datamodule and sets it up."""

    def build(root=None, **arguments):
        datamodule = MultiCategory(root, **({"num_workers": 0, "eval_batch_size": 4} | arguments))
        datamodule.prepare_data()
        datamodule.setup()
        return datamodule

    return build
