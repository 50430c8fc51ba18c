"""Paths to the reference material that some tests compare with."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Numbers recorded from the authors' implementation."""
    if not (SHARED / "parity").is_dir():
        pytest.skip(f"no recorded reference numbers at {SHARED / 'parity'}")
    return SHARED / "parity"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real images with defects, MVTec-AD layout."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no real images at {SHARED / 'data'}")
    return SHARED / "data"


@pytest.fixture(scope="session")
def assert_within_tolerance() -> Callable[[Iterable[tuple[str, float, float]]], None]:
    """Check of (fixture, largest difference, tolerance) rows that names every row beyond its tolerance."""

    def check(comparisons: Iterable[tuple[str, float, float]]) -> None:
        rows = list(comparisons)
        assert rows
        worse = [f"{name}: {found:.3g} > {tolerance:.3g}" for name, found, tolerance in rows if found > tolerance]
        assert not worse, "\n".join(worse)

    return check


@pytest.fixture(scope="session")
def small_codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random autoencoder with the stride, channels and scale of Stable Diffusion's."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).save_pretrained(folder)
    return folder
