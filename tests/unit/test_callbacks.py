"""Each callback by itself, with a trainer that only has what it reads."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import AnomalibDataset, ImageBatch
from anomalib.data.utils.split import ValSplitMode
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from decodiff_anomalib.callbacks import (
    HoldOutNormals,
    ImageFiles,
    LoaderLimits,
    TrainingDuration,
    WeightAveraging,
    training_duration,
)


class Images(AnomalibDataset):
    """Normal images that are never read."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.samples = pd.DataFrame({"image_path": [__file__] * count, "split": "train", "label_index": 0})


class Datamodule:
    """What the callbacks read and change of a datamodule."""

    def __init__(self, mode: ValSplitMode = ValSplitMode.SAME_AS_TEST) -> None:
        self.num_workers, self.train_batch_size = 10_000, 32
        self.train_data, self.val_data, self.val_split_mode = Images(20), "test images", mode
        self.setups: list[str] = []

    def setup(self, stage: str) -> None:
        self.setups.append(stage)


def trainer_of(datamodule: object, **attributes: object) -> SimpleNamespace:
    return SimpleNamespace(datamodule=datamodule, **attributes)


def test_loaders_are_limited_for_the_fit_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    datamodule, limits = Datamodule(), LoaderLimits(max_batch_size=4)
    limits.setup(trainer_of(datamodule), None, "test")
    assert (datamodule.num_workers, datamodule.train_batch_size) == (10_000, 32)
    limits.setup(trainer_of(datamodule), None, "fit")
    assert (datamodule.num_workers, datamodule.train_batch_size) == (3, 4)
    limits.teardown(trainer_of(datamodule), None, "fit")
    assert (datamodule.num_workers, datamodule.train_batch_size) == (10_000, 32)
    LoaderLimits(None).setup(trainer_of(datamodule), None, "fit")
    assert datamodule.train_batch_size == 32
    LoaderLimits(4).setup(trainer_of(None), None, "fit")


@pytest.mark.parametrize("mode", [ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TEST, ValSplitMode.NONE])
def test_normals_are_held_out_where_test_images_would_be_used(mode: ValSplitMode) -> None:
    datamodule, callback = Datamodule(mode), HoldOutNormals(0.25, seed=0)
    before = datamodule.train_data
    callback.setup(trainer_of(datamodule), None, "fit")
    assert (len(datamodule.train_data), len(datamodule.val_data)) == (15, 5)
    assert datamodule.setups == ["fit"]
    callback.teardown(trainer_of(datamodule), None, "fit")
    assert (datamodule.train_data, datamodule.val_data) == (before, "test images")


def test_own_validation_images_are_used() -> None:
    for datamodule, share in ((Datamodule(ValSplitMode.FROM_TRAIN), 0.15), (Datamodule(), 0.0)):
        HoldOutNormals(share, seed=0).setup(trainer_of(datamodule), None, "fit")
        assert datamodule.val_data == "test images"


def test_an_attribute_that_was_not_there_is_removed() -> None:
    datamodule, callback = Datamodule(ValSplitMode.NONE), HoldOutNormals(0.25, seed=0)
    del datamodule.val_data
    callback.setup(trainer_of(datamodule), None, "fit")
    callback.teardown(trainer_of(datamodule), None, "fit")
    assert not hasattr(datamodule, "val_data")


def test_image_files_are_checked_and_16_bit_images_restored(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray((values >> 8).astype(np.uint8)).save(tmp_path / "plain.png")
    paths = [str(tmp_path / name) for name in ("deep.png", "plain.png")]
    data = SimpleNamespace(samples=pd.DataFrame({"image_path": paths}))
    files, model = ImageFiles(), SimpleNamespace(white_level=None)
    files.on_test_start(trainer_of(SimpleNamespace(test_data=data), state=SimpleNamespace(fn="test")), model)
    assert model.white_level == 65535
    batch = ImageBatch(image=torch.ones(2, 3, 8, 8), image_path=paths)
    files.reread(batch, model.white_level)
    torch.testing.assert_close(batch.image[0, 0].numpy(), (values / 65535).astype(np.float32), atol=1e-6, rtol=0)
    assert (batch.image[1] == 1).all()
    (tmp_path / "plain.png").write_text("not an image")
    with pytest.raises(ValueError, match="1 of 2 image files cannot be read"):
        files.on_predict_start(SimpleNamespace(predict_dataloaders=SimpleNamespace(dataset=data)), model)


def test_the_white_level_is_settled_by_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def dataset(name: str, highest: int) -> SimpleNamespace:
        Image.fromarray(np.full((8, 8), highest, np.uint16)).save(tmp_path / name)
        return SimpleNamespace(samples=pd.DataFrame({"image_path": [str(tmp_path / name)]}))

    train, val, test = (dataset(f"{value}.png", value) for value in (900, 4000, 4096))
    data = SimpleNamespace(train_data=train, val_data=val, test_data=test)

    def trainer(stage: str, ckpt_path: str | None = None) -> SimpleNamespace:
        return trainer_of(data, state=SimpleNamespace(fn=TrainerFn(stage)), ckpt_path=ckpt_path)

    model = SimpleNamespace(white_level=65535.0, hparams={"white_level": None})
    files = ImageFiles()
    files.on_fit_start(trainer("fit"), model)
    assert model.white_level == 4095  # of the held-out images too
    files.on_validation_start(trainer("validate"), model)
    with pytest.raises(
        ValueError, match=r"4096\.png: its highest value 4096 is above the white level 4095, .*--model\."
    ):
        files.on_test_start(trainer("test"), model)
    stated = SimpleNamespace(white_level=4096.0, hparams={"white_level": 4096.0})
    for stage, start in (("fit", files.on_fit_start), ("test", files.on_test_start)):
        start(trainer(stage), stated)
    assert stated.white_level == 4096
    resumed = SimpleNamespace(white_level=16383.0, hparams={"white_level": None})
    files.on_fit_start(trainer("fit", ckpt_path="last.ckpt"), resumed)
    assert resumed.white_level == 16383
    assert not caplog.records
    untrained = SimpleNamespace(white_level=None)
    files.on_validation_start(trainer("validate"), untrained)
    assert untrained.white_level == 4095
    assert "The model has no white level" in caplog.text


def duration_trainer(**changes: object) -> SimpleNamespace:
    """A trainer of ten batches an epoch, as Lightning makes it when the user gives no duration."""
    values = {
        "max_epochs": 1000,
        "max_steps": -1,
        "num_training_batches": 10,
        "accumulate_grad_batches": 2,
        "check_val_every_n_epoch": 1,
        "val_check_interval": 1.0,
        "val_check_batch": 10,
        "estimated_stepping_batches": 77,
        "global_step": 0,
        "should_stop": False,
        "limit_val_batches": 1.0,
        "strategy": SimpleNamespace(launcher=None),
        "fit_loop": SimpleNamespace(
            max_epochs=1000,
            epoch_loop=SimpleNamespace(max_steps=-1),
            epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)),
        ),
    }
    return SimpleNamespace(**values | changes)


