"""What ``decodiff benchmark`` runs, refuses, keeps and sums up; the runs themselves are in the integration tests."""

import json
import signal
import stat
import sys
from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from scipy.integrate import trapezoid
from sklearn.metrics import precision_recall_curve
from torchvision.transforms.v2 import Compose, Normalize, Resize

from decodiff_anomalib.__main__ import main
from decodiff_anomalib.benchmark import benchmark, make_grid
from decodiff_anomalib.benchmark_report import VALUES, accuracy_and_speed, collect, shown_names, summarise
from decodiff_anomalib.benchmark_run import RECORD, Run, build_model, shown_samples, whole_images, write_record
from decodiff_anomalib.evaluation import FIGURES, CategoryFigures

CONFIG = Path(__file__).parents[2] / "configs" / "benchmark.yaml"
PADIM = {"class_path": "Padim", "init_args": {"pre_trained": False}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two categories whose images nothing here opens."""
    for category in ("bolt", "felt"):
        for name in ("train/good/0", "test/good/0", "test/dent/0"):
            path = tmp_path / "data" / category / f"{name}.png"
            path.parent.mkdir(parents=True)
            path.touch()
    return tmp_path / "data"


def layout(root: Path, *models: dict, seed=0) -> dict:
    data = {"class_path": "MultiCategory", "init_args": {"root": str(root)}}
    return {"seed": seed, "model": {"grid": list(models)}, "data": data}


def finish(run: Run, output: Path, figures: dict[str, float], seconds: float, note: str | None = None) -> None:
    """Leave behind what a run that ended would."""
    costs = dict.fromkeys(VALUES[len(FIGURES) :], 1.0)
    result = costs | {"device": "cpu", "note": note, "train_seconds": seconds, "normal_change": {}}
    write_record(run.folder(output), {"configuration": asdict(run), "result": result})
    rows = [{"category": category, **dict.fromkeys(FIGURES, value)} for category, value in figures.items()]
    rows.append({"category": "mean", **dict.fromkeys(FIGURES, 0.123)})
    (run.folder(output) / "categories.json").write_text(json.dumps(rows))


def test_table_has_mean_and_deviation_over_seeds(root: Path, tmp_path: Path) -> None:
    grid = make_grid(layout(root, PADIM | {"name": "A"}, PADIM | {"name": "B"}, seed={"grid": [0, 1, 2]}))
    scores = {("multi", 0): (0.1, 0.3), ("multi", 1): (0.2, 0.4), ("multi", 2): (0.6, 0.8)}
    scores |= {("single", 0): (0.5, 0.9), ("single", 1): (0.7, 0.7)}
    for run in grid:
        if run.model == "B":
            continue
        if (run.mode, run.seed) in scores:
            of = dict(zip(("bolt", "felt"), scores[run.mode, run.seed], strict=True))
            finish(run, tmp_path, {name: of[name] for name in run.categories}, seconds=10 + run.seed, note="a note")
        elif run.categories == ["bolt"]:
            finish(run, tmp_path, {"bolt": 0.3}, seconds=5)
        else:
            write_record(run.folder(tmp_path), {"configuration": asdict(run), "error": "OSError: no"})

    names = shown_names(grid, tmp_path)
    assert names == {"A": "A (a note)", "B": "B"}
    table = summarise(*collect(grid, names, tmp_path), list(names.values()), ["bolt", "felt"])
    rows = table.set_index(["mode", "category"])
    assert list(rows.index) == [(mode, name) for mode in ("multi", "single") for name in ("bolt", "felt", "mean")]

    # multi: the means over categories of the three seeds are .2, .3 and .7
    assert rows.loc["multi", "mean"].pixel_ap == pytest.approx(0.4)
    assert rows.loc["multi", "mean"].pixel_ap_sd == pytest.approx(sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2))
    assert rows.loc["multi", "bolt"].pixel_ap == pytest.approx(0.3)
    assert rows.loc["multi", "felt"].train_seconds_sd == pytest.approx(1.0)
    # single: the third seed has bolt alone, which is no mean over categories
    assert rows.loc["single"].seeds.to_dict() == {"bolt": 3, "felt": 2, "mean": 2}
    assert rows.loc["single", "bolt"].pixel_ap == pytest.approx(0.5)
    assert rows.loc["single", "mean"].pixel_ap == pytest.approx(0.7)
    assert rows.loc["single", "mean"].pixel_ap_sd == pytest.approx(0, abs=1e-12)
    assert rows.error.dropna().to_dict() == dict.fromkeys(
        [("single", "felt"), ("single", "mean")], "seed 2: OSError: no"
    )


def test_runs_with_other_settings_do_not_count(root: Path, tmp_path: Path) -> None:
    (run,) = (run for run in make_grid(layout(root, PADIM)) if run.mode == "multi")
    finish(replace(run, image_size=128), tmp_path, {"bolt": 0.5, "felt": 0.5}, seconds=1)
    assert run.read(tmp_path) == {}
    results, errors = collect([run], {run.model: run.model}, tmp_path)
    assert results.empty
    assert errors.empty


def test_curve_lies_on_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.random((6, 40, 40)) < 0.1)
    maps = (torch.from_numpy(rng.random((6, 40, 40))) + 0.5 * masks).float().div(2).mul(500).round().div(500)  # ties
    figures = CategoryFigures("bolt")
    for half in (slice(0, 2), slice(2, 6)):
        scores = maps[half].amax((1, 2))
        figures.update(
            SimpleNamespace(
                category=["bolt"] * len(scores),
                pred_score=scores,
                gt_label=torch.ones(len(scores)),
                pred_label=None,
                anomaly_map=maps[half],
                gt_mask=masks[half],
            )
        )
    recall, precision = figures.precision_recall()
    expected_precision, expected_recall, _ = precision_recall_curve(masks.flatten(), maps.flatten())
    distance = np.hypot(recall[:, None] - expected_recall, precision[:, None] - expected_precision).min(1)
    assert distance.max() < 1e-9
    assert 150 < len(recall) <= 200
    assert (np.diff(recall) > 0).all()
    assert recall[-1] == 1
    assert np.diff(recall).max() < 0.02
    assert figures.compute()["pixel_ap"] == pytest.approx(trapezoid(precision, recall), abs=0.01)
    assert [len(values) for values in CategoryFigures("felt").precision_recall()] == [0, 0]


def test_models_see_whole_images_of_one_size(root: Path) -> None:
    entry = {
        "class_path": "Patchcore",
        "init_args": {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False},
    }
    model = build_model(make_grid(layout(root, entry), image_size=96)[0])
    resize, normalize = model.pre_processor.transform.transforms
    assert resize.size == [96, 96]
    assert normalize.mean == [0.485, 0.456, 0.406]
    assert model.evaluator is None
    assert model.visualizer is None
    assert type(model.post_processor).__name__ == "DeCoDiffPostProcessor"

    cropping = Patchcore.configure_pre_processor((256, 256), center_crop_size=(224, 224))
    nested = PreProcessor(Compose([cropping.transform, Normalize([0.5] * 3, [0.5] * 3)]))
    kept = whole_images(nested, 64).transform.transforms
    assert [type(step) for step in kept] == [Resize, Normalize, Normalize]
    image = torch.zeros(1, 3, 80, 80)
    image[..., 0, 0] = 1  # what a crop would lose
    assert whole_images(cropping, 80).transform(image)[0, 0, 0, 0] > 2

    ours = build_model(make_grid(layout(root, {"class_path": "DeCoDiff"}, seed=3), image_size=64)[0])
    assert ours.pre_processor.transform.transforms[0].size == [64, 64]
    assert ours.seed == 3


def test_the_configuration_file_is_valid(root: Path) -> None:
    grid = make_grid(yaml.safe_load(CONFIG.read_text())["benchmark"], root)
    assert len(grid) == 4 * 3 * 3  # models, seeds, both categories and each
    assert list(dict.fromkeys(run.model for run in grid)) == ["DeCoDiff", "DeCoDiff fast", "PatchCore", "EfficientAd"]
    assert {run.data["train_batch_size"] for run in grid if run.model == "EfficientAd"} == {1}


def test_grids_of_arguments_make_models_that_are_told_apart(root: Path) -> None:
    entry = {"class_path": "Padim", "init_args": {"pre_trained": False, "n_features": {"grid": [4, 8]}}}
    grid = make_grid(layout(root) | {"model": entry})
    assert {run.model: run.init_args["n_features"] for run in grid} == {
        "Padim n_features=4": 4,
        "Padim n_features=8": 8,
    }
    assert len({run.folder(Path()) for run in grid}) == len(grid) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"class_path": "Pardim"}}, "class_path='Pardim', which Anomalib does not know; valid: "),
        ({"model": {"name": "A"}}, "has no class_path"),
        ({"model": PADIM | {"backbone": "resnet18"}}, "Model 'Padim' has no backbone; valid: backbone_weights, "),
        ({"model": {"class_path": "Padim", "init_args": {"size": 1}}}, "init_args of 'Padim' has no size"),
        ({"model": PADIM | {"trainer": {"epochs": 1}}}, "trainer of 'Padim' has no epochs"),
        ({"model": PADIM | {"data": {"seed": 1}}}, "data of 'Padim' has no seed"),
        ({"model": {"grid": [PADIM, PADIM | {"name": "Pa dim"}, PADIM | {"name": "Pa-dim"}]}}, "told apart"),
        (
            {"model": {"class_path": "DeCoDiff", "init_args": {"image_size": 64}}},
            "image_size=64, the benchmark 256; leave it out",
        ),
        ({"data": {"class_path": "MVTecAD"}}, "benchmark.data is 'MVTecAD'; it must be MultiCategory"),
        ({"data": {"class_path": "MultiCategory", "init_args": {"root": "nowhere"}}}, "nowhere' is not a folder"),
        ({"seeds": [1]}, "benchmark has no seeds; valid: data, model, seed."),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, message: str
) -> None:
    config = tmp_path / "benchmark.yaml"
    config.write_text(yaml.safe_dump({"benchmark": layout(root, PADIM) | changes, "output": str(tmp_path / "output")}))
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "--config", str(config)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "[Padin]"], "no model 'Padin'; it has Padim."),
        (["--categories", "[bolt,nut]"], "Unknown categories 'nut'; valid: bolt, felt."),
    ],
)
def test_filters_name_what_there_is(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    config = tmp_path / "benchmark.yaml"
    config.write_text(yaml.safe_dump({"benchmark": layout(root, PADIM)}))
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "--config", str(config), *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def interpreter(path: Path, script: str) -> str:
    """A program that is run in the place of Python."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_killed_run_is_its_own_failure(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "python", "echo to the log; kill -9 $$"))
    with pytest.raises(SystemExit) as stopped:
        benchmark(benchmark=layout(root, PADIM), modes=["single"], output=tmp_path / "output")
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "[1/2] Padim · single bolt · seed 0: 0 s, failed: Killed by signal 9 (out of memory?). (" in printed
    folder = tmp_path / "output" / "runs" / "Padim" / "single" / "felt" / "seed0"
    assert (folder / "log.txt").read_text() == "to the log\n"
    table = pd.read_csv(tmp_path / "output" / "table.csv")
    assert list(table.category) == ["bolt", "felt", "mean"]
    assert (table.error == "seed 0: Killed by signal 9 (out of memory?).").all()
    assert "- Padim, single, seed 0: Killed by signal 9" in (tmp_path / "output" / "table.md").read_text()


def test_an_interrupted_benchmark_keeps_what_ended(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, *_ = make_grid(layout(root, PADIM, seed={"grid": [0, 1]}))
    finish(ended, tmp_path, {"bolt": 0.5, "felt": 0.5}, seconds=1)
    before = (ended.folder(tmp_path) / RECORD).read_bytes()
    before_handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs are born deaf to it
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "python", "kill -INT $PPID; exec sleep 20"))
    try:
        with pytest.raises(SystemExit) as stopped:
            benchmark(benchmark=layout(root, PADIM, seed={"grid": [0, 1]}), output=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before_handler)
    assert stopped.value.code == 130
    assert "seed 0: done before\n[2/2]" in capsys.readouterr().out
    assert (ended.folder(tmp_path) / RECORD).read_bytes() == before


