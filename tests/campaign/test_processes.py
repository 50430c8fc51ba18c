"""Several processes: one result, and an end with its reason when one of them dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from anomalib.engine import Engine
from lightning.pytorch import Callback
from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.data import MultiCategory

class Die(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            if sys.argv[-1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("rank 1 has no memory left")

def main():
    verb, root, folder, checkpoint, devices, strategy, death = sys.argv[1:]
    data = MultiCategory(root, num_workers=0, train_batch_size=4, eval_batch_size=1)
    engine = Engine(
        default_root_dir=folder, accelerator="cpu", devices=int(devices), strategy=strategy, logger=False,
        enable_progress_bar=False, callbacks=[Die()] if death else [],
    )
    model = DeCoDiff(preset="fast", image_size=64, denoiser="nano", train_steps=6, seed=0)
    if verb == "fit":
        engine.fit(model, datamodule=data)
        engine.trainer.save_checkpoint(Path(folder) / "end.ckpt", weights_only=True)
        return
    if verb == "validate":
        model = DeCoDiff.load_from_checkpoint(checkpoint)
        engine.validate(model, datamodule=data)
        found = {"thresholds": model.post_processor.image_thresholds.tolist()}
    else:
        (found,) = engine.test(DeCoDiff.load_from_checkpoint(checkpoint), datamodule=data)
    if engine.trainer.is_global_zero:
        Path(folder, "found.json").write_text(json.dumps(found))

if __name__ == "__main__":
    main()
"""


def run(
    verb: str, folder: Path, root: Path, checkpoint: Path, *, devices: int = 1, strategy: str = "auto", death: str = ""
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    program = folder / "program.py"  # Lightning starts the second process with the arguments of the first
    program.write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, program, verb, root, folder, checkpoint, str(devices), strategy, death],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_two_processes_find_what_one_finds(verb: str, noise_root: Path, checkpoint: Path, tmp_path: Path) -> None:
    found = {}
    for devices, strategy in ((1, "auto"), (2, "ddp")):
        folder = tmp_path / strategy
        done = run(verb, folder, noise_root, checkpoint, devices=devices, strategy=strategy)
        assert done.returncode == 0, done.stderr[-3000:]
        found[strategy] = json.loads((folder / "found.json").read_text())
    for name, value in found["auto"].items():
        assert found["ddp"][name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


def test_two_processes_train_one_model(noise_root: Path, checkpoint: Path, tmp_path: Path) -> None:
    done = run("fit", tmp_path / "run", noise_root, checkpoint, devices=2, strategy="ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    saved = torch.load(tmp_path / "run" / "end.ckpt", weights_only=True)
    assert saved["decodiff"]["categories"] == ["bolt", "felt"]
    assert saved["state_dict"]["post_processor.image_thresholds"].isfinite().all()


def test_copies_of_the_model_are_not_trained(noise_root: Path, checkpoint: Path, tmp_path: Path) -> None:
    done = run("fit", tmp_path / "run", noise_root, checkpoint, devices=2, strategy="ddp_spawn")
    assert done.returncode == 1
    assert "train copies of the model" in done.stderr
    assert "Give strategy='ddp'" in done.stderr


@pytest.mark.parametrize(
    ("death", "reason"),
    [("killed", "closed by|reset by|terminated with code -9"), ("error", "rank 1 has no memory left")],
)
def test_the_death_of_one_process_ends_the_run(
    death: str, reason: str, noise_root: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Within the time limit of this test: the other one must not wait for it for ever."""
    done = run("fit", tmp_path / "run", noise_root, checkpoint, devices=2, strategy="ddp", death=death)
    assert done.returncode != 0
    assert any(word in done.stdout + done.stderr for word in reason.split("|")), done.stderr[-3000:]
