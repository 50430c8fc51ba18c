"""A disk that becomes full: what was there before stays whole, nothing half-written is left, and a sentence says so."""

import argparse
import csv
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback
from PIL import Image

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.__main__ import main as decodiff
from decodiff_anomalib.benchmark.grid import make_grid
from decodiff_anomalib.benchmark.record import write_record
from decodiff_anomalib.benchmark.report import write_tables
from decodiff_anomalib.data import DemoTextures, MultiCategory
from decodiff_anomalib.denoiser import DenoiserSize, build_denoiser
from decodiff_anomalib.weights import to_official_state

PAGE = 4096  # of a tmpfs, which gives whole ones
MEGABYTE = 10**6
IMAGES = 24


class Disk:
    """A small file system.

    Attributes:
        folder: Where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def free(self) -> int:
        """Bytes that can still be written."""
        state = os.statvfs(self.folder)
        return state.f_bavail * state.f_frsize

    def fill(self, *, leave: int = 0) -> None:
        """Use up all but a few bytes."""
        with (self.folder / "ballast").open("ab") as file:
            while (rest := self.free() - leave) >= PAGE:
                file.write(bytes(min(rest, 10 * MEGABYTE)))
                file.flush()

    def contents(self) -> dict[str, str]:
        """Every file but the one that uses it up, with a digest of its bytes."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "ballast"]
        return {str(path.relative_to(self.folder)): digest(path) for path in files}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system in memory of 150 MB; only some users may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    if sys.platform != "linux" or mount is None or unmount is None:
        pytest.skip("needs Linux's tmpfs")
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=150m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run([unmount, "--lazy", str(folder)], check=True)


class FillAt(Callback):
    """Fills the disk before a batch of training or prediction."""

    def __init__(self, disk: Disk, batch: int, *, leave: int = 0) -> None:
        self.disk, self.batch, self.leave = disk, batch, leave
        self.before: dict[str, str] = {}

    def _fill(self, batch_idx: int) -> None:
        if batch_idx == self.batch and not self.before:
            self.before = self.disk.contents()
            self.disk.fill(leave=self.leave)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._fill(trainer.global_step)

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self._fill(batch_idx)


def engine(folder: Path, **arguments: object) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, **arguments)


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def command_fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command of ours says that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        decodiff(list(map(str, arguments)))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2, printed
    assert printed.startswith(f"decodiff {arguments[0]}: "), printed
    assert "Traceback" not in printed
    return printed


# ---------------------------------------------------------------- training


def test_a_training_keeps_the_checkpoint_before(
    disk: Disk, noise_root: Path, new_model: Callable[..., DeCoDiff], tmp_path: Path
) -> None:
    fill = FillAt(disk, 3, leave=2 * MEGABYTE)
    with pytest.raises(OSError, match=r"model\.ckpt' cannot be written: .*Make room, and go on from it"):
        engine(disk.folder / "run", callbacks=[fill]).fit(
            new_model(), datamodule=MultiCategory(noise_root, num_workers=0)
        )
    (name,) = (name for name in fill.before if name.endswith(".ckpt"))
    assert disk.contents() == fill.before
    before = torch.load(disk.folder / name, weights_only=True)
    assert 0 < before["global_step"] < 6
    (disk.folder / "ballast").unlink()
    model = new_model()
    engine(disk.folder / "run").fit(
        model, datamodule=MultiCategory(noise_root, num_workers=0), ckpt_path=disk.folder / name
    )
    assert model.post_processor.has_thresholds, "a training goes on once there is room"


# ---------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose rows are long: a tmpfs gives room in pages."""
    folder = tmp_path_factory.mktemp("x" * 120) / ("y" * 200)
    folder.mkdir()
    for index in range(IMAGES):
        Image.effect_noise((64, 64), 50).save(folder / f"{index:02}.png")
    return folder


def predict(
    run: Path, images: Path, checkpoint: Path, new_model: Callable[..., DeCoDiff], fill: FillAt, **arguments: object
) -> None:
    model = new_model(**{"visualizer": False} | arguments)
    engine(run, callbacks=[fill]).predict(model, data_path=images, ckpt_path=checkpoint, return_predictions=False)


def assert_whole_rows(table: Path) -> int:
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert table.read_bytes().endswith(b"\r\n")
    assert all(row["path"].endswith(".png") and float(row["pred_score"]) >= 0 and row["reason"] == "" for row in rows)
    return len(rows)


def test_a_prediction_goes_on_without_its_table_and_says_so(
    disk: Disk,
    images: Path,
    checkpoint: Path,
    new_model: Callable[..., DeCoDiff],
    caplog: pytest.LogCaptureFixture,
) -> None:
    predict(disk.folder / "run", images, checkpoint, new_model, FillAt(disk, 2))
    assert "The predictions are not written to" in messages(caplog)
    assert "No space left on device" in messages(caplog)
    (table,) = disk.folder.rglob("predictions.csv")
    assert 2 <= assert_whole_rows(table) < IMAGES
    assert set(disk.contents()) == {str(table.relative_to(disk.folder))}


