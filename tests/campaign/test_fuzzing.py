"""Damaged and malicious files: nothing in them is executed, and every error is a sentence that names the file."""

import argparse
import copy
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from onnx import TensorProto, load, save

from decodiff_anomalib.__main__ import main as decodiff
from decodiff_anomalib.benchmark import command
from decodiff_anomalib.benchmark.grid import make_grid
from decodiff_anomalib.benchmark.record import CATEGORY_METRICS, RECORD, write_record
from decodiff_anomalib.benchmark.report import VALUES, write_tables
from decodiff_anomalib.denoiser import DenoiserSize, build_denoiser
from decodiff_anomalib.weights import convert, load_pretrained, to_official_state

SEED = 4_711
JUNK = (
    *(None, True, -1, 0, 7, 10**30, 1.5, -0.0, float("inf"), float("nan"), "", "x", "x" * 5000, "\0", "../../up", "ü"),
    *([], {}, [1, 2], [[]], {"a": 1}, {"": None}, ["x", None], {"class_path": "os.system"}, (), b"bytes"),
)
PLAIN_JUNK = tuple(value for value in JUNK if not isinstance(value, tuple | bytes))


class Watched:
    """Counts files that were tried, and how those ended that did not end well."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.served, self.refused = 0, 0
        self.faults: list[str] = []

    def run(self, case: str, names: set[str], call: Callable[[], object]) -> None:
        """Call; what it raises must be an exit with status 2 or an error, in a sentence with one of the names."""
        self._capsys.readouterr()
        try:
            call()
        except SystemExit as stopped:
            kind, said = f"SystemExit {stopped.code}", self._capsys.readouterr().err
            is_allowed = stopped.code == 2 and "Traceback" not in said
        except (OSError, ValueError) as error:
            kind, said, is_allowed = type(error).__name__, str(error), True
        except Exception as error:  # noqa: BLE001 - that is the test
            kind, said, is_allowed = type(error).__name__, str(error), False
        else:
            self.served += 1
            return
        self.refused += 1
        if not is_allowed or not any(name in said for name in names):
            self.faults.append(f"{case}: {kind}: {said[:300]}")

    def check(self, at_least: int) -> None:
        """Fail with all that did not end well."""
        faults, count = "\n".join(self.faults), len(self.faults)
        assert not faults, f"{count} of {self.served + self.refused}:\n{faults}"
        assert self.refused >= at_least, (self.served, self.refused)


@pytest.fixture
def watched(capsys: pytest.CaptureFixture[str]) -> Watched:
    return Watched(capsys)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that only executed code would make."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


# ---------------------------------------------------------------- mutations


def damaged(content: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """The bytes of a file with changes, mostly near its ends, where formats have their structure."""
    chance = random.Random(seed)  # noqa: S311 - repeatable
    yield "empty", b""
    for number in range(count - 1):
        kind = chance.choice(("flip", "flip", "flip", "cut", "zero", "insert", "repeat", "swap"))
        reach = min(len(content), 3000)
        near = chance.random()
        low, high = (0, reach) if near < 0.4 else (len(content) - reach, len(content)) if near < 0.7 else (0, None)
        place = chance.randrange(low, high or len(content))
        changed = bytearray(content)
        if kind == "flip":
            for _ in range(chance.choice((1, 1, 3, 30))):
                changed[chance.randrange(low, high or len(content))] ^= chance.randrange(1, 256)
        elif kind == "cut":
            del changed[place:]
        elif kind == "zero":
            changed[place : place + 200] = bytes(len(changed[place : place + 200]))
        elif kind == "insert":
            changed[place:place] = chance.randbytes(chance.randrange(1, 50))
        elif kind == "repeat":
            changed[place:place] = changed[place : place + 100]
        else:
            changed[place : place + 8], changed[:8] = changed[:8], changed[place : place + 8]
        yield f"{number} {kind} at {place}", bytes(changed)


def rezipped(content: bytes, changes: dict[str, bytes | None]) -> bytes:
    """A zip file with other entries in place of those that end so, or without them."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            change = next((end for end in changes if entry.filename.endswith(end)), None)
            data = old.read(entry) if change is None else changes[change]
            if data is not None:
                new.writestr(entry.filename, data)
    return target.getvalue()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the parts of plain data are."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def mutated(value: Any, count: int, seed: int, junk: tuple[Any, ...] = PLAIN_JUNK) -> Iterator[tuple[str, Any]]:
    """Plain data with one to three of its parts replaced, removed or renamed."""
    chance = random.Random(seed)  # noqa: S311 - repeatable
    for number in range(count):
        changed, done = copy.deepcopy(value), []
        for _ in range(chance.choice((1, 1, 2, 3))):
            *above, last = chance.choice(list(places(changed)) or [(0,)])
            parent = changed
            for key in above:
                parent = parent[key]
            kind = chance.choice(("replace", "replace", "remove", "rename"))
            if not parent:
                continue
            if kind == "replace" or not isinstance(parent, dict):
                parent[last] = copy.deepcopy(chance.choice(junk))
            elif kind == "remove":
                del parent[last]
            else:
                parent["renamed"] = parent.pop(last)
            done.append(f"{kind} {'.'.join(map(str, (*above, last)))[-80:]}")
        yield f"{number} {', '.join(done)}", changed


