"""Reference material that tests compare with; tiers by folder."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: one thread each, and in the processes they start
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

SHARED = Path(__file__).parents[2] / "shared"
INTEGRATION = [Path(__file__).parent / folder for folder in ("integration", "benchmarks", "campaign")]
CAMPAIGN = INTEGRATION[-1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run whole models by their folder."""
    for item in items:
        if any(folder in item.path.parents for folder in INTEGRATION):
            item.add_marker(pytest.mark.integration)
        if CAMPAIGN in item.path.parents:
            item.add_marker(pytest.mark.campaign)


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Numbers recorded from the authors' program, in every clone."""
    return Path(__file__).parent / "parity" / "data"


@pytest.fixture(scope="session")
def large_parity_dir() -> Path:
    """The larger ones, where they lie beside the checkout."""
    if not (SHARED / "parity").is_dir():
        pytest.skip(f"no large recordings at {SHARED / 'parity'}")
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
