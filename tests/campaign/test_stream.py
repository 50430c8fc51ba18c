"""Twenty thousand images in one prediction: memory stays flat, and an interrupted stream goes on."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

IMAGES = int(os.environ.get("DECODIFF_STREAM_IMAGES", "20000"))
PREDICTION = """
import resource, sys, time
from pathlib import Path
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from decodiff_anomalib import DeCoDiff

checkpoint, images, table = map(Path, sys.argv[1:])

class Memory(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx % 50 == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
            print(f"memory {batch_idx} {resident:.1f} {time.monotonic():.2f}", flush=True)

model = DeCoDiff.load_from_checkpoint(checkpoint)
model.visualizer = None
model._prediction_table.path = table
data = PredictDataset(images)
loader = DataLoader(data, batch_size=16, collate_fn=data.collate_fn)
engine = Engine(
    default_root_dir=table.parent, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[Memory()]
)
engine.predict(model, dataloaders=loader, return_predictions=False)
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for index in range(IMAGES):
        pixels = noise.integers(60, 160, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06}.png", compress_level=0)
    return folder


def listed(table: Path) -> list[str]:
    with table.open(newline="") as file:
        return [row["path"] for row in csv.DictReader(file)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc, which Linux has")
def test_a_long_stream_keeps_its_memory_and_goes_on_after_a_kill(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    command = [sys.executable, "-c", PREDICTION, str(checkpoint), str(images), str(table)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "first.txt").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while child.poll() is None and not (table.exists() and table.stat().st_size > IMAGES * 20):
            time.sleep(0.5)
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = len(listed(table))
    assert 0 < before < IMAGES
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    names = listed(table)
    assert sorted(names) == sorted(map(str, images.iterdir()))

    measured = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("memory")]
    batches, memory, seconds = (np.array(column, float) for column in zip(*measured, strict=True))
    settled = memory[batches >= min(200, batches.max() / 4)]
    pace = (batches[-1] - batches[0]) * 16 / (seconds[-1] - seconds[0])
    print(
        f"{before} images, kill, {len(names) - before} images: {settled[0]:.0f} to {settled.max():.0f} MB, {pace:.0f}/s"
    )
    assert settled.max() < 1.05 * settled[0]