class Executes:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple[object, ...]]:
        return self.function, self.arguments


def malicious(marker: Path) -> dict[str, Executes]:
    """Objects that would make a file if they were read without care."""
    return {
        "os.system": Executes(os.system, f"touch {marker}"),
        "exec": Executes(exec, f"open({str(marker)!r}, 'w')"),
        "eval": Executes(eval, f"open({str(marker)!r}, 'w')"),
        "open": Executes(open, str(marker), "w"),
        "touch": Executes(Path.touch, marker),
        "Popen": Executes(subprocess.Popen, ["touch", str(marker)]),
        "copy": Executes(shutil.copy, __file__, str(marker)),
        "torch.save": Executes(torch.save, 1, str(marker)),
        "torch.load": Executes(torch.load, str(marker)),
        "getattr": Executes(getattr, Path, "touch"),
    }


def pickled(value: object, marker: Path) -> Iterator[tuple[str, bytes]]:
    """Malicious objects alone, in each of PyTorch's formats, and in every entry of a checkpoint."""
    harms = malicious(marker)
    for name, harm in harms.items():
        for kind, zipped in (("zip", True), ("legacy", False)):
            file = io.BytesIO()
            torch.save(harm, file, _use_new_zipfile_serialization=zipped)
            yield f"{name} {kind}", file.getvalue()
        yield f"{name} pickle", pickle.dumps(harm)
    for number, (key, harm) in enumerate(zip(value, list(harms.values()) * 10, strict=False)):
        file = io.BytesIO()
        torch.save({**value, key: [harm] if number % 2 else harm}, file)
        yield f"in {key}", file.getvalue()


# ---------------------------------------------------------------- decodiff convert, weights=


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    """A small checkpoint of the authors."""
    torch.manual_seed(0)
    size = DenoiserSize(32, 8, 16, attention=(False, False, True), layers=1, multipliers=(1, 1, 1))
    state = to_official_state(build_denoiser(size, 4, 3))
    return {"model": state, "args": argparse.Namespace(num_heads=4, dataset="mvtec", vae_type="ema")}


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_damaged_checkpoints_are_converted_or_refused_by_name(
    official: dict[str, Any], watched: Watched, tmp_path: Path
) -> None:
    content, path = saved(official), tmp_path / "official.pt"
    for case, changed in damaged(content, 50, SEED):
        path.write_bytes(changed)
        watched.run(case, {"official.pt"}, lambda: convert(path, to=tmp_path / "out"))
    for end in ("data.pkl", "version", "byteorder", ".data/serialization_id", "data/0", "data/7"):
        for replacement in (None, b"", b"x", b"\x80\x02}q\0."):
            path.write_bytes(rezipped(content, {end: replacement}))
            watched.run(
                f"{end} {replacement!r}",
                {"official.pt"},
                lambda: convert(path, to=tmp_path / "out"),
            )
    watched.check(30)


