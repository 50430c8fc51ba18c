"""Anomalib's own models, engine and command line work with several categories."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import Padim
from PIL import Image

from decodiff_anomalib.data import MultiCategory
from decodiff_anomalib.data.dataset import CategoryBatch

TEST = {"bolt": {"good": 2, "dent": 3}, "felt": {"good": 2, "hole": 2}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Noise with a bright square as its defect; the second category differs in size and colour and has no masks."""
    root = tmp_path_factory.mktemp("data") / "parts"
    rng = np.random.default_rng(0)
    for category, shape in {"bolt": (64, 64, 3), "felt": (48, 80)}.items():
        counts = {("train", "good"): 14} | {("test", label): count for label, count in TEST[category].items()}
        for (split, label), count in counts.items():
            folder = root / category / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                image = rng.integers(60, 100, shape).astype(np.uint8)
                mask = np.zeros(shape[:2], np.uint8)
                if label != "good":
                    image[16:32, 16:32] = 250
                    mask[16:32, 16:32] = 255
                Image.fromarray(image).save(folder / f"{index:03d}.png")
                if category == "bolt" and label != "good":
                    truth = root / category / "ground_truth" / label / f"{index:03d}_mask.png"
                    truth.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(truth)
    return root


@pytest.fixture(scope="module")
def datamodule(root):
    return MultiCategory(root, train_batch_size=8, eval_batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def padim():
    torch.manual_seed(0)  # of its random network
    return Padim(
        layers=["layer1"],
        pre_trained=False,
        n_features=16,
        pre_processor=Padim.configure_pre_processor(image_size=(64, 64)),
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory, padim, datamodule):
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("results"), accelerator="cpu", logger=False)
    engine.fit(padim, datamodule=datamodule)
    return engine


def expected_pictures():
    return {
        Path(category, "test", label, f"{index:03d}.png")
        for category, labels in TEST.items()
        for label, count in labels.items()
        for index in range(count)
    }


def pictures(results):
    return {path.relative_to(images) for images in results.rglob("images") for path in images.rglob("*.png")}


def test_padim_trains_and_tests_and_no_picture_is_overwritten(engine, padim, datamodule):
    (metrics,) = engine.test(padim, datamodule=datamodule)

    assert metrics["image_AUROC"] == 1  # a bright square on noise: a lower value means that labels are mixed up
    assert metrics["pixel_AUROC"] > 0.9
    assert pictures(Path(engine.trainer.default_root_dir)) == expected_pictures()


def test_padim_predicts_with_the_category_in_the_batch(engine, padim, datamodule):
    predictions = engine.predict(padim, datamodule=datamodule)

    assert all(isinstance(batch, CategoryBatch) for batch in predictions)
    items = [item for batch in predictions for item in batch]
    assert len(items) == 9
    for item in items:
        assert f"/parts/{item.category}/test/" in item.image_path
        assert item.anomaly_map.shape == (64, 64)


def test_command_line_trains_on_a_root(root, tmp_path, anomalib, caplog):
    data = ["--data", "MultiCategory", "--data.root", root, "--data.categories", "[felt,bolt]"]
    loading = ["--data.num_workers", 0, "--data.train_batch_size", 8]
    model = ["--model", "Padim", "--model.pre_trained", "false", "--model.layers", "[layer1]", "--model.n_features", 4]

    with caplog.at_level(logging.INFO):
        printed = anomalib(tmp_path, "train", *model, *data, *loading, "--trainer.accelerator", "cpu")

    assert "2 categories:" in printed + caplog.text
    assert (tmp_path / "results" / "Padim" / "parts").is_dir()
    assert pictures(tmp_path / "results") == expected_pictures()


def test_configuration_takes_any_datamodules(root, tmp_path):
    folder = {"name": "cloth", "root": str(root / "felt"), "normal_dir": "train/good", "normal_test_dir": "test/good"}
    inner = {
        "screws": {"class_path": "MVTecAD", "init_args": {"root": str(root), "category": "bolt"}},
        "cloth": {"class_path": "Folder", "init_args": folder},
    }
    config = tmp_path / "data.yaml"
    config.write_text(yaml.safe_dump({"class_path": "MultiCategory", "init_args": {"datamodules": inner}}))

    datamodule = AnomalibDataModule.from_config(config)
    datamodule.setup()

    assert {name: type(given).__name__ for name, given in datamodule.datamodules.items()} == {
        "screws": "MVTecAD",
        "cloth": "Folder",
    }
    assert datamodule.counts["train normal"].to_dict() == {"screws": 10, "cloth": 10, "total": 20}
    assert datamodule.counts["test normal"].to_dict() == {"screws": 2, "cloth": 2, "total": 4}
