"""One DeCoDiff for several categories, through Anomalib's engine: given in training, inferred afterwards."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from PIL import Image

from decodiff_anomalib import DeCoDiff, MultiCategory

SMALL = {"image_size": 64, "train_steps": 8}


def picture(category: str, rng: np.random.Generator) -> np.ndarray:
    """Dark grain, bright stripes, or a checkered pattern, each with noise of its own."""
    rows, columns = np.mgrid[:64, :64]
    base = {
        "grain": np.full((64, 64), 50.0),
        "stripes": 160 + 60 * np.sin(columns / 2 + rng.uniform(0, 6)),
        "checks": 120 + 100.0 * (((rows // 8) + (columns // 8)) % 2),
    }[category]
    return (base + rng.normal(0, 12, (64, 64))).clip(0, 255).astype(np.uint8)


def write_category(folder: Path, category: str, seed: int) -> None:
    """A category in MVTec AD's layout, with a bright square as its defect."""
    rng = np.random.default_rng(seed)
    for kind, count in {"train/good": 20, "test/good": 6, "test/spot": 6}.items():
        (folder / kind).mkdir(parents=True)
        for index in range(count):
            image, mask = picture(category, rng), np.zeros((64, 64), np.uint8)
            if kind == "test/spot":
                image[20:32, 24:36], mask[20:32, 24:36] = 255 - image[20:32, 24:36], 255
                truth = folder / "ground_truth" / "spot" / f"{index:03d}_mask.png"
                truth.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(truth)
            Image.fromarray(image).save(folder / kind / f"{index:03d}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "parts"
    for seed, category in enumerate(("grain", "stripes", "checks")):
        write_category(root / category, category, seed)
    return root


def two_of_them(root: Path) -> MultiCategory:
    return MultiCategory(root, ["stripes", "grain"], num_workers=0, train_batch_size=8, val_split_ratio=0.3)


def engine(folder: Path, **arguments) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", logger=False, **arguments)


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DeCoDiff, Path]:
    """A model of stripes and grain, and its checkpoint."""
    results = tmp_path_factory.mktemp("results")
    model, running = DeCoDiff(**SMALL), engine(results)
    running.fit(model, datamodule=two_of_them(root))
    return model, next(results.rglob("model.ckpt"))


def predict(folder: Path, model: DeCoDiff, data: MultiCategory, **arguments) -> dict[str, list]:
    batches = engine(folder).predict(model, datamodule=data, **arguments)
    return {
        "true": [name for batch in batches for name in batch.category],
        "pred": [name for batch in batches for name in batch.pred_category],
        "good": [Path(path).parent.name == "good" for batch in batches for path in batch.image_path],
        "label": torch.cat([batch.pred_label for batch in batches]).tolist(),
        "score": torch.cat([batch.pred_score for batch in batches]),
        "raw": torch.cat([batch.raw_score for batch in batches]),
    }


def test_categories_are_inferred_and_judged_by_their_own_thresholds(trained, root: Path, tmp_path: Path) -> None:
    model, _ = trained
    assert model.categories == ("stripes", "grain")
    seen = predict(tmp_path, model, two_of_them(root))
    assert [name for name, good in zip(seen["pred"], seen["good"], strict=True) if good] == ["grain"] * 6 + [
        "stripes"
    ] * 6
    # at 64 pixels a defect reaches every feature of an image: it may look like nothing known, but never like the other
    assert all(pred in {true, "unknown"} for pred, true in zip(seen["pred"], seen["true"], strict=True))
    thresholds = model.post_processor.image_thresholds
    assert thresholds[0] != thresholds[1]
    own = thresholds[[model.categories.index(name) if name != "unknown" else 2 for name in seen["pred"]]]
    expected, known = seen["raw"] / (seen["raw"] + own), torch.tensor([name != "unknown" for name in seen["pred"]])
    torch.testing.assert_close(seen["score"][known], expected[known])
    assert (seen["score"][~known] >= expected[~known].clamp_min(0.5)).all()


def test_an_image_of_no_trained_category_is_unknown_and_anomalous(trained, root: Path, tmp_path: Path) -> None:
    seen = predict(tmp_path, trained[0], MultiCategory(root, ["checks"], num_workers=0))
    assert set(seen["pred"]) == {"unknown"}
    assert all(seen["label"])
    assert (seen["score"] > 0.5).all()


def test_given_and_inferred_categories_agree_and_a_fixed_one_does_not(trained, root: Path, tmp_path: Path) -> None:
    _, checkpoint = trained
    data = two_of_them(root)
    inferred, given, fixed, unknown = (
        predict(tmp_path, DeCoDiff.load_from_checkpoint(checkpoint, category=category), data)
        for category in ("inferred", "given", "grain", "unknown")
    )
    good = torch.tensor(given["good"])
    assert torch.equal(inferred["score"][good], given["score"][good])
    assert set(fixed["pred"]) == {"grain"}
    assert set(unknown["pred"]) == {"unknown"}
    is_grain = torch.tensor([name == "grain" for name in given["true"]])
    assert torch.equal(fixed["score"][is_grain], given["score"][is_grain])
    assert (fixed["raw"][~is_grain] != given["raw"][~is_grain]).all()


def test_a_checkpoint_restores_categories_routing_and_thresholds(trained, root: Path, tmp_path: Path) -> None:
    model, checkpoint = trained
    restored = DeCoDiff.load_from_checkpoint(checkpoint)
    assert restored.categories == model.categories
    direct, again = (predict(tmp_path, which, two_of_them(root)) for which in (model, restored))
    through_engine = predict(tmp_path, DeCoDiff(), two_of_them(root), ckpt_path=checkpoint)  # of another size
    for name in ("score", "raw"):
        assert torch.equal(direct[name], again[name])
        assert torch.equal(direct[name], through_engine[name])


