"""Paths to the reference material that some tests compare with."""

from pathlib import Path

import pytest

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
