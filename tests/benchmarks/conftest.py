"""The model that is measured: of a checkpoint, or trained in minutes."""

import os

import pytest
from anomalib.engine import Engine

from decodiff_anomalib import DeCoDiff, MultiCategory


@pytest.fixture(scope="module")
def model(data: MultiCategory, tmp_path_factory: pytest.TempPathFactory) -> DeCoDiff:
    """The model of ``DECODIFF_CHECKPOINT``, or one trained on ``data`` of the module."""
    given = os.environ.get("DECODIFF_CHECKPOINT")
    if given:
        return DeCoDiff.load_from_checkpoint(given, map_location="cpu").eval()
    model = DeCoDiff(preset="fast")
    Engine(default_root_dir=tmp_path_factory.mktemp("run"), accelerator="cpu", logger=False).fit(model, datamodule=data)
    return model.cpu().eval()