def test_a_model_of_one_category_knows_its_name(root: Path, tmp_path: Path) -> None:
    model = DeCoDiff(**SMALL)
    data = MVTecAD(root, "grain", num_workers=0)
    engine(tmp_path).fit(model, datamodule=data)
    assert model.categories == ("grain",)
    (batch,) = engine(tmp_path).predict(model, datamodule=data)
    good = [Path(path).parent.name == "good" for path in batch.image_path]
    assert [name for name, is_good in zip(batch.pred_category, good, strict=True) if is_good] == ["grain"] * 6
    (batch,) = engine(tmp_path).predict(model, data_path=root / "checks" / "test" / "good" / "000.png")
    assert batch.pred_category == ["unknown"]
    assert batch.pred_label.all()


def test_unknown_names_are_refused_at_predict_time(trained, root: Path, tmp_path: Path) -> None:
    _, checkpoint = trained
    with pytest.raises(ValueError, match=r"category='checks' is none that the model was trained on; valid: stripes"):
        DeCoDiff.load_from_checkpoint(checkpoint, category="checks")
    model = DeCoDiff.load_from_checkpoint(checkpoint, category="given")
    with pytest.raises(ValueError, match=r"but the data give 'checks' for .*the model knows stripes, grain"):
        engine(tmp_path).test(model, datamodule=MultiCategory(root, ["checks"], num_workers=0))
    with pytest.raises(ValueError, match="but the data give 'none' for"):
        engine(tmp_path).predict(model, data_path=root / "grain" / "test" / "good")


def test_training_goes_on_with_the_same_categories_only(trained, root: Path, tmp_path: Path) -> None:
    _, checkpoint = trained
    resumed = DeCoDiff(**SMALL)
    engine(tmp_path, max_epochs=6).fit(resumed, datamodule=two_of_them(root), ckpt_path=checkpoint)
    assert resumed.trainer.current_epoch == 6
    changed = MultiCategory(root, ["stripes", "checks"], num_workers=0)
    with pytest.raises(ValueError, match="trained on the categories stripes, grain; training cannot go on with"):
        engine(tmp_path, max_epochs=6).fit(DeCoDiff(**SMALL), datamodule=changed, ckpt_path=checkpoint)


def test_more_training_on_other_categories_keeps_what_is_known(trained, root: Path, tmp_path: Path) -> None:
    """Fine-tuning a loaded model: no step is taken at a learning rate of zero, so that rows can be compared."""
    model = DeCoDiff.load_from_checkpoint(trained[1], learning_rate=0.0)
    with torch.no_grad():
        before = model.model.denoiser.category_embedding.weight.add_(1).clone()
    data = MultiCategory(root, ["checks", "grain"], num_workers=0, val_split_ratio=0.3)
    engine(tmp_path, max_steps=1).fit(model, datamodule=data)
    assert model.categories == ("checks", "grain")
    after = model.model.denoiser.category_embedding.weight.detach()
    torch.testing.assert_close(after[1], before[1])
    assert (after[0] - before[0]).abs().max() > 0.1


def test_categories_cannot_be_inferred_before_any_were_seen(trained, root: Path, tmp_path: Path) -> None:
    from decodiff_anomalib.denoiser import DENOISER_SIZES
    from decodiff_anomalib.weights import DenoiserConfig, save_pretrained

    denoiser = trained[0].model.denoiser
    shape = denoiser.unet.config
    config = DenoiserConfig(
        DENOISER_SIZES["nano"], shape.in_channels, 2, ("stripes", "grain"), None, "decodiff", shape.out_channels
    )
    save_pretrained(denoiser, config, tmp_path / "weights")
    model = DeCoDiff(image_size=64, weights=tmp_path / "weights")
    with pytest.raises(ValueError, match="has seen no images of its 2 categories yet and cannot infer them"):
        engine(tmp_path).test(model, datamodule=two_of_them(root))
    told = DeCoDiff(image_size=64, weights=tmp_path / "weights", category="given")
    engine(tmp_path).test(told, datamodule=two_of_them(root))


def test_a_category_with_a_reserved_name_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "grain", tmp_path / "parts" / "unknown")
    with pytest.raises(ValueError, match="A category cannot be called 'unknown'"):
        engine(tmp_path).fit(DeCoDiff(**SMALL), datamodule=MultiCategory(tmp_path / "parts", num_workers=0))


@pytest.mark.slow
def test_two_processes_train_and_test_one_model(root: Path, tmp_path: Path) -> None:
    """Lightning's `ddp`: each process sees its share of the images, both have the same categories and thresholds."""
    given = {
        "model": "DeCoDiff",
        **{f"model.{name}": value for name, value in SMALL.items()},
        "data": "MultiCategory",
        "data.root": root,
        "data.categories": "[stripes,grain]",
        "data.num_workers": 1,
        "data.train_batch_size": 4,
        "data.val_split_ratio": 0.3,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "default_root_dir": tmp_path,
    }
    arguments = [f"--{name}={value}" for name, value in given.items()]
    anomalib = Path(sys.executable).with_name("anomalib")  # Lightning starts the second process like the first
    done = subprocess.run([anomalib, "train", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("By category") == 1
    saved = torch.load(next(tmp_path.rglob("model.ckpt")), weights_only=True)
    state = saved["state_dict"]
    assert saved["decodiff"]["categories"] == ["stripes", "grain"]
    assert state["post_processor.image_thresholds"].isfinite().all()
    assert state["model.router.trained"].all()
    assert state["model.router.limits"].isfinite().all()
