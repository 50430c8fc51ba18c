"""Small models and images for tests that try to break the package."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from anomalib.engine import Engine
from PIL import Image

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.data import MultiCategory

SIDE = 64


def write_noise(folder: Path, count: int, *, seed: int, spot: bool = False) -> None:
    """Grey noise of one brightness, some with a white spot."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(seed)
    for index in range(count):
        pixels = noise.integers(60, 160, (SIDE, SIDE), dtype=np.uint8)
        if spot:
            row, column = noise.integers(0, SIDE - 8, 2)
            pixels[row : row + 8, column : column + 8] = 255
        Image.fromarray(pixels).save(folder / f"{index:03}.png")


@pytest.fixture(scope="session")
def noise_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories, as a root of ``MultiCategory``."""
    root = tmp_path_factory.mktemp("noise")
    for seed, category in enumerate(("bolt", "felt")):
        write_noise(root / category / "train" / "good", 20, seed=seed)
        write_noise(root / category / "test" / "good", 6, seed=10 + seed)
        write_noise(root / category / "test" / "spot", 6, seed=20 + seed, spot=True)
    return root


@pytest.fixture(scope="session")
def new_model() -> Callable[..., DeCoDiff]:
    """Makes a small model."""

    def make(**arguments: object) -> DeCoDiff:
        given = {"preset": "fast", "image_size": SIDE, "denoiser": "nano", "train_steps": 6, "seed": 0}
        return DeCoDiff(**given | arguments)

    return make


@pytest.fixture(scope="session")
def checkpoint(noise_root: Path, new_model: Callable[..., DeCoDiff], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small model of both categories."""
    folder = tmp_path_factory.mktemp("trained")
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(new_model(), datamodule=MultiCategory(noise_root, num_workers=0))
    (path,) = folder.rglob("model.ckpt")
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of both exports."""
    root = tmp_path_factory.mktemp("exported")
    model = DeCoDiff.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False).eval()
    model.to_onnx(root)
    model.to_openvino(root)
    return root
