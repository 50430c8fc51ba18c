"""The learning rate of whole trainings through Anomalib's engine, against the recorded schedule of the authors."""

import json
from pathlib import Path

import numpy as np
import pytest
from anomalib.engine import Engine
from lightning.pytorch import Callback
from PIL import Image

from decodiff_anomalib import DeCoDiff, MultiCategory


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One category of fourteen training images, four of which set the thresholds."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for folder, count in {"train/good": 14, "test/good": 1, "test/bad": 1}.items():
        (root / "part" / folder).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "part" / folder / f"{index}.png")
    return root


class Rates(Callback):
    """Notes the learning rate of every batch, and stops after some epochs."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rates: list[list[float]] = []
        self.stop_after = stop_after

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.rates.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.rates[-1].append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = len(self.rates) == self.stop_after


def train(parts: Path, tmp_path: Path, rates: Rates, model: dict | None = None, resume: Path | None = None, **engine):
    """The paper preset with a small network on three batches an epoch; the trainer that did it."""
    denoiser = {"width": 32, "head_channels": 8, "context_width": 16, "layers": 1, "multipliers": [1, 1, 1]}
    small = DeCoDiff(preset="paper", image_size=32, codec="bundled", denoiser=denoiser, visualizer=False, **model or {})
    arguments = {"default_root_dir": tmp_path, "accelerator": "cpu", "logger": False, "check_val_every_n_epoch": 1000}
    trained = Engine(**arguments | engine, callbacks=[rates])
    datamodule = MultiCategory(parts, train_batch_size=4, num_workers=0, val_split_ratio=0.17)
    trained.fit(small, datamodule=datamodule, ckpt_path=resume)
    return trained.trainer


@pytest.mark.parametrize(("run", "stop_after"), [(0, 13), (1, None), (2, None)])
def test_learning_rate_of_every_epoch_is_the_published_one(
    run: int, stop_after: int | None, parts: Path, parity_dir: Path, tmp_path: Path
) -> None:
    recorded = json.loads((parity_dir / "lr_schedule.json").read_text())[run]
    model = {"learning_rate": recorded["lr"], "settings": {"training": {"warmup_steps": 3 * recorded["warmup_epochs"]}}}
    train(parts, tmp_path, noted := Rates(stop_after), model, max_epochs=recorded["epochs"])
    assert [len(set(epoch)) for epoch in noted.rates] == [1] * (stop_after or recorded["epochs"])
    found = [epoch[0] for epoch in noted.rates]
    np.testing.assert_allclose(found, recorded["lr_used_in_epoch"][:stop_after], rtol=0, atol=1e-15)


def test_a_resumed_training_goes_on_where_it_stopped(parts: Path, parity_dir: Path, tmp_path: Path) -> None:
    recorded = json.loads((parity_dir / "lr_schedule.json").read_text())[1]
    model = {"learning_rate": recorded["lr"], "settings": {"training": {"warmup_steps": 3 * recorded["warmup_epochs"]}}}
    duration = {"max_epochs": recorded["epochs"], "check_val_every_n_epoch": 1}
    stopped = train(parts, tmp_path, first := Rates(2), model, **duration)
    checkpoint = Path(stopped.checkpoint_callback.best_model_path)
    train(parts, tmp_path, second := Rates(3), model, checkpoint, **duration)
    found = [epoch[0] for epoch in first.rates + second.rates]
    np.testing.assert_allclose(found, recorded["lr_used_in_epoch"][:5], rtol=0, atol=1e-15)


def test_published_numbers_of_steps_are_the_presets(parts: Path, tmp_path: Path) -> None:
    """MVTec AD: 26 micro-batches make 13 steps an epoch. Here the same 800 and 10 epochs at 2 steps an epoch."""
    model = {"settings": {"training": {"warmup_steps": 130 * 2 // 13, "steps": 10_400 * 2 // 13}}}
    train(parts, tmp_path, noted := Rates(2), model, accumulate_grad_batches=2)
    assert [epoch[0] for epoch in noted.rates] == pytest.approx([0, 1e-5], abs=1e-15)


@pytest.mark.parametrize("duration", [{"max_epochs": 3}, {"max_steps": 9}])
def test_schedule_lasts_as_long_as_the_training(duration: dict, parts: Path, tmp_path: Path) -> None:
    train(parts, tmp_path, noted := Rates(), {"settings": {"training": {"warmup_steps": 0}}}, **duration)
    expected = [1e-4 * (1 + np.cos(np.pi * epoch / 4.5)) / 2 for epoch in range(3)]
    assert [epoch[0] for epoch in noted.rates] == pytest.approx(expected, abs=1e-15)


def test_a_left_over_micro_batch_is_a_step_of_its_own(parts: Path, tmp_path: Path) -> None:
    """Three micro-batches an epoch, two a step: the authors' program makes 3 steps in two epochs, Lightning 4."""
    assert train(parts, tmp_path, Rates(), max_epochs=2, accumulate_grad_batches=2).global_step == 4
