"""Image files as they come: found broken before training starts, and read at their full depth.

Anomalib reads every image with Pillow's ``convert("RGB")``, which clips 16-bit greys to white and stops at a broken
file without saying which.
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

MAX_NAMED = 10
WIDE_MODES = {"I", "I;16", "I;16B", "I;16L", "I;16N"}


def check_folders(datamodule: MVTecAD) -> None:
    """Look whether the folders of MVTec AD's layout are there, before the datamodule reads or downloads them.

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
    """Pillow's mode of an image and why it cannot be read, if so."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return "", f"{path}: {error}"
    return mode, None


def inspect_images(paths: Iterable[str | Path]) -> frozenset[str]:
    """Read every file once; return the 16-bit ones.

    Raises:
        ValueError: If any file cannot be read as an image; names up to ten of them.
    """
    paths = [str(path) for path in paths]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(_inspect, paths))
    broken = [reason for _, reason in results if reason]
    if broken:
        shown = "\n  ".join(broken[:MAX_NAMED])
        more = f"\n  … and {len(broken) - MAX_NAMED} more" if len(broken) > MAX_NAMED else ""
        msg = f"{len(broken)} of {len(paths)} image files cannot be read:\n  {shown}{more}\nReplace or remove them."
        raise ValueError(msg)
    return frozenset(path for path, (mode, _) in zip(paths, results, strict=True) if mode in WIDE_MODES)


def restore_depth(batch: ImageBatch, wide_paths: frozenset[str]) -> None:
    """Replace the images of ``batch`` that Anomalib clipped, those in ``wide_paths``, by their 16-bit content.

    The image is scaled by its type's range, or by 4095 where no value is larger (12-bit cameras), and resized as the
    batch is. Training augmentations do not reach it.
    """
    for index, path in enumerate(batch.image_path or ()):
        if str(path) in wide_paths:
            with Image.open(path) as image:
                values = torch.from_numpy(np.asarray(image).astype(np.float32))
            values = (values / (4095 if values.max() <= 4095 else 65535)).clamp(0, 1)
            grey = resize(values[None], list(batch.image.shape[-2:]), antialias=True)
            batch.image[index] = grey.expand(3, -1, -1).to(batch.image)


def image_paths(dataset: Dataset) -> list[str]:
    """The files behind one of Anomalib's datasets, with or without annotations."""
    if hasattr(dataset, "samples"):
        return [str(path) for path in dataset.samples.image_path]
    return [str(path) for path in getattr(dataset, "image_filenames", ())]
