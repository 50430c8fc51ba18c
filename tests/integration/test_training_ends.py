"""However a training ends or goes on: the same model, with thresholds and a checkpoint, or an error that says why."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from PIL import Image
from torchvision.transforms.v2 import RandomHorizontalFlip

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.data import MultiCategory

STEPS = 6


def write_images(folder: Path, count: int, value: int | None = None, seed: int = 0) -> None:
    """Noise, or images of one grey value."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(seed)
    for index in range(count):
        pixels = np.full((64, 64), value) if value is not None else noise.integers(60, 200, (64, 64))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02}.png")


def write_category(folder: Path, count: int = 20, value: int | None = None) -> None:
    write_images(folder / "train" / "good", count, value)
    write_images(folder / "test" / "good", 2, value, seed=1)
    write_images(folder / "test" / "spot", 2, value, seed=2)
    for path in (folder / "test" / "spot").iterdir():
        pixels = np.asarray(Image.open(path)).copy()
        pixels[30:34, 30:34] = 255
        Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_category(folder / "noise")
    return folder


def data(root: Path, **arguments: object) -> MultiCategory:
    return MultiCategory(root=root, **{"num_workers": 0, "train_batch_size": 3} | arguments)


def tiny(**arguments: object) -> DeCoDiff:
    return DeCoDiff(**{"preset": "fast", "image_size": 64, "train_steps": STEPS} | arguments)


def engine(folder: Path, **arguments: object) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, **arguments)


def weights(model: DeCoDiff) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.model.denoiser.parameters()])


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> DeCoDiff:
    """Trained without an interruption."""
    model = tiny()
    engine(tmp_path_factory.mktemp("whole")).fit(model, datamodule=data(root))
    return model


class Terminate(Callback):
    """Sends SIGTERM to this process at one step, in training or in the validation after it."""

    def __init__(self, step: int, *, validating: bool = False) -> None:
        self.step, self.validating = step, validating

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step and not self.validating:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.step and self.validating:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("terminate", [Terminate(1), Terminate(2, validating=True), Terminate(3)])
def test_a_terminated_training_ends_as_an_uninterrupted_one(
    root: Path, whole: DeCoDiff, tmp_path: Path, terminate: Terminate
) -> None:
    """In the middle of an epoch (of 17 images in batches of 2), and in a validation."""
    with pytest.raises(SystemExit) as stopped:
        engine(tmp_path, callbacks=[terminate]).fit(tiny(), datamodule=data(root, eval_batch_size=1))
    assert not stopped.value.code
    (path,) = tmp_path.rglob("interrupted.ckpt")
    resumed = DeCoDiff(preset="fast", train_steps=STEPS)  # the checkpoint is enough: it knows the image size
    engine(tmp_path).fit(resumed, datamodule=data(root, eval_batch_size=1), ckpt_path=path)
    assert torch.equal(weights(resumed), weights(whole))
    torch.testing.assert_close(resumed.post_processor.image_thresholds, whole.post_processor.image_thresholds)


def test_a_checkpoint_of_a_killed_training_continues_it(root: Path, whole: DeCoDiff, tmp_path: Path) -> None:
    """As after SIGKILL: all that is left is what was written at the last validation."""
    kept = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    engine(tmp_path, callbacks=[kept]).fit(tiny(), datamodule=data(root))
    for step in (2, 5):
        resumed = tiny()
        engine(tmp_path).fit(resumed, datamodule=data(root), ckpt_path=tmp_path / "kept" / f"step={step}.ckpt")
        assert torch.equal(weights(resumed), weights(whole)), step


def test_workers_do_not_change_the_model(root: Path, tmp_path: Path) -> None:
    """Not even with random augmentations, which draw from the state of the worker."""

    def trained(num_workers: int) -> torch.Tensor:
        model = tiny()
        augmented = data(root, num_workers=num_workers, train_augmentations=RandomHorizontalFlip())
        engine(tmp_path).fit(model, datamodule=augmented)
        return weights(model)

    assert torch.equal(trained(0), trained(1))


