"""Training through Anomalib's engine: seeds, splits, durations, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, MVTecAD
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torchvision.transforms.v2 import CenterCrop

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.paper import paper_transform


def test_maps_of_a_cropped_image_lie_where_the_crop_was(gravel: Path, tmp_path: Path) -> None:
    """Of 72 pixels the middle 64 are looked at: on an image of 144, the map begins after 8."""
    cropped = DeCoDiff(image_size=64, pre_processor=PreProcessor(paper_transform((72, 72), (64, 64))))
    torch.nn.init.normal_(cropped.model.denoiser.unet.conv_out.weight, std=0.05)
    picture = Image.open(next((gravel / "test" / "crack").glob("*.png"))).resize((144, 144))
    picture.save(tmp_path / "whole.png")
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    (whole,) = engine.predict(cropped, data_path=tmp_path / "whole.png")
    anomaly_map = whole.anomaly_map[0]
    assert anomaly_map.shape == (144, 144)
    assert anomaly_map[:7].max() == anomaly_map[-7:].max() == anomaly_map[:, :7].max() == 0
    with torch.no_grad():
        outputs = cropped.model(
            cropped.pre_processor.transform(read_image(tmp_path / "whole.png", as_tensor=True)[None])
        )
    expected = torch.nn.functional.interpolate(outputs.anomaly_map, size=(128, 128), mode="bilinear")[0, 0]
    torch.testing.assert_close(anomaly_map[10:-10, 10:-10], expected[2:-2, 2:-2], atol=1e-5, rtol=1e-4)


def fit(tmp_path: Path, datamodule, engine: dict | None = None, **arguments) -> DeCoDiff:
    model = DeCoDiff(**{"image_size": 64, "train_steps": 4} | arguments)
    arguments = {"default_root_dir": tmp_path, "accelerator": "cpu", "logger": False} | (engine or {})
    Engine(**arguments).fit(model, datamodule=datamodule)
    return model


def weights(model: DeCoDiff) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.model.denoiser.parameters()])


def test_training_repeats_with_the_seed(gravel: Path, tmp_path: Path) -> None:
    def trained(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)  # whatever the program did before
        data = MVTecAD(gravel.parent, gravel.name, train_batch_size=16, num_workers=0)
        return weights(fit(tmp_path, data, seed=seed))

    first, again, other = trained(1), trained(1), trained(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_thresholds_never_see_test_images(gravel: Path, tmp_path: Path) -> None:
    """MVTecAD validates on its test set by default; a model that did would set other thresholds."""
    seen: list[str] = []

    class Watching(DeCoDiff):
        def validation_step(self, batch, batch_idx):
            seen.extend(map(str, batch.image_path))
            return super().validation_step(batch, batch_idx)

    data = MVTecAD(gravel.parent, gravel.name, num_workers=0)
    model = Watching(image_size=64, train_steps=2)
    Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False).fit(model, datamodule=data)
    assert len(set(seen)) == 12
    assert all("/train/good/" in path for path in seen)
    assert model.post_processor.image_threshold > 0
    assert len(data.train_data) == 80, "the datamodule gets its images back"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_what_a_gpu_trained_predicts_alike_on_the_cpu(gravel: Path, tmp_path: Path) -> None:
    data = MVTecAD(gravel.parent, gravel.name, num_workers=0)
    fit(tmp_path, data, engine={"accelerator": "gpu", "devices": 1})
    checkpoint = next(tmp_path.rglob("*.ckpt"))

    def maps(accelerator: str) -> torch.Tensor:
        engine = Engine(default_root_dir=tmp_path, accelerator=accelerator, devices=1, logger=False)
        predictions = engine.predict(DeCoDiff.load_from_checkpoint(checkpoint), data_path=gravel / "test")
        return torch.cat([batch.anomaly_map.float().cpu() for batch in predictions])

    torch.testing.assert_close(maps("gpu"), maps("cpu"), atol=5e-3, rtol=0)


class StepsOfValidation(Callback):
    """After which training steps thresholds were set."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("engine", "steps"), [({"max_epochs": 1}, 34), ({"max_steps": 3}, 3), ({"max_steps": 19}, 19), ({}, 4)]
)
def test_a_duration_given_to_the_trainer_goes_first(gravel: Path, tmp_path: Path, engine: dict, steps: int) -> None:
    data = MVTecAD(gravel.parent, gravel.name, train_batch_size=16, num_workers=0)  # 68 images, read by 2: 34 steps
    validation = StepsOfValidation()
    model = fit(tmp_path, data, engine=engine | {"callbacks": [validation]}, features="none")
    assert model.trainer.global_step == validation.steps[-1] == steps
    saved = DeCoDiff.load_from_checkpoint(next(tmp_path.rglob("*.ckpt")))
    assert saved.post_processor.has_thresholds
    assert torch.equal(saved.post_processor.image_thresholds, model.post_processor.image_thresholds)