def test_the_duration_is_the_models_unless_the_trainer_has_one() -> None:
    duration, trainer = TrainingDuration(12), duration_trainer()
    assert duration.total_steps(trainer) == 12
    duration.prepare(trainer)
    duration.on_train_start(trainer, None)
    assert (trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps) == (3, 12)
    assert (trainer.check_val_every_n_epoch, trainer.val_check_batch) == (None, 8)  # a third of the steps, in batches
    for given in ({"max_epochs": 7}, {"max_steps": 5}):
        trainer = duration_trainer(**given)
        assert duration.total_steps(trainer) == 77
        duration.on_train_start(trainer, None)
        assert trainer.fit_loop.max_epochs == 1000


def test_a_validation_interval_of_the_user_is_kept() -> None:
    duration, trainer = TrainingDuration(12), duration_trainer(val_check_interval=4)
    duration.prepare(trainer)
    duration.on_train_start(trainer, None)
    assert (trainer.check_val_every_n_epoch, trainer.val_check_batch) == (1, 10)


def test_the_last_step_ends_with_a_validation() -> None:
    for step, stops in ((4, False), (5, True)):
        trainer = duration_trainer(max_steps=5, global_step=step)
        TrainingDuration(12).on_train_batch_end(trainer, None, None, None, 0)
        assert trainer.should_stop is stops


def test_the_minutes_left_are_logged_at_the_present_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 160.0, 220.0, 500.0, 530.0])
    monkeypatch.setattr(training_duration.time, "monotonic", lambda: next(times))
    logged: list[float] = []
    model = SimpleNamespace(log=lambda name, value, **_: logged.append(value))
    duration = TrainingDuration(12)
    for step in (0, 2):
        duration.on_train_batch_start(duration_trainer(global_step=step), model, None, 0)
    assert logged == [pytest.approx(5.0)]  # 2 steps a minute, 10 of 12 left
    endless = duration_trainer(max_epochs=7, global_step=4, estimated_stepping_batches=math.inf)
    duration.on_train_batch_start(endless, model, None, 0)
    assert len(logged) == 1
    duration.on_train_start(duration_trainer(), model)  # of another fit
    for step in (0, 1):
        duration.on_train_batch_start(duration_trainer(global_step=step), model, None, 0)
    assert logged[1:] == [pytest.approx(5.5)]


def test_averaging_swaps_weights_back_and_keeps_what_validation_measured() -> None:
    """One step of the average (Tarvainen & Valpola, 2017): decay * old + (1 - decay) * new."""
    model = LightningModule()
    model.weight = torch.nn.Parameter(torch.zeros(1))
    model.register_buffer("measured", torch.zeros(1))
    averaging = WeightAveraging(decay=0.9)
    averaging.setup(None, model, "fit")
    torch.nn.init.constant_(model.weight, 1.0)
    averaging._average_model.update_parameters(model)  # the first is a copy
    torch.nn.init.constant_(model.weight, 2.0)
    averaging._average_model.update_parameters(model)
    averaging.on_validation_epoch_start(None, model)
    assert model.weight.item() == pytest.approx(0.9 * 1 + 0.1 * 2)
    model.measured.fill_(5.0)
    averaging.on_validation_epoch_end(None, model)
    assert model.weight.item() == pytest.approx(2.0)
    assert model.measured.item() == 5.0
