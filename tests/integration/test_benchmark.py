"""``decodiff benchmark`` on two small categories: real runs, in processes of their own."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import seed_everything
from PIL import Image
from torchvision.transforms.v2 import Compose, Normalize, Resize

from decodiff_anomalib import DeCoDiff, DeCoDiffPostProcessor, MultiCategory
from decodiff_anomalib.__main__ import main
from decodiff_anomalib.evaluation import METRICS, RATES

PADIM = {"pre_trained": False, "layers": ["layer1"], "n_features": 8}
DATA = {"num_workers": 0, "train_batch_size": 8, "val_split_ratio": 0.3}


def write_category(folder: Path, seed: int, brightness: float) -> None:
    """Noise with a faintly brighter square as its defect."""
    rng = np.random.default_rng(seed)
    for kind, count in {"train/good": 12, "test/good": 4, "test/dent": 5}.items():
        (folder / kind).mkdir(parents=True)
        for index in range(count):
            image, mask = rng.normal(brightness, 12, (64, 64)), np.zeros((64, 64), np.uint8)
            if kind == "test/dent":
                image[20:36, 24:40] += 14
                mask[20:36, 24:40] = 255
                truth = folder / "ground_truth" / "dent" / f"{index:03d}_mask.png"
                truth.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(truth)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / kind / f"{index:03d}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "parts"
    for seed, category in enumerate(("bolt", "felt")):
        write_category(root / category, seed, brightness=60 + 90 * seed)
    return root


def write_config(folder: Path, root: Path, padim: dict) -> list[str]:
    """The command line of a benchmark of DeCoDiff and Padim."""
    models = [
        {"name": "DeCoDiff", "class_path": "DeCoDiff", "init_args": {"train_steps": 4}},
        {"name": "Padim, small", "class_path": "Padim", "init_args": padim, "trainer": {"max_epochs": 1}},
    ]
    data = {"class_path": "MultiCategory", "init_args": DATA | {"root": str(root)}}
    config = {
        "accelerator": "cpu",
        "image_size": 64,
        "output": str(folder / "output"),
        "timing_seconds": 0.1,
        "benchmark": {"seed": {"grid": [3]}, "model": {"grid": models}, "data": data},
    }
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(config))
    return ["benchmark", "--config", str(folder / "benchmark.yaml")]


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of which one model failed."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.raises(SystemExit) as stopped:
        main(write_config(folder, root, PADIM | {"n_features": 100_000}))
    assert stopped.value.code == 1
    return folder


def read_table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "output" / "table.csv").set_index(["model", "mode", "category"])


def test_one_that_fails_is_reported_and_the_others_have_their_rows(folder: Path) -> None:
    table = read_table(folder)
    assert list(table.index) == [
        (model, "multi", category) for model in ("DeCoDiff", "Padim, small") for category in ("bolt", "felt", "mean")
    ]
    assert (
        table.loc["Padim, small"]
        .error.str.startswith("seed 3: ValueError: For backbone resnet18, 0 < n_features")
        .all()
    )
    assert table.loc["Padim, small"].seeds.eq(0).all()

    decodiff = table.loc[("DeCoDiff", "multi", "mean")]
    costs = [
        "train_seconds",
        "ms_batch_1",
        "ms_batch_8",
        "memory_mb",
        "parameters",
        "state_mb",
        "normal_change",
        "correction_psnr",
    ]
    assert decodiff[[*METRICS, *RATES, *costs]].notna().all()
    assert 300 < decodiff.memory_mb < 5000
    assert 4.3e6 < decodiff.parameters < 4.5e6
    assert decodiff.state_mb > 4e-6 * decodiff.parameters
    assert 0 < decodiff.normal_change < 20
    assert 5 < decodiff.correction_psnr < 40
    kept = DeCoDiff.load_from_checkpoint(folder / "output" / "runs" / "DeCoDiff" / "multi" / "seed3" / "model.ckpt")
    assert kept.categories == ("bolt", "felt")
    assert kept.post_processor.has_thresholds
    run = folder / "output" / "runs" / "Padim,-small" / "multi" / "seed3"
    assert "Traceback" in (run / "log.txt").read_text()
    assert json.loads((run / "run.json").read_text())["error"].startswith("ValueError: For backbone resnet18")


def test_runs_that_ended_stay_and_others_are_run_again(
    folder: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = folder / "output" / "runs" / "DeCoDiff" / "multi" / "seed3" / "run.json"
    written = record.stat().st_mtime_ns
    main([*write_config(folder, root, PADIM), "--modes", "[multi,single]", "--models", "['Padim, small']"])
    printed = capsys.readouterr().out
    assert "[1/3] Padim, small · multi · seed 3: again, with other settings: " in printed
    assert "[3/3] Padim, small · single felt · seed 3: " in printed
    table = read_table(folder)
    assert table.error.isna().all()
    assert len(table) == 9
    assert table.loc["DeCoDiff"].seeds.eq(1).all()

    main(write_config(folder, root, PADIM))
    printed = capsys.readouterr().out
    assert "[1/2] DeCoDiff · multi · seed 3: done before\n[2/2] Padim, small · multi · seed 3: done before" in printed
    assert record.stat().st_mtime_ns == written
    pd.testing.assert_frame_equal(read_table(folder), table)  # the other mode's rows are still there
    records = pd.DataFrame(json.loads((folder / "output" / "table.json").read_text()))
    assert records.pixel_ap.tolist() == pytest.approx(table.pixel_ap.tolist(), rel=1e-12)
    assert f"| DeCoDiff | multi | 1 | {table.image_auroc.iloc[2]:.3f} |" in (folder / "output" / "table.md").read_text()


def test_metrics_equal_those_of_anomalibs_engine(folder: Path, root: Path, tmp_path: Path) -> None:
    seed_everything(3, workers=True)
    data = MultiCategory(root, **DATA, seed=3)
    padim = Padim(
        **PADIM,
        pre_processor=PreProcessor(
            Compose([Resize((64, 64), antialias=True), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
        ),
        post_processor=DeCoDiffPostProcessor(),
        evaluator=False,
        visualizer=False,
    )
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, max_epochs=1)
    engine.fit(padim, datamodule=data)
    (expected,) = engine.test(padim, datamodule=data)
    measured = read_table(folder).loc[("Padim, small", "multi", "mean")]
    assert {f"mean/{name}": measured[name] for name in METRICS} == pytest.approx(
        {name: value for name, value in expected.items() if name.removeprefix("mean/") in METRICS}, abs=1e-6
    )
    assert 0.05 < measured.pixel_ap < 0.9  # neither lost nor perfect, so that agreement means something
    assert measured.parameters == sum(parameter.numel() for parameter in padim.model.parameters())
    assert measured.state_mb == pytest.approx(sum(tensor.nbytes for tensor in padim.state_dict().values()) / 1e6)


def test_pictures(folder: Path) -> None:
    sizes = {}
    for name in ("pixel_ap_vs_ms", "per_category", "precision_recall", "contact_sheet"):
        with Image.open(folder / "output" / f"{name}.png") as picture:
            sizes[name] = picture.size
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    # 4 images of each of 2 categories; image, outline, map and correction of DeCoDiff, maps of Padim in both modes
    assert sizes["contact_sheet"] == (int(110 * (0.4 + 1.5 * 6)), int(110 * (0.5 + 1.5 * 8)))
    assert sizes["per_category"] == (1050, 1350)
    assert sizes["pixel_ap_vs_ms"] == (1050, 720)

    kept = np.load(folder / "output" / "runs" / "DeCoDiff" / "multi" / "seed3" / "maps.npz")
    assert kept["maps"].shape == (8, 64, 64)
    assert kept["corrections"].shape == (8, 64, 64, 3)
    assert sorted(map(bool, kept["mask_path"])) == [False] * 2 + [True] * 6
    corrections = torch.from_numpy(kept["corrections"]).float()
    images = [np.asarray(Image.open(path).convert("RGB")) for path in kept["image_path"]]
    assert (corrections - torch.from_numpy(np.stack(images))).abs().mean() < 20