def test_checkpoints_of_other_content_are_converted_or_refused_by_name(
    official: dict[str, Any], watched: Watched, tmp_path: Path
) -> None:
    path = tmp_path / "official.pt"
    chance = random.Random(SEED)  # noqa: S311 - repeatable
    tensors = (
        *(torch.zeros(()), torch.zeros(0), torch.zeros(0, 0, 3, 3), torch.zeros(1, 2, 3), torch.ones(5, dtype=int)),
        *(torch.zeros(10**6, 1).expand(10**6, 10**6), torch.zeros(32, 4, 3, 3, dtype=torch.complex64)),
        *(torch.zeros(3, 3).to_sparse(), torch.zeros(2, dtype=torch.bool), torch.full((32, 4, 3, 3), torch.nan)),
    )
    names = list(official["model"])
    decisive = [name for name in names if "op.weight" in name or "embedding" in name or "proj_in" in name]
    decisive += ["input_blocks.0.0.weight", *(name for name in names if "out_layers.3.weight" in name)]
    for number in range(60):
        state = dict(official["model"])
        chosen = chance.choice(decisive if number % 2 else names)
        kind = chance.choice(("tensor", "junk", "remove", "key"))
        if kind == "tensor":
            state[chosen] = chance.choice(tensors)
        elif kind == "junk":
            state[chosen] = chance.choice(JUNK)
        elif kind == "remove":
            del state[chosen]
        else:
            state[chance.choice((1, None, (2, 3), "input_blocks.9.0.op.weight"))] = state.pop(chosen)
        whole: object = {"model": state, "args": official["args"]}
        if number % 10 == 0:
            whole = {"state_dict": {f"model.diffusion_model.{name}": value for name, value in state.items()}}
        path.write_bytes(saved(whole))
        watched.run(
            f"{number} {kind} {chosen}",
            {"official.pt"},
            lambda: convert(path, to=tmp_path / "out"),
        )
    for junk in JUNK:
        for whole in (junk, {"model": junk, "args": official["args"]}, {"state_dict": junk}, {"state_dict": {1: junk}}):
            path.write_bytes(saved(whole))
            watched.run(repr(whole)[:80], {"official.pt"}, lambda: convert(path, to=tmp_path / "out"))
        for name in ("num_heads", "dataset", "vae_type"):
            arguments = argparse.Namespace(**vars(official["args"]) | {name: junk})
            path.write_bytes(saved(official | {"args": arguments}))
            watched.run(
                f"{name}={junk!r}"[:80],
                {"official.pt"},
                lambda: convert(path, to=tmp_path / "out"),
            )
    watched.check(100)


