"""A run's warnings are those that a user can act on."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from anomalib.engine import Engine
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors import data_connector

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.data import DemoTextures

LOOPS = "lightning.pytorch.loops.utilities"


class Warns(Callback):
    """Stands for whatever else has something to say."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warnings.warn("The lamp flickers.", stacklevel=2)


def test_training_testing_and_predicting_show_only_unrelated_warnings(
    data_root: Path, gravel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda devices: 8)  # as on a larger computer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = DeCoDiff("fast", 64, train_steps=2)
        engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[Warns()])
        datamodule = DemoTextures(root=data_root)
        engine.fit(model, datamodule=datamodule)
        engine.test(model, datamodule=datamodule)
        engine.predict(model, data_path=gravel / "test" / "good")
        (checkpoint,) = tmp_path.rglob("v0/weights/lightning/model.ckpt")
        later = Engine(default_root_dir=tmp_path / "later", accelerator="cpu", logger=False)
        later.predict(DeCoDiff(), data_path=gravel / "test" / "good", ckpt_path=checkpoint)
        assert [str(one.message) for one in caught] == ["The lamp flickers."]
        warnings.warn_explicit("`max_epochs` was not set.", UserWarning, "utilities.py", 1, LOOPS)
    assert len(caught) == 2, "after a run, nothing is left out"
    assert "will override existing callbacks" not in caplog.text
    assert "Tip: " not in caplog.text


@pytest.mark.parametrize("options", [[], ["-W", "default"]])
def test_importing_anomalibs_models_warns_only_on_request(options: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *options, "-c", "import anomalib.models"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
        capture_output=True,
        text=True,
        check=True,
    )
    for message in ("timm.models.layers is deprecated", "anomalib.models.components.dinov2 package is deprecated"):
        assert (message in result.stderr) == bool(options)