def test_a_table_that_was_asked_for_ends_the_prediction_and_goes_on_later(
    disk: Disk, images: Path, checkpoint: Path, new_model: Callable[..., DeCoDiff], tmp_path: Path
) -> None:
    table = disk.folder / "table.csv"
    with pytest.raises(OSError, match="No space left on device") as raised:
        predict(tmp_path / "run", images, checkpoint, new_model, FillAt(disk, 2), predictions=table)
    assert "table.csv" in str(raised.value)
    assert 2 <= assert_whole_rows(table) < IMAGES
    (disk.folder / "ballast").unlink()
    predict(tmp_path / "run", images, checkpoint, new_model, FillAt(disk, -1), predictions=table)
    assert assert_whole_rows(table) == IMAGES


def test_a_picture_that_cannot_be_written_is_named(
    disk: Disk, images: Path, checkpoint: Path, new_model: Callable[..., DeCoDiff]
) -> None:
    fill = FillAt(disk, 3)
    with pytest.raises(OSError, match=r"No space left on device: .*images/03\.png") as raised:
        predict(disk.folder / "run", images, checkpoint, new_model, fill, visualizer=True)
    assert raised.value.errno == errno.ENOSPC
    after = disk.contents()
    assert {name: value for name, value in after.items() if not name.endswith(".csv")} == {
        name: value for name, value in fill.before.items() if not name.endswith(".csv")
    }
    for name in after:
        if name.endswith(".png"):
            Image.open(disk.folder / name).load()


def test_a_prediction_goes_on_without_its_report_which_is_made_later(
    disk: Disk,
    images: Path,
    checkpoint: Path,
    new_model: Callable[..., DeCoDiff],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    table = tmp_path / "table.csv"
    predict(disk.folder / "run", images, checkpoint, new_model, FillAt(disk, 5), predictions=table, report=True)
    assert assert_whole_rows(table) == IMAGES
    assert "The report is not written: " in messages(caplog)
    assert "No space left on device" in messages(caplog)
    data = next(disk.folder.rglob("images.jsonl")).parent
    assert all(json.loads(line) for line in (data / "images.jsonl").read_text().splitlines())
    assert not list(data.parent.glob("report.html"))
    assert not [name for name in disk.contents() if Path(name).name.startswith(".")]

    (disk.folder / "ballast").unlink()
    decodiff(["report", str(data.parent)])
    page = data.parent / "report.html"
    assert page.stat().st_size > MEGABYTE
    disk.fill()
    before = disk.contents()
    printed = command_fails(capsys, "report", data.parent)
    assert "report.html" in printed
    assert "No space left on device" in printed
    assert disk.contents() == before


# ---------------------------------------------------------------- exports and thresholds


@pytest.mark.parametrize("method", ["to_onnx", "to_torch"])
def test_an_export_keeps_the_file_before(disk: Disk, exported: Path, checkpoint: Path, method: str) -> None:
    shutil.copytree(exported / "weights", disk.folder / "weights")
    (disk.folder / "weights" / "torch").mkdir()
    disk.fill(leave=MEGABYTE)
    before = disk.contents()
    model = DeCoDiff.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False).eval()
    with pytest.raises(OSError, match=r"No space left on device|cannot be written") as raised:
        getattr(model, method)(disk.folder)
    assert str(disk.folder) in str(raised.value)
    assert disk.contents() == before
    assert not list(disk.folder.rglob(".staging-*"))