def test_converting_executes_nothing(official: dict[str, Any], watched: Watched, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "official.pt"
    for case, content in pickled({**official, "epoch": 3, "optimizer": {}}, marker):
        path.write_bytes(content)
        watched.run(case, {"official.pt"}, lambda: convert(path, to=tmp_path / "out"))
        assert not marker.exists(), case
    watched.check(30)


def test_damaged_converted_weights_are_refused_by_name(
    official: dict[str, Any], watched: Watched, tmp_path: Path
) -> None:
    (tmp_path / "official.pt").write_bytes(saved(official))
    folder = tmp_path / "converted"
    decodiff(["convert", str(tmp_path / "official.pt"), "--to", str(folder)])
    config, weights = folder / "config.json", folder / "model.safetensors"
    whole = config.read_bytes(), weights.read_bytes()
    for case, changed in mutated(json.loads(whole[0]), 50, SEED):
        config.write_text(json.dumps(changed))
        watched.run(case, {"converted"}, lambda: load_pretrained(folder))
    for case, content in damaged(whole[0], 20, SEED):
        config.write_bytes(content)
        watched.run(case, {"converted"}, lambda: load_pretrained(folder))
    config.write_bytes(whole[0])
    for case, content in damaged(whole[1], 20, SEED):
        weights.write_bytes(content)
        watched.run(case, {"converted"}, lambda: load_pretrained(folder))
    watched.check(50)


# ---------------------------------------------------------------- checkpoints


def move_threshold(path: Path) -> Callable[[], object]:
    """A command that opens a model; it writes what it opened to another file."""
    return lambda: decodiff(["threshold", str(path), "--rate", "0.2", "--output", str(path.with_stem("moved"))])


def test_damaged_models_are_opened_or_refused_by_name(checkpoint: Path, watched: Watched, tmp_path: Path) -> None:
    content, path = checkpoint.read_bytes(), tmp_path / "model.ckpt"
    for case, changed in damaged(content, 24, SEED):
        path.write_bytes(changed)
        watched.run(case, {"model.ckpt"}, move_threshold(path))
    with zipfile.ZipFile(checkpoint) as file:
        (name,) = (name for name in file.namelist() if name.endswith("data.pkl"))
        described = file.read(name)
    for case, changed in damaged(described, 40, SEED + 1):
        path.write_bytes(rezipped(content, {"data.pkl": changed}))
        watched.run(f"data.pkl {case}", {"model.ckpt"}, move_threshold(path))
    watched.check(30)


def test_models_of_other_content_are_opened_or_refused_by_name(
    checkpoint: Path, watched: Watched, tmp_path: Path
) -> None:
    path = tmp_path / "model.ckpt"
    whole = torch.load(checkpoint, map_location="cpu", weights_only=True)
    own = [key for key in whole if key not in {"optimizer_states", "lr_schedulers", "loops", "current_model_state"}]
    described = {key: whole[key] for key in own if key != "state_dict"}
    for case, changed in mutated(described, 40, SEED, JUNK):
        path.write_bytes(saved({"state_dict": whole["state_dict"], **changed}))
        watched.run(case, {"model.ckpt"}, move_threshold(path))
    chance = random.Random(SEED)  # noqa: S311 - repeatable
    names = sorted(whole["state_dict"])
    for number in range(12):
        state, name = dict(whole["state_dict"]), chance.choice(names)
        state[name] = chance.choice((torch.zeros(()), torch.zeros(7, 7), None, "x", torch.full((3,), torch.nan)))
        path.write_bytes(saved(whole | {"state_dict": state}))
        watched.run(f"{number} {name}", {"model.ckpt"}, move_threshold(path))
    for junk in ({}, [], 3, None, {"state_dict": {}}, {"decodiff": {}}, {"state_dict": {}, "decodiff": {}}):
        path.write_bytes(saved(junk))
        watched.run(repr(junk), {"model.ckpt"}, move_threshold(path))
    watched.check(30)


def test_opening_a_model_executes_nothing(checkpoint: Path, watched: Watched, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    whole = torch.load(checkpoint, map_location="cpu", weights_only=True)
    small = {key: value for key, value in whole.items() if key not in {"state_dict", "current_model_state"}}
    for case, content in pickled({**small, "state_dict": {}}, marker):
        path.write_bytes(content)
        watched.run(case, {"model.ckpt"}, move_threshold(path))
        assert not marker.exists(), case
    watched.check(30)


# ---------------------------------------------------------------- exported files


@pytest.fixture(scope="module")
def exported(exported: Path) -> Path:
    """Folder of the exported files themselves."""
    return exported / "weights"


def test_damaged_onnx_files_are_opened_or_refused_by_name(exported: Path, watched: Watched, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "onnx", tmp_path / "onnx"))
    path = folder / "model.onnx"
    for case, content in damaged(path.read_bytes(), 40, SEED):
        path.write_bytes(content)
        watched.run(case, {"model.onnx"}, move_threshold(path))
    for case, content in damaged(b"not a graph at all", 8, SEED):
        path.write_bytes(content)
        watched.run(case, {"model.onnx"}, move_threshold(path))
    watched.check(20)


def test_an_onnx_file_reads_no_file_elsewhere(exported: Path, watched: Watched, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "onnx", tmp_path / "onnx"))
    path, secret = folder / "model.onnx", tmp_path / "secret"
    secret.write_bytes(bytes(10**6))
    for location in (str(secret), "../secret", "/etc/passwd", "missing"):
        model = load(exported / "onnx" / "model.onnx")
        tensor = max(model.graph.initializer, key=lambda entry: len(entry.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": "64"}.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        save(model, path)
        watched.run(location, {"model.onnx"}, move_threshold(path))
    watched.check(4)


def test_damaged_openvino_files_are_opened_or_refused_by_name(exported: Path, watched: Watched, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "openvino", tmp_path / "openvino"))
    path, weights = folder / "model.xml", folder / "model.bin"
    whole = path.read_bytes(), weights.read_bytes()
    for case, content in damaged(whole[0], 20, SEED):
        path.write_bytes(content)
        watched.run(case, {"model.xml"}, move_threshold(path))
    entity = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><net name="&b;"/>'
    for content in (entity, b"<net/>", b"<net><layers/></net>", b'<net version="11"><layers><layer/></layers></net>'):
        path.write_bytes(content)
        watched.run(repr(content), {"model.xml"}, move_threshold(path))
    path.write_bytes(whole[0])
    for size in (0, 10, len(whole[1]) // 2, len(whole[1]) - 1):
        weights.write_bytes(whole[1][:size])
        watched.run(f"{size} bytes of weights", {"model.xml"}, move_threshold(path))
    weights.unlink()
    watched.run("no weights", {"model.xml"}, move_threshold(path))
    watched.check(15)


def test_damaged_records_of_thresholds_are_refused_by_name(exported: Path, watched: Watched, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "onnx", tmp_path / "onnx"))
    path, record = folder / "model.onnx", folder / "thresholds.json"
    whole = record.read_text()
    names = {"model.onnx", "thresholds.json", "The scores of normal images are not kept with this model."}
    for case, content in damaged(whole.encode(), 30, SEED):
        record.write_bytes(content)
        watched.run(case, names, move_threshold(path))
    for case, changed in mutated(json.loads(whole), 70, SEED):
        record.write_text(json.dumps(changed))
        watched.run(case, names, move_threshold(path))
    watched.check(50)


# ---------------------------------------------------------------- benchmarks


@pytest.fixture
def configuration(noise_root: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a benchmark, as its YAML file has it."""
    models = [
        {"name": "small", "class_path": "DeCoDiff", "init_args": {"train_steps": 2, "settings": {"maps": {}}}},
        {"class_path": "Padim", "init_args": {"pre_trained": False}, "trainer": {"max_epochs": 1}, "data": {}},
    ]
    data = {"class_path": "MultiCategory", "init_args": {"root": str(noise_root), "num_workers": 0}}
    return {
        "benchmark": {"seed": {"grid": [0, 1]}, "model": {"grid": models}, "data": data},
        "image_size": 64,
        "accelerator": "cpu",
        "output": str(tmp_path / "output"),
    }


def test_damaged_records_of_runs_are_read_or_refused_by_name(
    configuration: dict[str, Any], watched: Watched, tmp_path: Path
) -> None:
    """Nothing is run: the records say that all runs are finished."""
    grid = make_grid(configuration["benchmark"], image_size=64, accelerator="cpu")[:1]
    output = tmp_path / "output"
    folder = grid[0].folder(output)
    values = dict.fromkeys(VALUES, 0.5)
    result = {**values, "device": "cpu", "note": None, "normal_change": {}, "correction_psnr": {}}
    record = {"configuration": vars(grid[0]), "timing_seconds": 1.0, "result": result}
    metrics = [{"category": name, **values} for name in ("bolt", "felt", "mean")]
    write_record(folder, record)
    whole = (folder / RECORD).read_bytes()
    (folder / CATEGORY_METRICS).write_text(json.dumps(metrics))
    assert len(write_tables(grid, output)) == 3

    names = {RECORD, CATEGORY_METRICS, str(folder)}
    for case, content in damaged(whole, 60, SEED):
        (folder / RECORD).write_bytes(content)
        watched.run(case, names, lambda: write_tables(grid, output))
    for case, changed in mutated(json.loads(whole), 100, SEED):
        (folder / RECORD).write_text(json.dumps(changed))
        watched.run(case, names, lambda: write_tables(grid, output))
    (folder / RECORD).write_bytes(whole)
    for case, content in damaged(json.dumps(metrics).encode(), 40, SEED):
        (folder / CATEGORY_METRICS).write_bytes(content)
        watched.run(case, names, lambda: write_tables(grid, output))
    for case, changed in mutated(metrics, 60, SEED):
        (folder / CATEGORY_METRICS).write_text(json.dumps(changed))
        watched.run(case, names, lambda: write_tables(grid, output))
    watched.check(80)


def test_a_damaged_record_ends_a_benchmark_before_anything_is_run(
    configuration: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = make_grid(configuration["benchmark"], image_size=64, accelerator="cpu")
    damaged_record = grid[-1].folder(tmp_path / "output") / RECORD
    damaged_record.parent.mkdir(parents=True)
    damaged_record.write_text('{"configuration": {')
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(configuration))
    monkeypatch.setattr(command, "_execute", lambda *_: pytest.fail("was run"))
    with pytest.raises(SystemExit) as stopped:
        decodiff(["benchmark", "--config", str(tmp_path / "benchmark.yaml")])
    assert stopped.value.code == 2
    assert str(damaged_record) in capsys.readouterr().err
    assert damaged_record.read_text() == '{"configuration": {'


def test_damaged_configurations_of_benchmarks_are_refused_in_a_sentence(
    configuration: dict[str, Any], watched: Watched, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are still valid are not run here."""
    monkeypatch.setattr(command, "_execute", lambda *_: ("not run", True))
    monkeypatch.setattr(command, "write_tables", lambda *_: pd.DataFrame())
    monkeypatch.setattr(command, "write_plots", lambda *_: None)
    monkeypatch.setattr(command, "means_table", lambda *_: "")
    path, text = tmp_path / "benchmark.yaml", yaml.safe_dump(configuration)
    said = {"decodiff benchmark: ", "error: "}

    def run() -> None:
        decodiff(["benchmark", "--config", str(path)])

    path.write_text(text)
    run()
    for case, changed in mutated(configuration, 110, SEED):
        path.write_text(yaml.safe_dump(changed))
        watched.run(case, said, run)
    for case, content in damaged(text.encode(), 50, SEED):
        path.write_bytes(content)
        watched.run(case, said, run)
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system"):
        for place in ("seed", "model", "data"):
            changed = yaml.safe_load(text)
            changed["benchmark"][place] = "HERE"
            path.write_text(yaml.safe_dump(changed).replace("HERE", f'{tag} ["touch {marker}"]'))
            watched.run(f"{tag} in {place}", said, run)
            assert not marker.exists()
    for place in ("seed", "model", "data"):
        for function, arguments in (("subprocess.Popen", {"args": ["touch", str(marker)]}), ("os.system", {})):
            changed = yaml.safe_load(text)
            changed["benchmark"][place] = {"class_path": function, "init_args": arguments}
            path.write_text(yaml.safe_dump(changed))
            watched.run(f"{function} in {place}", said, run)
            assert not marker.exists()
    aliases = "a0: &a0 [x, x, x, x, x, x]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 6)}]\n" for level in range(1, 6)
    )
    for content in (
        aliases + "benchmark: *a5\n",
        "benchmark: &a [*a]\n",
        "? {}\n: {}\n",
        "- a\n- b\n",
        "a: b: c",
        "\t",
    ):
        path.write_text(content)
        watched.run(repr(content)[:60], said, run)
    watched.check(100)