def test_train_with_a_checkpoint_tests_what_it_trained(root: Path, whole: DeCoDiff, tmp_path: Path) -> None:
    kept = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    engine(tmp_path, callbacks=[kept]).fit(tiny(), datamodule=data(root))
    model = tiny()
    engine(tmp_path).train(model, datamodule=data(root), ckpt_path=tmp_path / "kept" / "step=2.ckpt")
    assert torch.equal(weights(model), weights(whole))
    assert model.post_processor.has_thresholds


def test_a_test_after_a_fit_loads_the_averaged_weights(root: Path, tmp_path: Path) -> None:
    own, model = engine(tmp_path), tiny()
    own.fit(model, datamodule=data(root))
    averaged = weights(model)
    own.test(model, datamodule=data(root), ckpt_path=own.best_model_path)
    assert torch.equal(weights(model), averaged)


class Stop(Callback):
    """Asks for the end of training after an epoch, when the validation is over."""

    def on_train_epoch_end(self, trainer, *_) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(
    "arguments",
    [
        lambda: {"callbacks": [EarlyStopping("train_loss", patience=0, min_delta=1e9, check_on_train_epoch_end=True)]},
        lambda: {"callbacks": [Stop()]},
        lambda: {"max_epochs": 1, "check_val_every_n_epoch": 50},
        lambda: {"max_steps": 2, "val_check_interval": 1.0, "check_val_every_n_epoch": 5},
        lambda: {"max_epochs": 1, "callbacks": [ModelCheckpoint(filename="own", every_n_train_steps=1)]},
    ],
)
def test_every_end_has_thresholds_and_a_checkpoint(root: Path, tmp_path: Path, arguments: Callable) -> None:
    model = tiny(train_steps=40)
    own = engine(tmp_path, **arguments())
    own.fit(model, datamodule=data(root))
    assert model.post_processor.has_thresholds
    loaded = DeCoDiff.load_from_checkpoint(own.best_model_path)
    assert torch.equal(loaded.post_processor.image_thresholds, model.post_processor.image_thresholds)
    assert torch.equal(weights(loaded), weights(model))


def test_early_stopping_by_a_validation_metric_is_served(root: Path, tmp_path: Path) -> None:
    """Lightning reads the interval of validations before training starts."""

    class Watched(DeCoDiff):
        def on_validation_epoch_end(self) -> None:
            self.log("watched", 1.0)

    model = Watched(preset="fast", image_size=64, train_steps=STEPS)
    engine(tmp_path, callbacks=[EarlyStopping("watched", patience=0)]).fit(model, datamodule=data(root))
    assert model.post_processor.has_thresholds


def test_what_cannot_end_well_is_refused_before_it_starts(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit_val_batches=0 leaves no images"):
        engine(tmp_path, limit_val_batches=0).fit(tiny(), datamodule=data(root))
    with pytest.raises(ValueError, match=r"trainer\.precision=bf16-true stores the model in another precision"):
        engine(tmp_path, precision="bf16-true").fit(tiny(), datamodule=data(root))
    twice = engine(tmp_path)
    twice.fit(tiny(train_steps=1), datamodule=data(root))
    with pytest.raises(RuntimeError, match="Give each model its own Engine"):
        twice.fit(tiny(), datamodule=data(root))
    with pytest.raises(ValueError, match="0 normal validation images; thresholds need 4"):
        engine(tmp_path).fit(tiny(calibration_split=0.0), datamodule=data(root, val_split_mode="none"))


def test_no_validation_split_holds_out_training_images(root: Path, tmp_path: Path) -> None:
    datamodule, model = data(root, val_split_mode="none"), tiny()
    engine(tmp_path).train(model, datamodule=datamodule)
    assert model.post_processor.has_thresholds
    assert "val_data" not in vars(datamodule)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 10, 13])
def test_few_images_are_served_or_refused_with_the_number_needed(tmp_path: Path, count: int) -> None:
    write_images(tmp_path / "good", count)
    modes = {"test_split_mode": "none", "val_split_mode": "none"}
    folder = Folder("few", root=tmp_path, normal_dir="good", num_workers=0, **modes)
    model = tiny(train_steps=1)
    if count < 8:
        with pytest.raises(ValueError, match=f"{count} training images; 8 or more are needed, 4 of them"):
            engine(tmp_path / "run").fit(model, datamodule=folder)
    else:
        engine(tmp_path / "run").fit(model, datamodule=folder)
        assert 0 < model.post_processor.image_threshold < 100


