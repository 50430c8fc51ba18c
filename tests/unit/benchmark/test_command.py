"""What ``decodiff benchmark`` refuses and keeps; the runs themselves are in the integration tests."""

import re
import signal
import stat
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from decodiff_anomalib.__main__ import main
from decodiff_anomalib.benchmark.command import benchmark
from decodiff_anomalib.benchmark.grid import make_grid
from decodiff_anomalib.benchmark.record import RECORD

PADIM = {"class_path": "Padim", "init_args": {"pre_trained": False}}
FOLDER = {"class_path": "MVTecAD", "init_args": {"category": "bolt"}}


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
        ({"model": PADIM | {"name": ".."}}, "'..' cannot be the name of a model, because folders are named after it."),
        (
            {"data": {"class_path": "MultiCategory", "init_args": {"datamodules": {"/bolt": FOLDER}}}},
            "'/bolt' cannot be the name of a category, because folders are named after it. Rename it: ",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(
    layout, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, message: str
) -> None:
    config = tmp_path / "benchmark.yaml"
    config.write_text(yaml.safe_dump({"benchmark": layout(PADIM) | changes, "output": str(tmp_path / "output")}))
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
def test_filters_list_the_valid_names(
    layout, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    config = tmp_path / "benchmark.yaml"
    config.write_text(yaml.safe_dump({"benchmark": layout(PADIM)}))
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "--config", str(config), *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def interpreter(path: Path, script: str) -> str:
    """A program that is run instead of Python."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_killed_run_fails_without_ending_the_others(
    layout, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "python", "echo to the log; kill -9 $$"))
    with pytest.raises(SystemExit) as stopped:
        benchmark(benchmark=layout(PADIM), modes=["single"], output=tmp_path / "output")
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    outcome = r"\[1/2\] Padim · single bolt · seed 0: \d+ s, failed: Killed by signal 9 \(out of memory\?\)\. \("
    assert re.search(outcome, printed)
    folder = tmp_path / "output" / "runs" / "Padim" / "single" / "felt" / "seed0"
    assert (folder / "log.txt").read_text() == "to the log\n"
    table = pd.read_csv(tmp_path / "output" / "table.csv")
    assert list(table.category) == ["bolt", "felt", "mean"]
    assert (table.error == "seed 0: Killed by signal 9 (out of memory?).").all()
    assert "- Padim, single, seed 0: Killed by signal 9" in (tmp_path / "output" / "table.md").read_text()


def test_an_interrupted_benchmark_keeps_finished_runs(
    layout, finish, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, *_ = make_grid(layout(PADIM, seed={"grid": [0, 1]}))
    finish(finished, {"bolt": 0.5, "felt": 0.5}, seconds=1)
    before = (finished.folder(tmp_path) / RECORD).read_bytes()
    before_handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "python", "kill -INT $PPID; exec sleep 20"))
    try:
        with pytest.raises(SystemExit) as stopped:
            benchmark(benchmark=layout(PADIM, seed={"grid": [0, 1]}), output=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before_handler)
    assert stopped.value.code == 130
    assert "seed 0: done before\n[2/2]" in capsys.readouterr().out
    assert (finished.folder(tmp_path) / RECORD).read_bytes() == before
