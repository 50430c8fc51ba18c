"""DeCoDiff through Anomalib's own command line and engine: the quick start, shortened, and what may go wrong."""

import shutil
from collections.abc import Callable
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

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.data import DemoTextures
from decodiff_anomalib.paper import paper_transform

REPOSITORY = Path(__file__).parents[2]
SHORT = {"train_steps": 60}


@pytest.fixture(scope="module")
def run(data_root: Path, anomalib_process: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the README's quick start, shortened."""
    results = tmp_path_factory.mktemp("results")
    config = REPOSITORY / "configs" / "quickstart.yaml"
    given = [f"--model.{name}={value}" for name, value in SHORT.items()]
    where = ["--data.root", data_root, "--default_root_dir", results]
    (results / "printed.txt").write_text(anomalib_process(REPOSITORY, "train", "--config", config, *given, *where))
    return results


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> Path:
    return next(run.rglob("v0/weights/lightning/model.ckpt"))


def test_quick_start_finds_defects_and_prints_the_figures(run: Path) -> None:
    printed = (run / "printed.txt").read_text()
    figures = {}
    for name in ("image_AUROC", "image_AUPR", "image_F1Max", "pixel_AUROC", "pixel_AUPR", "pixel_AUPRO", "pixel_F1Max"):
        line = next(line for line in printed.splitlines() if f" {name} " in line)
        figures[name] = float(line.split("│")[2])
    assert figures["image_AUROC"] > 0.7, figures
    assert figures["pixel_AUROC"] > 0.8, figures
    assert figures["pixel_AUPR"] > 0.1, figures


def test_every_test_image_has_a_picture_with_its_correction(run: Path) -> None:
    pictures = sorted(path.relative_to(path.parents[1]) for path in run.rglob("v0/images/*/*.png"))
    assert len(pictures) == 64
    assert len({path.parts[0] for path in pictures}) == 6
    width, height = Image.open(next(run.rglob("images/crack/*.png"))).size
    assert width == 5 * height  # image, mask, two overlays, correction


def test_corrected_images_show_no_defect_and_normal_ones_stay(checkpoint: Path, data_root: Path) -> None:
    """Inspected anew, most corrected images pass, whose defects were found."""
    model = DeCoDiff.load_from_checkpoint(checkpoint).eval()
    datamodule = DemoTextures(root=data_root)
    datamodule.prepare_data()
    datamodule.setup()
    items = list(datamodule.test_data)
    prepared = model.pre_processor(torch.stack([item.image for item in items]))
    defective = torch.tensor([bool(item.gt_label) for item in items])
    masks = torch.stack([item.gt_mask for item in items])[:, None]
    with torch.no_grad():
        seen = [model.model(chunk) for chunk in prepared.split(16)]
        again = [model.model(part.correction.clamp(-1, 1)) for part in seen]
    change = torch.cat([(part.correction - part.reconstruction).abs().mean(1, keepdim=True) for part in seen]) * 127.5
    before, after = (torch.cat([part.pred_score for part in parts]) for parts in (seen, again))
    assert change[~defective].mean() < 5  # grey levels
    assert change[masks].mean() > 5 * change[~defective].mean()
    threshold = model.post_processor.image_thresholds[0]
    found = defective & (before > threshold)
    assert found.sum() > 10
    assert (after[found] > threshold).float().mean() < 0.5
    assert (after[~defective] > threshold).float().mean() < 0.1


def scores(engine: Engine, datamodule: DemoTextures, **arguments) -> dict[str, torch.Tensor]:
    batches = engine.predict(datamodule=datamodule, **arguments)
    return {
        "pred_score": torch.cat([batch.pred_score for batch in batches]),
        "anomaly_map": torch.cat([batch.anomaly_map for batch in batches]),
        "pred_label": torch.cat([batch.pred_label for batch in batches]),
    }


def test_a_checkpoint_alone_restores_everything_to_the_bit(checkpoint: Path, data_root: Path, tmp_path: Path) -> None:
    datamodule = DemoTextures(root=data_root)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    loaded = DeCoDiff.load_from_checkpoint(checkpoint)
    direct = scores(engine, datamodule, model=loaded)
    through_engine = scores(engine, datamodule, model=DeCoDiff(), ckpt_path=checkpoint)  # of another preset
    for name, value in direct.items():
        assert torch.equal(value, through_engine[name]), name
    assert 0 < direct["pred_label"].float().mean() < 1
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert any(name.startswith("model.codec.") for name in state)


def test_a_checkpoint_that_contradicts_an_argument_is_refused(
    checkpoint: Path, data_root: Path, tmp_path: Path
) -> None:
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match=r"trained with denoiser='nano', the model is to have 'tiny'"):
        engine.test(DeCoDiff(denoiser="tiny"), datamodule=DemoTextures(root=data_root), ckpt_path=checkpoint)


def test_steps_that_were_not_trained_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"trained for num_steps=1 and no other .*, not 5"):
        DeCoDiff.load_from_checkpoint(checkpoint, num_steps=5)


