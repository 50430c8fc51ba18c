"""The published configurations through Anomalib's command line, from converted weights of the authors' format."""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from PIL import Image

from decodiff_anomalib import DeCoDiff, MultiCategory
from decodiff_anomalib.__main__ import main
from decodiff_anomalib.benchmark.reproduce import reproduce
from decodiff_anomalib.denoiser import DenoiserSize, build_denoiser
from decodiff_anomalib.paper import (
    CATEGORY_ORDER,
    EPOCHS,
    HALF_TURN_PROBABILITY,
    SHIFT_PROBABILITY,
    WARMUP_EPOCHS,
    PaperAugmentation,
    prepare_image,
)
from decodiff_anomalib.presets import PRESETS
from decodiff_anomalib.weights import DenoiserConfig, load_pretrained, save_pretrained, to_official_state

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs" / "paper"

# Two categories of MVTec AD, and the real images that stand in for them.
STAND_INS = {"tile": "magnetic_tile", "carpet": "grass_synth"}


@pytest.fixture(scope="module")
def root(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven normal training images and two test images of each category."""
    folder = tmp_path_factory.mktemp("data")
    for category, source in STAND_INS.items():
        defective = min(path for path in (data_dir / source / "test").glob("*/*") if path.parent.name != "good")
        chosen = [*sorted((data_dir / source / "train" / "good").iterdir())[:11]]
        chosen += [min((data_dir / source / "test" / "good").iterdir()), defective]
        chosen += [data_dir / source / "ground_truth" / defective.parent.name / f"{defective.stem}_mask.png"]
        for path in chosen:
            copy = folder / category / path.relative_to(data_dir / source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of size XS without zeros, saved as the authors' script does and converted on the command line."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    denoiser = build_denoiser("XS", num_categories=15)
    for parameter in denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    arguments = argparse.Namespace(dataset="mvtec", vae_type="ema")
    torch.save({"model": to_official_state(denoiser), "args": arguments}, folder / "last.pt")
    main(["convert", str(folder / "last.pt"), "--to", str(folder / "converted")])
    return folder / "converted"


@pytest.fixture(scope="module")
def run(
    root: Path, small_codec: Path, weights: Path, anomalib: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two epochs of the published training of MVTec AD, made small, and its test; the weights after each epoch kept."""
    results = tmp_path_factory.mktemp("results")
    given = {
        "config": CONFIGS / "mvtec.yaml",
        "model.denoiser": "XS",
        "model.codec": small_codec,
        "model.init_from": weights,
        "model.settings.training.warmup_steps": 1,
        "data.root": root,
        "data.train_batch_size": 2,
        "data.num_workers": 0,
        "trainer.max_epochs": 2,
        "trainer.limit_train_batches": 2,
        "trainer.check_val_every_n_epoch": 1,
        "trainer.accelerator": "cpu",
        "trainer.callbacks": "anomalib.callbacks.checkpoint.ModelCheckpoint",
        "trainer.callbacks.dirpath": results / "epochs",
        "trainer.callbacks.save_top_k": -1,
        "trainer.callbacks.every_n_epochs": 1,
        "trainer.callbacks.save_weights_only": True,
        "trainer.callbacks.filename": "{epoch}",
        "default_root_dir": results,
    }
    anomalib(REPOSITORY, "train", *(f"--{name}={value}" for name, value in given.items()))
    return results


def state_after(run: Path, epoch: int) -> dict[str, torch.Tensor]:
    """The denoiser's weights at the end of an epoch, counted from 0."""
    saved = torch.load(run / "epochs" / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
    prefix = "model.denoiser."
    return {key.removeprefix(prefix): tensor for key, tensor in saved.items() if key.startswith(prefix)}


def test_training_starts_from_the_converted_weights_and_its_first_epoch_moves_none(run: Path, weights: Path) -> None:
    converted, first = load_pretrained(weights)[0].state_dict(), state_after(run, 0)
    assert first.keys() == converted.keys()
    assert all(torch.equal(first[key], tensor) for key, tensor in converted.items())


def test_second_epoch_moves_all_that_learns_by_the_learning_rate(run: Path) -> None:
    """One step of Adam at 1e-4; what has no gradient only decays, by less than float32 shows."""
    before, after = state_after(run, 0), state_after(run, 1)
    moved = {key: float((after[key] - before[key]).abs().max()) for key in before}
    assert max(moved.values()) == pytest.approx(1e-4, rel=2e-3)
    still = {key for key, change in moved.items() if change == 0}
    one_token_has_no_use_for = ("attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias")
    assert all(".transformer_blocks.0." in key and key.endswith(one_token_has_no_use_for) for key in still), still
    table = (after["category_embedding.weight"] - before["category_embedding.weight"]).abs().amax(1)
    assert {CATEGORY_ORDER["mvtec"][row] for row in table.nonzero().flatten().tolist()} == set(STAND_INS)


def test_checkpoint_brings_the_published_images_and_categories(run: Path, root: Path) -> None:
    model = DeCoDiff.load_from_checkpoint(run / "epochs" / "epoch=1.ckpt")
    assert model.categories == CATEGORY_ORDER["mvtec"]
    path = next((root / "tile" / "test").glob("*/*"))
    image = PaperAugmentation(shift_probability=0.0)(read_image(path, as_tensor=True))
    prepared = model.pre_processor.transform(image).as_subclass(torch.Tensor)
    assert torch.equal(prepared, prepare_image(Image.open(path)))
    assert model.post_processor.image_threshold > 0


def test_run_ends_with_metrics_and_pictures(run: Path) -> None:
    table = pd.read_csv(next(run.rglob("categories.csv")), index_col=0)
    assert set(table.index) == {*STAND_INS, "mean", "worst"}
    assert table.loc[list(STAND_INS), ["normal", "defective"]].to_numpy().tolist() == [[1, 1], [1, 1]]
    metrics = table.loc["mean", ["image_auroc", "pixel_auroc", "pixel_ap", "pixel_aupro"]]
    assert metrics.between(0, 1).all()
    assert len(list(run.rglob("images/*/test/*/*.png"))) == 4


def test_checkpoint_is_measured_by_both_protocols(run: Path, root: Path) -> None:
    """The run's own report is of the same maps by Anomalib's protocol, after a normalisation that keeps their order."""
    checkpoint = str(run / "epochs" / "epoch=1.ckpt")
    table = reproduce("mvtec", data=root, weights=checkpoint, categories=list(STAND_INS))
    reported = pd.read_csv(next(run.rglob("categories.csv")), index_col=0)
    for category in STAND_INS:
        measured = table.loc[(category, "anomalib")]
        for metric in ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro"):
            assert measured[metric] == pytest.approx(reported.loc[category, metric], abs=1e-6), (category, metric)


@pytest.mark.parametrize(("names", "rows"), [(["tile"], [*range(15)]), (["felt", "tile"], [None, 5])])
def test_categories_keep_the_row_of_their_name(names: list[str], rows: list[int | None], root: Path, tmp_path: Path):
    """Fewer than the weights know, and others: after the published first epoch, which moves no weight."""
    size = DenoiserSize(32, 8, 16, layers=1, multipliers=(1, 1, 1))
    source = build_denoiser(size, latent_channels=48, num_categories=15)
    config = DenoiserConfig(size, 48, 15, CATEGORY_ORDER["mvtec"], codec=None, source="decodiff")
    save_pretrained(source, config, tmp_path / "weights")
    for name in names:
        shutil.copytree(root / "tile", tmp_path / "data" / name)
    model = DeCoDiff(
        preset="paper",
        image_size=64,
        codec="bundled",
        denoiser=asdict(size),
        init_from=tmp_path / "weights",
        visualizer=False,
    )
    data = MultiCategory(tmp_path / "data", names, train_batch_size=4, num_workers=0, val_split_ratio=0.2)
    Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, max_epochs=1).fit(model, datamodule=data)
    trained, of_source = model.model.denoiser.category_embedding.weight, source.category_embedding.weight
    assert len(trained) == len(rows)
    for row, expected in zip(trained, rows, strict=True):
        found = [index for index, known in enumerate(of_source) if torch.equal(row, known)]
        assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize("dataset", ["mvtec", "visa"])
def test_configurations_hold_the_published_numbers(dataset: str, parity_dir: Path) -> None:
    config = yaml.safe_load((CONFIGS / f"{dataset}.yaml").read_text())
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert (trainer["max_epochs"], trainer["accumulate_grad_batches"], data["train_batch_size"]) == (EPOCHS, 2, 128)
    augmentation = data["train_augmentations"]["init_args"]
    assert augmentation["shift_probability"] == SHIFT_PROBABILITY
    assert augmentation.get("half_turn_probability", 0) == HALF_TURN_PROBABILITY[dataset]
    assert data["test_augmentations"] == data["val_augmentations"]
    assert data["test_augmentations"]["init_args"] == {"shift_probability": 0.0}

    # As many steps an epoch as the authors make, and whole micro-batches in each; the warm-up is their ten epochs.
    counts = json.loads((parity_dir / "class_index.json").read_text())["split_counts"][dataset]["total"]
    images = counts["train_normal"] + counts["val_normal"]
    micro_batches = math.ceil(images * (1 - data["val_split_ratio"]) / 128)
    assert micro_batches == math.ceil(counts["train_normal"] / 128)
    assert micro_batches % 2 == 0
    warmup_steps = (
        model.get("settings", {})
        .get("training", {})
        .get("warmup_steps", PRESETS[model["preset"]].training.warmup_steps)
    )
    assert warmup_steps == WARMUP_EPOCHS * micro_batches / 2
