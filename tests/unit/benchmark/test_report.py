"""Results of runs are collected and summarised over seeds."""

from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path

import pytest

from decodiff_anomalib.benchmark.grid import make_grid
from decodiff_anomalib.benchmark.record import write_record
from decodiff_anomalib.benchmark.report import collect, display_names, summarise

PADIM = {"class_path": "Padim", "init_args": {"pre_trained": False}}


def test_table_has_mean_and_deviation_over_seeds(layout, finish, tmp_path: Path) -> None:
    grid = make_grid(layout(PADIM | {"name": "A"}, PADIM | {"name": "B"}, seed={"grid": [0, 1, 2]}))
    scores = {("multi", 0): (0.1, 0.3), ("multi", 1): (0.2, 0.4), ("multi", 2): (0.6, 0.8)}
    scores |= {("single", 0): (0.5, 0.9), ("single", 1): (0.7, 0.7)}
    for run in grid:
        if run.model == "B":
            continue
        if (run.mode, run.seed) in scores:
            values = dict(zip(("bolt", "felt"), scores[run.mode, run.seed], strict=True))
            finish(run, {name: values[name] for name in run.categories}, seconds=10 + run.seed, note="a note")
        elif run.categories == ["bolt"]:
            finish(run, {"bolt": 0.3}, seconds=5)
        else:
            write_record(run.folder(tmp_path), {"configuration": asdict(run), "error": "OSError: no"})

    names = display_names(grid, tmp_path)
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


def test_runs_with_other_settings_do_not_count(layout, finish, tmp_path: Path) -> None:
    (run,) = (run for run in make_grid(layout(PADIM)) if run.mode == "multi")
    finish(replace(run, image_size=128), {"bolt": 0.5, "felt": 0.5}, seconds=1)
    assert run.read(tmp_path) == {}
    results, errors = collect([run], {run.model: run.model}, tmp_path)
    assert results.empty
    assert errors.empty
