"""The README's quick start, shortened: what it prints, draws and saves, and what its checkpoint is good for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.data import DemoTextures

REPOSITORY = Path(__file__).parents[2]
SHORT = {"train_steps": 60, "image_size": 128}


@pytest.fixture(scope="module")
def run(data_root: Path, anomalib_process: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the README's quick start with fewer steps and smaller images, in a process of its own."""
    results = tmp_path_factory.mktemp("results")
    config = REPOSITORY / "configs" / "quickstart.yaml"
    given = [f"--model.{name}={value}" for name, value in SHORT.items()]
    where = ["--data.root", data_root, "--default_root_dir", results]
    (results / "printed.txt").write_text(anomalib_process(REPOSITORY, "train", "--config", config, *given, *where))
    return results


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> Path:
    return next(run.rglob("v0/weights/lightning/model.ckpt"))


def test_quick_start_finds_defects_and_prints_the_metrics(run: Path) -> None:
    printed = (run / "printed.txt").read_text()
    metrics = {}
    for name in ("image_AUROC", "image_AUPR", "image_F1Max", "pixel_AUROC", "pixel_AUPR", "pixel_AUPRO", "pixel_F1Max"):
        line = next(line for line in printed.splitlines() if f" {name} " in line)
        metrics[name] = float(line.split("│")[2])
    assert metrics["image_AUROC"] > 0.7, metrics
    assert metrics["pixel_AUROC"] > 0.8, metrics
    assert metrics["pixel_AUPR"] > 0.1, metrics


def test_every_test_image_has_a_picture_with_its_correction(run: Path) -> None:
    pictures = sorted(path.relative_to(path.parents[1]) for path in run.rglob("v0/images/*/*.png"))
    assert len(pictures) == 64
    assert len({path.parts[0] for path in pictures}) == 6
    width, height = Image.open(next(run.rglob("images/crack/*.png"))).size
    assert width > 4 * 256  # image, correction, map, outlines
    assert height > 256  # words above and a legend below


def test_corrected_images_show_no_defect_and_normal_ones_stay(checkpoint: Path, data_root: Path) -> None:
    """Most corrected images pass a second inspection if the defect was found in the first."""
    model = DeCoDiff.load_from_checkpoint(checkpoint).eval()
    datamodule = DemoTextures(root=data_root)
    datamodule.prepare_data()
    datamodule.setup()
    items = list(datamodule.test_data)
    prepared = model.pre_processor(torch.stack([item.image for item in items]))
    defective = torch.tensor([bool(item.gt_label) for item in items])
    masks = resize(torch.stack([item.gt_mask for item in items])[:, None], [128, 128], InterpolationMode.NEAREST)
    with torch.no_grad():
        first = [model.model(chunk) for chunk in prepared.split(16)]
        again = [model.model(part.correction.clamp(-1, 1)) for part in first]
    change = torch.cat([(part.correction - part.reconstruction).abs().mean(1, keepdim=True) for part in first]) * 127.5
    before, after = (torch.cat([part.pred_score for part in parts]) for parts in (first, again))
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
    assert unchanged.settings.maps.levels == {"latent": 1.0, "feature": 1.0}
    assert unchanged.post_processor.has_thresholds
    batches = engine.predict(model, data_path=Path(datamodule.test_data.samples.image_path[0]).parent)
    batch = max(batches, key=lambda batch: float(batch.pred_score[0]))
    assert batch.pred_score[0] > 1  # raw; below 1 it would be in units of a threshold
    assert batch.pred_label is None
    pictures = tmp_path.rglob(Path(batch.image_path[0]).name)
    picture = Image.open(max(pictures, key=lambda path: path.stat().st_mtime))
    assert picture.size == (820, 381)  # image, correction and map, 256 pixels each
    red, _, blue = np.asarray(picture.convert("RGB"), np.float32)[79:335, 551:807].transpose(2, 0, 1)  # the map
    order = batch.anomaly_map[0].flatten().argsort()
    high, low = ((red - blue).flatten()[places].mean() for places in (order[-500:], order[:500]))
    assert low < 0
    assert high > 50


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


def test_configs_run_as_they_are(anomalib: Callable[..., str]) -> None:
    for config in sorted((REPOSITORY / "configs").rglob("*.yaml")):
        if "\nbenchmark:" in config.read_text():  # of another command
            continue
        printed = anomalib(REPOSITORY, "train", "--config", config, "--print_config")
        assert "decodiff_anomalib" in printed, config