def test_one_validation_image_is_refused(tmp_path: Path) -> None:
    write_category(tmp_path / "part", 8)
    write_images(tmp_path / "part" / "validation" / "good", 1)
    with pytest.raises(ValueError, match="1 normal validation images; thresholds need 4"):
        engine(tmp_path / "run").fit(tiny(), datamodule=data(tmp_path))


@pytest.mark.parametrize("value", [0, 128])
def test_constant_images_have_no_deviation_and_a_changed_pixel_is_found(tmp_path: Path, value: int) -> None:
    write_category(tmp_path / "black", 12, value)
    write_category(tmp_path / "noise", 12)
    model = tiny()
    own = engine(tmp_path / "run")
    own.fit(model, datamodule=data(tmp_path))
    assert weights(model).isfinite().all()
    for batch in own.predict(model, datamodule=data(tmp_path, eval_batch_size=1)):
        (path,) = batch.image_path
        assert 0 <= float(batch.pred_score) <= 1
        assert batch.anomaly_map.isfinite().all()
        if "/black/" in path:
            assert bool(batch.pred_label) == ("/spot/" in path)
            assert batch.pred_category == ["unknown" if "/spot/" in path else "black"]


def test_a_loss_that_is_not_finite_names_step_and_images(root: Path, tmp_path: Path) -> None:
    class Breaks(DeCoDiff):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                self.model.denoiser.unet.conv_out.weight.data.fill_(float("nan"))
            return super().training_step(batch, batch_idx)

    model = Breaks(preset="fast", image_size=64, train_steps=STEPS)
    with pytest.raises(ValueError, match=r"loss is nan in step 4, at images of noise: .*good/\d\d\.png"):
        engine(tmp_path).fit(model, datamodule=data(root))
    (path,) = tmp_path.rglob("model.ckpt")  # of the validation before
    assert weights(DeCoDiff.load_from_checkpoint(path)).isfinite().all()


def test_a_full_disk_leaves_the_last_good_checkpoint(root: Path, tmp_path: Path, monkeypatch) -> None:
    save, written = torch.save, []

    def full_at_the_second(checkpoint, path) -> None:
        save(checkpoint, path)
        written.append(Path(path))
        if len(written) == 2:
            os.truncate(path, 1000)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_at_the_second)
    with pytest.raises(OSError, match=r"model\.ckpt' cannot be written: .*No space left.*Make room"):
        engine(tmp_path).fit(tiny(), datamodule=data(root))
    (path,) = tmp_path.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == STEPS // 3
    assert {staged.parent for staged in written} == {path.parent}, "staged on another file system, perhaps"


def test_the_seed_is_that_of_seed_everything(monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path) -> None:
    def trained(built: str, fitted: str, **arguments: object) -> torch.Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", built)
        model = tiny(train_steps=1, **arguments)
        monkeypatch.setenv("PL_GLOBAL_SEED", fitted)  # as `anomalib benchmark`, which seeds after it has built
        engine(tmp_path).fit(model, datamodule=data(root))
        return weights(model)

    one = trained("1", "1")
    assert torch.equal(one, trained("0", "1"))
    assert torch.equal(one, trained("5", "5", seed=1))
    assert not torch.equal(one, trained("2", "2"))
    assert os.environ["PL_GLOBAL_SEED"] == "2", "a model's own seed is not that of later models"
    trained("5", "5", seed=1)
    assert os.environ["PL_GLOBAL_SEED"] == "5"


def test_a_training_cannot_go_on_with_another_seed(root: Path, tmp_path: Path) -> None:
    own = engine(tmp_path)
    own.fit(tiny(seed=3), datamodule=data(root))
    moved = shutil.copy(own.best_model_path, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"trained with seed 3, .* Resume with --model.seed 3"):
        engine(tmp_path).fit(tiny(seed=4), datamodule=data(root), ckpt_path=moved)