def test_figures_that_are_not_there_leave_a_picture(root: Path, tmp_path: Path) -> None:
    """Without masks there are none of pixels."""
    grid = make_grid(layout(root, PADIM))
    finish(grid[0], tmp_path, {"bolt": float("nan"), "felt": float("nan")}, seconds=1)
    table = summarise(*collect(grid, shown_names(grid, tmp_path), tmp_path), ["Padim"], ["bolt", "felt"])
    (axes,) = accuracy_and_speed(table[table.error.isna()]).axes
    assert axes.get_ylim() == (0, 1)
    assert axes.get_xlim() == (0, 1.15)


def test_the_configurations_are_valid(root: Path) -> None:
    for config in sorted(CONFIG.parent.glob("*.yaml")):
        settings = yaml.safe_load(config.read_text())
        if "benchmark" in settings:
            assert len(make_grid(settings["benchmark"], root)) >= 12, config


def test_the_sheet_shows_several_defects_and_the_same_images_whatever_else_there_is() -> None:
    def samples(category: str) -> pd.DataFrame:
        kinds = ["good"] * 5 + ["dent"] * 4 + ["scratch"] * 9
        return pd.DataFrame(
            {
                "image_path": [f"{category}/{kind}/{index}" for index, kind in enumerate(kinds)],
                "label": kinds,
                "label_index": [int(kind != "good") for kind in kinds],
                "category": category,
            }
        )

    alone = samples("felt")
    both = pd.concat([samples("bolt"), alone], ignore_index=True)
    shown = both.loc[shown_samples(both)]
    assert shown.groupby("category").label.value_counts().loc["felt"].to_dict() in (
        {"good": 1, "dent": 1, "scratch": 2},
        {"good": 1, "dent": 2, "scratch": 1},
    )
    of_felt = alone.loc[shown_samples(alone)].image_path
    assert set(of_felt) == set(shown[shown.category == "felt"].image_path)
