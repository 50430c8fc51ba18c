"""Checks of image files before training, and reading of 16-bit images at full depth.

Anomalib reads every image with Pillow's ``convert("RGB")``, which clips 16-bit grey values to white and fails at a
broken file without naming it.
"""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.data.datamodules.image.mvtecad import MVTecAD
from anomalib.data.datasets.image.mvtecad import CATEGORIES
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import resize

logger = logging.getLogger(__name__)

MAX_NAMED = 10  # broken files listed in an error
WIDE_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N"}  # Pillow's modes of 16-bit images


def check_folders(datamodule: MVTecAD) -> None:
    """Check that the folders of MVTec AD's layout exist, before the datamodule reads or downloads them.

    Raises:
        FileNotFoundError: If the category's folder, its training images or its masks are missing.
    """
    folder = Path(datamodule.root) / datamodule.category
    if not folder.is_dir():
        if datamodule.category in CATEGORIES:
            logger.warning("%s does not exist; Anomalib will try to download all of MVTec AD there.", folder)
            return
        msg = f"{folder} does not exist. Give the folder that holds {datamodule.category}/train/good as --data.root."
        raise FileNotFoundError(msg)
    if not any((folder / "train" / "good").glob("*.png")):
        msg = f"There are no .png images in {folder / 'train' / 'good'}. DeCoDiff learns from normal images there."
        raise FileNotFoundError(msg)
    defects = {path.name for path in (folder / "test").glob("*") if path.is_dir()} - {"good"}
    unmasked = sorted(name for name in defects if not any((folder / "ground_truth" / name).glob("*.png")))
    if unmasked:
        msg = (
            f"{folder / 'ground_truth'} has no masks for {', '.join(unmasked)}, which MVTecAD needs. "
            "`--data MultiCategory` reads the same folders without masks."
        )
        raise FileNotFoundError(msg)


def _inspect(path: str) -> tuple[str, str | None]:
    """Pillow's mode of an image, or an empty mode and the reason if it cannot be read."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return "", f"{path}: {error}"
    return mode, None


def inspect_images(paths: Iterable[str | Path]) -> frozenset[str]:
    """Read every file once.

    Returns:
        frozenset[str]: Paths of the 16-bit images.

    Raises:
        ValueError: If any file cannot be read as an image; names up to ten of them.
    """
    names = [str(path) for path in paths]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(_inspect, names))
    broken = [reason for _, reason in results if reason]
    if broken:
        shown = "\n  ".join(broken[:MAX_NAMED])
        more = f"\n  … and {len(broken) - MAX_NAMED} more" if len(broken) > MAX_NAMED else ""
        msg = f"{len(broken)} of {len(names)} image files cannot be read:\n  {shown}{more}\nReplace or remove them."
        raise ValueError(msg)
    return frozenset(path for path, (mode, _) in zip(names, results, strict=True) if mode in WIDE_MODES)


def restore_depth(batch: ImageBatch, wide_paths: frozenset[str]) -> None:
    """Replace the images of ``batch`` whose path is in ``wide_paths`` by their 16-bit content, which Anomalib clips.

    An image is divided by 65535, or by 4095 if no value is larger (12-bit cameras), and resized to the size of the
    batch. Training augmentations are not applied to it.

    Args:
        batch: Images ``(B, 3, H, W)`` in [0, 1], changed in place.
        wide_paths: Paths of 16-bit images, as returned by :func:`inspect_images`.
    """
    images = batch.image
    assert images is not None
    for index, path in enumerate(batch.image_path or ()):
        if str(path) in wide_paths:
            with Image.open(path) as image:
                values = torch.from_numpy(np.asarray(image).astype(np.float32))
            values = (values / (4095 if values.max() <= 4095 else 65535)).clamp(0, 1)
            grey = resize(values[None], list(images.shape[-2:]), antialias=True)
            images[index] = grey.expand(3, -1, -1).to(images)


def image_paths(dataset: Dataset) -> list[str]:
    """Paths of the images of one of Anomalib's datasets, with or without annotations."""
    if hasattr(dataset, "samples"):
        return [str(path) for path in dataset.samples.image_path]
    return [str(path) for path in getattr(dataset, "image_filenames", ())]