@pytest.mark.parametrize(
    ("engine", "steps"),
    [({}, [7, 14, 20]), ({"val_check_interval": 4}, [4, 8, 12, 16, 20]), ({"check_val_every_n_epoch": 2}, [20])],
)
def test_validation_comes_when_the_trainer_is_told_to(
    gravel: Path, tmp_path: Path, engine: dict, steps: list[int]
) -> None:
    data = MVTecAD(gravel.parent, gravel.name, num_workers=0)
    validation = StepsOfValidation()
    settings = {"corruption": {"fresh_per_step": 4}}  # 17 steps an epoch
    fit(tmp_path, data, engine=engine | {"callbacks": [validation]}, train_steps=20, features="none", settings=settings)
    assert validation.steps == steps


def test_broken_images_stop_before_training(gravel: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(gravel, root / "gravel")
    broken = root / "gravel" / "train" / "good" / "999.png"
    broken.write_text("not an image")
    with pytest.raises(ValueError, match="1 of 81 image files cannot be read") as caught:
        fit(tmp_path, MVTecAD(root, "gravel", num_workers=0))
    assert str(broken) in str(caught.value)


def test_images_of_12_bits_are_read_as_in_training(gravel: Path, tmp_path: Path) -> None:
    shutil.copytree(gravel, tmp_path / "data" / "gravel")
    for file in (tmp_path / "data" / "gravel").glob("t*/*/*.png"):
        Image.fromarray(np.asarray(Image.open(file).convert("L")).astype(np.uint16) * 16).save(file)
    cropped = {"num_workers": 0, "augmentations": CenterCrop(128)}
    data, of_8_bits = MVTecAD(tmp_path / "data", "gravel", **cropped), MVTecAD(gravel.parent, gravel.name, **cropped)
    model = fit(tmp_path, data, train_steps=2)
    assert model.white_level == 4095
    later = DeCoDiff(image_size=64)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    (metrics,) = engine.test(later, datamodule=data, ckpt_path=next(tmp_path.rglob("*.ckpt")))
    (expected,) = engine.test(later, datamodule=of_8_bits)
    assert later.white_level == 4095
    assert metrics == pytest.approx(expected, abs=0.01)  # 16 * 255 is a little darker than white


def test_folders_are_looked_at_before_anything_is_read_or_downloaded(gravel: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/parts does not exist\. Give the folder that holds"):
        fit(tmp_path, MVTecAD(tmp_path / "nowhere", "parts"))
    assert not (tmp_path / "nowhere").exists()

    shutil.copytree(gravel, tmp_path / "unmasked")
    shutil.rmtree(tmp_path / "unmasked" / "ground_truth" / "crack")
    with pytest.raises(FileNotFoundError, match="has no masks for crack, which MVTecAD needs"):
        fit(tmp_path, MVTecAD(tmp_path, "unmasked"))

    shutil.copytree(gravel, tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "train" / "good")
    with pytest.raises(FileNotFoundError, match=r"no \.png images in .*empty/train/good"):
        fit(tmp_path, MVTecAD(tmp_path, "empty"))


def test_categories_without_masks(gravel: Path, tmp_path: Path) -> None:
    data = Folder(
        name="gravel",
        root=gravel,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=["test/crack"],
        num_workers=0,
    )
    model = DeCoDiff(image_size=64, train_steps=2)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    engine.fit(model, datamodule=data)
    (metrics,) = engine.test(model, datamodule=data)
    assert set(metrics) == {"image_AUROC", "image_AUPR", "image_F1Max"}


def test_too_few_images_to_hold_out(gravel: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(gravel, root / "gravel")
    for file in sorted((root / "gravel" / "train" / "good").glob("*.png"))[5:]:
        file.unlink()
    with pytest.raises(ValueError, match="5 training images; 8 or more are needed, 4 of them to set thresholds"):
        fit(tmp_path, MVTecAD(root, "gravel", num_workers=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "best"}, "preset='best' is unknown; valid: paper, balanced, fast"),
        ({"image_size": 100}, r"image_size=\(100, 100\) must be multiples of 32 pixels, such as \(96, 96\)"),
        ({"denoiser": "huge"}, "denoiser='huge' is unknown; valid: nano, tiny, XS, S, M, L, XL"),
        ({"num_steps": 11}, "must be between 1 and 10"),
        ({"false_alarm_rate": 2.0}, "false_alarm_rate=2.0 must be between 0 and 0.5"),
        ({"calibration_split": 1.0}, "calibration_split=1.0 must be at least 0 and below 1"),
        ({"corruption": "rain"}, "corruption.kind='rain' is unknown; valid: patches, defects"),
    ],
)
def test_arguments_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeCoDiff(**arguments)


def test_another_models_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {}, "pytorch-lightning_version": "2.6.0"}, path)
    with pytest.raises(ValueError, match="The checkpoint is not DeCoDiff's"):
        DeCoDiff.load_from_checkpoint(path)