def test_other_levels_come_without_thresholds(checkpoint: Path, data_root: Path, tmp_path: Path) -> None:
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    datamodule = DemoTextures(root=data_root)
    model = DeCoDiff(settings={"maps": {"levels": {"feature": 1.0}}})
    engine.test(model, datamodule=datamodule, ckpt_path=checkpoint)
    assert model.settings.maps.levels == {"feature": 1.0}
    assert not model.post_processor.has_thresholds
    unchanged = DeCoDiff.load_from_checkpoint(checkpoint)
    assert unchanged.settings.maps.levels == {"latent": 1.0, "feature": 1.0, "detail": 2.0}
    assert unchanged.post_processor.has_thresholds
    (batch, *_) = engine.predict(model, data_path=datamodule.test_data.samples.image_path[0])
    assert batch.pred_score[0] > 1  # raw; below 1 it would be in units of a threshold
    assert batch.pred_label is None
    picture = Image.open(max(tmp_path.rglob("images/**/*.png"), key=lambda path: path.stat().st_mtime))
    red, _, blue = np.asarray(picture, np.float32)[:, 256:512].transpose(2, 0, 1)  # the map on the image
    order = batch.anomaly_map[0].flatten().argsort()
    assert (red - blue).flatten()[order[-500:]].mean() > 50 > -50 > (red - blue).flatten()[order[:500]].mean()


def test_predict_a_folder_of_any_images(checkpoint: Path, gravel: Path, tmp_path: Path) -> None:
    """Colour, 16 bit, other sizes and aspects; maps come back at each image's size, pictures never collide."""
    folder = tmp_path / "images"
    source = Image.open(next((gravel / "test" / "good").glob("*.png")))
    sizes = {"a/part.png": (300, 200), "b/part.png": (256, 256), "c/part.png": (90, 333)}
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True)
        source.resize(size).convert("RGB").save(folder / name)
    deep = np.asarray(source.convert("L")).astype(np.uint16) * 257
    (folder / "deep").mkdir()
    Image.fromarray(deep).save(folder / "deep" / "part.png")
    eight = folder / "eight"
    eight.mkdir()
    source.save(eight / "part.png")

    results = tmp_path / "results"
    batches = Engine(default_root_dir=results, accelerator="cpu", logger=False).predict(
        DeCoDiff.load_from_checkpoint(checkpoint), data_path=folder
    )
    by_name = {str(Path(batch.image_path[0]).relative_to(folder)): batch for batch in batches}
    for name, (width, height) in sizes.items():
        assert by_name[name].anomaly_map.shape[-2:] == (height, width)
        assert by_name[name].pred_mask.shape[-2:] == (height, width)
    torch.testing.assert_close(by_name["deep/part.png"].pred_score, by_name["eight/part.png"].pred_score)
    assert len(list(results.rglob("part.png"))) == 5


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
        seen = cropped.model(cropped.pre_processor.transform(read_image(tmp_path / "whole.png", as_tensor=True)[None]))
    expected = torch.nn.functional.interpolate(seen.anomaly_map, size=(128, 128), mode="bilinear")[0, 0]
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
    ("engine", "steps"), [({"max_epochs": 2}, 34), ({"max_steps": 3}, 3), ({"max_steps": 19}, 19), ({}, 4)]
)
def test_a_duration_given_to_the_trainer_goes_first(gravel: Path, tmp_path: Path, engine: dict, steps: int) -> None:
    data = MVTecAD(gravel.parent, gravel.name, train_batch_size=16, num_workers=0)  # 68 images, read by 4: 17 steps
    validation = StepsOfValidation()
    model = fit(tmp_path, data, engine=engine | {"callbacks": [validation]})
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
    data = MVTecAD(gravel.parent, gravel.name, num_workers=0)  # 17 steps an epoch
    validation = StepsOfValidation()
    fit(tmp_path, data, engine=engine | {"callbacks": [validation]}, train_steps=20)
    assert validation.steps == steps


def test_broken_images_stop_before_training(gravel: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(gravel, root / "gravel")
    broken = root / "gravel" / "train" / "good" / "999.png"
    broken.write_text("not an image")
    with pytest.raises(ValueError, match="1 of 81 image files cannot be read") as caught:
        fit(tmp_path, MVTecAD(root, "gravel", num_workers=0))
    assert str(broken) in str(caught.value)


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
    (figures,) = engine.test(model, datamodule=data)
    assert set(figures) == {"image_AUROC", "image_AUPR", "image_F1Max"}


def test_too_few_images_to_hold_out(gravel: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(gravel, root / "gravel")
    for file in sorted((root / "gravel" / "train" / "good").glob("*.png"))[5:]:
        file.unlink()
    with pytest.raises(ValueError, match="5 training images leave fewer than 2 to set thresholds"):
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


def test_configs_run_as_they_are(anomalib: Callable[..., str]) -> None:
    for config in sorted((REPOSITORY / "configs").rglob("*.yaml")):
        if "\nbenchmark:" in config.read_text():  # of another command
            continue
        printed = anomalib(REPOSITORY, "train", "--config", config, "--print_config")
        assert "decodiff_anomalib" in printed, config
