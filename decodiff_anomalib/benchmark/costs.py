"""What a model costs, and how good its corrected images are."""

import re
import time
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from anomalib.data.utils import LabelName
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor

from decodiff_anomalib.corruption import draw_defects
from decodiff_anomalib.data.dataset import MultiCategoryDataset
from decodiff_anomalib.lightning_model import DeCoDiff

TIMED_IMAGES, WARM_UP, MIN_REPEATS = 16, 2, 5
NORMAL_IMAGES_PER_CATEGORY = 16
GREY_VALUES = 255
DRAWN_CHANGE = 0.1  # of images in [-1, 1]
PROCESS = Path("/proc/self")


def timed_images(data: MultiCategoryDataset) -> torch.Tensor:
    """Images ``(N, 3, H, W)`` in [0, 1], evenly spaced over the test data, at the working size."""
    rows = np.linspace(0, len(data) - 1, TIMED_IMAGES).astype(int)
    return torch.stack([_image(data, row) for row in rows])


def _image(data: MultiCategoryDataset, row: int) -> torch.Tensor:
    image = data[row].image
    assert image is not None
    return image


def milliseconds_per_image(model: AnomalibModule, images: torch.Tensor, batch_size: int, seconds: float) -> float:
    """Median time of pre-processing, model and post-processing for one image, in milliseconds.

    Args:
        model: In evaluation mode.
        images: ``(N, 3, H, W)`` in [0, 1].
        batch_size: A divisor of ``N``.
        seconds: Batches are repeated until they took this long together.
    """
    batches, times = cycle(images.split(batch_size)), list[float]()
    with torch.inference_mode():
        for batch in islice(batches, WARM_UP):
            model(batch)
        while sum(times) < seconds or len(times) < MIN_REPEATS:
            _synchronise(images.device)
            began = time.perf_counter()
            model(next(batches))
            _synchronise(images.device)
            times.append(time.perf_counter() - began)
    return 1000 * median(times) / batch_size


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def change_on_normal_images(model: DeCoDiff, data: MultiCategoryDataset) -> dict[str, float]:
    """Mean absolute difference of correction and reconstruction of normal images, by category, in grey values."""
    assert isinstance(model.pre_processor, PreProcessor)
    transform, change = model.pre_processor.transform, {}
    assert transform is not None
    normal = data.samples[data.samples.label_index == LabelName.NORMAL]
    for category, rows in normal.groupby("category", sort=False):
        differences = []
        for row in rows.index[:NORMAL_IMAGES_PER_CATEGORY]:
            outputs = model.model(transform(_image(data, row)[None].to(model.device)))
            # both images are in [-1, 1]
            differences.append((outputs.correction - outputs.reconstruction).abs().mean() / 2 * GREY_VALUES)
        change[category] = float(torch.stack(differences).mean())
    return change


@torch.inference_mode()
def correction_psnr(model: DeCoDiff, data: MultiCategoryDataset) -> dict[str, float]:
    """How well drawn defects are replaced: PSNR in dB of the correction against the image before, in the defects.

    Only where a pixel was changed by more than :data:`DRAWN_CHANGE` it counts, so that neither what the correction
    leaves alone nor the size of a defect matters. Real defects have no image without them to compare with. The drawing
    is that of training, on normal test images, and repeats.
    """
    assert isinstance(model.pre_processor, PreProcessor)
    transform, quality = model.pre_processor.transform, {}
    assert transform is not None
    normal = data.samples[data.samples.label_index == LabelName.NORMAL]
    for category, rows in normal.groupby("category", sort=False):
        generator = torch.Generator().manual_seed(0)
        images = torch.stack([transform(_image(data, row)) for row in rows.index[:NORMAL_IMAGES_PER_CATEGORY]])
        defective = draw_defects(images, generator)
        drawn = ((defective - images).abs().amax(1, keepdim=True) > DRAWN_CHANGE).expand_as(images)
        corrected = [model.model(part.to(model.device)).correction.clamp(-1, 1).cpu() for part in defective.split(8)]
        squared = ((torch.cat(corrected) - images) / 2)[drawn].square().mean()
        quality[category] = float(-10 * squared.log10())
    return quality


def reset_peak_memory() -> None:
    """Let the peak count from here, without what was needed before training, such as distilling a teacher."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # only Linux has it
        (PROCESS / "clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Peak memory in MB: of the accelerator, else of this process without loader processes; NaN if unknown.

    Not ``ru_maxrss``, which on Linux starts at the peak of the parent process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text()):
            return int(found[1]) * 1024 / 1e6
    return float("nan")


def device_name(device: torch.device) -> str:
    """Name of the accelerator, or of the kind of device and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
