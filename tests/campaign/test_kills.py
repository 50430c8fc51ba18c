"""Trainings and builds that are killed at random moments go on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from decodiff_anomalib.data import DemoTextures

STEPS = 60
CHAINS, KILLS = 5, 4

TRAINING = """
import sys
from pathlib import Path
from anomalib.engine import Engine
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.data import MultiCategory

root, folder, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

class Announce(Callback):
    def on_train_start(self, *_):
        (folder / "begun").touch()

folder.mkdir(exist_ok=True)
(folder / "begun").unlink(missing_ok=True)
model = DeCoDiff(preset="fast", image_size=64, denoiser="nano", train_steps=steps, seed=0)
every_step = ModelCheckpoint(dirpath=folder, filename="step", every_n_train_steps=1, enable_version_counter=False)
engine = Engine(
    default_root_dir=folder / "run", accelerator="cpu", logger=False, enable_progress_bar=False,
    callbacks=[Announce(), every_step],
)
resumed = folder / "step.ckpt"
engine.fit(
    model, datamodule=MultiCategory(root, num_workers=0, train_batch_size=5),
    ckpt_path=resumed if resumed.is_file() else None,
)
engine.trainer.save_checkpoint(folder / "end.ckpt", weights_only=True)
"""


def train(root: Path, folder: Path, kill_after: float | None = None) -> bool:
    """Train, or go on; killed some seconds after the first step, unless it ended before. Returns whether it ended."""
    folder.mkdir(exist_ok=True)
    begun = folder / "begun"
    begun.unlink(missing_ok=True)
    with (folder / "log.txt").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(root), str(folder), str(STEPS)],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if kill_after is not None:
            while not begun.exists() and child.poll() is None:
                time.sleep(0.02)
            time.sleep(kill_after)
            child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode in {0, -signal.SIGKILL}, (folder / "log.txt").read_text()[-3000:]
    return child.returncode == 0


@pytest.fixture(scope="module")
def whole(noise_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], float]:
    """State of a training that was not killed, and the seconds from its first step to its end."""
    folder = tmp_path_factory.mktemp("whole")
    train(noise_root, folder)
    seconds = (folder / "end.ckpt").stat().st_mtime - (folder / "begun").stat().st_mtime
    return state(folder), seconds


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "end.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("chain", range(CHAINS))
def test_a_training_killed_several_times_ends_bit_for_bit_as_an_uninterrupted_one(
    noise_root: Path, whole: tuple[dict[str, torch.Tensor], float], tmp_path: Path, chain: int
) -> None:
    """Every step writes a checkpoint, so that many of the kills fall into its writing."""
    expected, seconds = whole
    moments = np.random.default_rng(chain)
    kills = sum(not train(noise_root, tmp_path, moments.uniform(0, seconds / KILLS)) for _ in range(KILLS))
    train(noise_root, tmp_path)
    print(f"{kills} kills in {seconds:.1f} s")
    assert kills >= KILLS - 1
    ended = state(tmp_path)
    assert ended.keys() == expected.keys()
    differing = [
        name for name, value in expected.items() if not torch.equal(value.nan_to_num(-1), ended[name].nan_to_num(-1))
    ]
    assert not differing


BUILD = """
import sys
from pathlib import Path
from decodiff_anomalib.data import DemoTextures
Path(sys.argv[1]).with_name("begun").touch()
DemoTextures(root=sys.argv[1]).prepare_data()
"""


def test_images_whose_building_was_killed_are_built_again(tmp_path: Path, data_root: Path) -> None:
    expected = contents(data_root)
    moments = np.random.default_rng(0)
    for number in range(4):
        root = tmp_path / f"{number}" / "root"
        root.parent.mkdir()
        child = subprocess.Popen([sys.executable, "-c", BUILD, str(root)], env=os.environ | {"OMP_NUM_THREADS": "1"})
        while not (root.parent / "begun").exists():
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 2))
        child.send_signal(signal.SIGKILL)
        child.wait()
        DemoTextures(root=root).prepare_data()
        assert contents(root) == expected


def test_two_first_builds_at_once_both_have_the_images(tmp_path: Path, data_root: Path) -> None:
    root = tmp_path / "shared" / "root"
    root.parent.mkdir()
    children = [subprocess.Popen([sys.executable, "-c", BUILD, str(root)]) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert contents(root) == contents(data_root)


def contents(root: Path) -> dict[str, bytes]:
    folder = Path(DemoTextures(root=root).root)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of ``DemoTextures`` that were built in peace."""
    root = tmp_path_factory.mktemp("demo")
    DemoTextures(root=root).prepare_data()
    return root


def test_two_trainings_in_one_folder_both_end(noise_root: Path, tmp_path: Path) -> None:
    """Each has its own version of the results, as Anomalib numbers them."""
    command = [
        str(Path(sys.executable).with_name("anomalib")),
        *("train", "--model", "DeCoDiff", "--model.preset", "fast", "--model.image_size", "64"),
        *("--model.denoiser", "nano", "--model.train_steps", "4"),
        *("--data", "MultiCategory", "--data.root", str(noise_root), "--data.num_workers", "0"),
        *("--default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"),
    ]
    children = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    models = list(tmp_path.rglob("model.ckpt"))
    assert models
    for path in models:
        assert torch.load(path, weights_only=True)["state_dict"]["post_processor.image_thresholds"].isfinite().all()
