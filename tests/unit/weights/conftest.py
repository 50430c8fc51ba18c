"""Small networks and checkpoints of them."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from decodiff_anomalib.denoiser import Denoiser, DenoiserSize, build_denoiser
from decodiff_anomalib.weights import DenoiserConfig, to_official_state

SIZE = DenoiserSize(32, 8, 16, layers=1, multipliers=(1, 1, 1))


@pytest.fixture(scope="session")
def make_denoiser() -> Callable[..., Denoiser]:
    """Function that builds a small network without zeros in its weights."""

    def make(num_categories: int = 3, latent_channels: int = 4, size: DenoiserSize = SIZE) -> Denoiser:
        denoiser = build_denoiser(size, latent_channels, num_categories)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.normal_(std=0.1)
        return denoiser.eval()

    return make


@pytest.fixture(scope="session")
def make_config() -> Callable[..., DenoiserConfig]:
    """Function that returns the description of a network from ``make_denoiser``."""

    def make(denoiser: Denoiser, size: DenoiserSize = SIZE, categories: tuple[str, ...] | None = None):
        rows = denoiser.category_embedding.num_embeddings
        return DenoiserConfig(size, denoiser.unet.config.in_channels, rows, categories, None, "decodiff")

    return make


@pytest.fixture(scope="session")
def save_official() -> Callable[..., Path]:
    """Function that writes a checkpoint as the authors' script does."""

    def save(path: Path, denoiser: Denoiser, **arguments) -> Path:
        torch.save({"model": to_official_state(denoiser), "args": argparse.Namespace(**arguments)}, path)
        return path

    return save


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[[Denoiser, Denoiser], None]:
    """Check that two networks have the same weights."""

    def check(actual: Denoiser, expected: Denoiser) -> None:
        assert actual.state_dict().keys() == expected.state_dict().keys()
        for key, tensor in expected.state_dict().items():
            assert torch.equal(actual.state_dict()[key], tensor), key

    return check