@pytest.mark.parametrize("source", ["checkpoint", "onnx", "openvino"])
def test_thresholds_that_cannot_be_saved_leave_the_model_as_it_was(
    disk: Disk, exported: Path, checkpoint: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place and to another file."""
    if source == "checkpoint":
        model = Path(shutil.copy(checkpoint, disk.folder))
    else:
        shutil.copytree(exported / "weights" / source, disk.folder / source)
        model = next(path for path in (disk.folder / source).iterdir() if path.suffix in {".onnx", ".xml"})
    disk.fill(leave=MEGABYTE)
    before = disk.contents()
    for further in ([], ["--output", disk.folder / f"other{model.suffix}"]):
        printed = command_fails(capsys, "threshold", model, "--rate", "0.2", *further)
        assert str(disk.folder) in printed
        assert disk.contents() == before
    decodiff(["threshold", str(model), "--rate", "0.2", "--output", str(disk.folder.parent / f"other{model.suffix}")])


def test_a_refined_model_that_cannot_be_saved_leaves_nothing(
    disk: Disk, checkpoint: Path, noise_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.fill(leave=MEGABYTE)
    arguments = ["--normal", noise_root / "bolt" / "train" / "good", "--category", "bolt"]
    printed = command_fails(capsys, "refine", checkpoint, *arguments, "--output", disk.folder / "refined.ckpt")
    assert str(disk.folder) in printed
    assert disk.contents() == {}


# ---------------------------------------------------------------- benchmarks, weights, demo


def benchmark_arguments(noise_root: Path, output: Path) -> dict[str, object]:
    data = {"class_path": "MultiCategory", "init_args": {"root": str(noise_root), "num_workers": 0}}
    model = {"class_path": "DeCoDiff", "init_args": {"train_steps": 2, "denoiser": "nano"}}
    benchmark = {"seed": 0, "model": model, "data": data}
    return {"benchmark": benchmark, "image_size": 64, "accelerator": "cpu", "output": str(output)}


def test_a_benchmark_keeps_its_records_and_tables(disk: Disk, noise_root: Path) -> None:
    arguments = benchmark_arguments(noise_root, disk.folder / "output")
    grid = make_grid(arguments["benchmark"], image_size=64, accelerator="cpu")
    output = disk.folder / "output"
    write_tables(grid, output)
    folder = grid[0].folder(output)
    write_record(folder, {"configuration": {}, "error": "none"})
    disk.fill()
    before = disk.contents()
    for write in (lambda: write_tables(grid, output), lambda: write_record(folder, {"result": "x" * 2 * PAGE})):
        with pytest.raises(OSError, match=r"No space left on device.*(table|run)"):
            write()
        assert disk.contents() == before


def test_a_benchmark_that_cannot_begin_says_so(
    disk: Disk, noise_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "benchmark.yaml"
    config.write_text(json.dumps(benchmark_arguments(noise_root, disk.folder / "output")))  # which is YAML too
    disk.fill()
    printed = command_fails(capsys, "benchmark", "--config", config)
    assert "No space left on device" in printed
    assert "run.json" in printed
    assert disk.contents() == {}


def test_converted_weights_that_cannot_be_saved_leave_those_before(disk: Disk, tmp_path: Path) -> None:
    size = DenoiserSize(32, 8, 16, layers=1, multipliers=(1, 1, 1))
    state = to_official_state(build_denoiser(size, 4, 3))
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "official.pt")
    arguments = ["convert", str(tmp_path / "official.pt"), "--to", str(disk.folder / "weights")]
    decodiff(arguments)
    disk.fill()
    before = disk.contents()
    assert len(before) == 2
    with pytest.raises(OSError, match=r"(No space left on device|is the disk full).*model\.safetensors"):
        decodiff(arguments)
    assert disk.contents() == before


def test_demo_textures_that_do_not_fit_leave_those_before(disk: Disk, data_root: Path) -> None:
    shutil.copytree(data_root, disk.folder, dirs_exist_ok=True)
    damaged = next(disk.folder.rglob("*.png"))
    damaged.write_bytes(b"damaged")
    disk.fill(leave=5 * MEGABYTE)
    before = disk.contents()
    with pytest.raises(OSError, match=r"Cannot write the demo textures to .*No space left.*Name a writable folder"):
        DemoTextures(root=disk.folder).prepare_data()
    assert disk.contents() == before
    assert not list(disk.folder.rglob(".staging-*"))


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    DemoTextures(root=root).prepare_data()
    return root


# ---------------------------------------------------------------- where nothing can be mounted


LIMITED = """
import json, resource, sys
from pathlib import Path
from anomalib.engine import Engine
from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.__main__ import main
from decodiff_anomalib.data import DemoTextures, MultiCategory

root, checkpoint, folder = map(Path, sys.argv[1:])
engine = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
arguments = {"preset": "fast", "image_size": 64, "denoiser": "nano"}

def fit():
    model = DeCoDiff(**arguments, train_steps=2)
    Engine(default_root_dir=folder / "run", **engine).fit(model, datamodule=MultiCategory(root, num_workers=0))

def predict():
    Engine(default_root_dir=folder / "predicted", **engine).predict(
        DeCoDiff(**arguments), data_path=root / "bolt" / "test", ckpt_path=checkpoint
    )

def threshold():
    main(["threshold", str(folder / "model.ckpt"), "--rate", "0.2"])

def textures():
    DemoTextures(root=folder / "textures").prepare_data()

found = {}
for step, size in ((fit, 10**6), (threshold, 10**6), (predict, 10_000), (textures, 10_000)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        step()
    except BaseException as error:
        found[step.__name__] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""


def test_files_that_may_not_grow_are_as_a_full_disk(noise_root: Path, checkpoint: Path, tmp_path: Path) -> None:
    """By a limit that any user may set, in a process of its own."""
    folder = tmp_path / "limited"
    folder.mkdir()
    model = Path(shutil.copy(checkpoint, folder / "model.ckpt"))
    child = subprocess.run(
        [sys.executable, "-c", LIMITED, str(noise_root), str(checkpoint), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["fit"][0] == "OSError"
    assert "model.ckpt' cannot be written: " in found["fit"][1]
    assert found["threshold"] == ["SystemExit", "2"]
    assert "decodiff threshold: " in child.stderr
    assert str(model) in child.stderr
    assert found["predict"][0] == "OSError"
    assert "File too large: " in found["predict"][1]
    assert ".png" in found["predict"][1]
    assert found["textures"][0] == "OSError"
    assert "Cannot write the demo textures to " in found["textures"][1]
    assert digest(model) == digest(checkpoint)
    assert not list((folder / "run").rglob("*.ckpt"))
    assert not [path for path in folder.rglob(".*") if path.is_file() or path.name.startswith(".staging")]
