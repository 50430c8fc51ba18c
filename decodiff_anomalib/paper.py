"""The published protocol: what its data sets, pictures and learning rate are like.

What is a default of the model lives in :mod:`decodiff_anomalib.presets`; how results are measured, in
:mod:`decodiff_anomalib.evaluation`. Points that surprise are kept, and said beside the code.
"""

import math

import numpy as np
import torch
from PIL import Image

Size = tuple[int, int]
"""Height and width in pixels."""

RESIZE: Size = (288, 288)
CROP: Size = (256, 256)

SHIFT_PROBABILITY = 0.5
HALF_TURN_PROBABILITY = {"mvtec": 0.0, "visa": 0.5}

EPOCHS = 800
WARMUP_EPOCHS = 10
COSINE_HORIZON = 1.5  # in units of the epochs: training ends at a quarter of the peak rate, not at zero

# Rows of the category table. A model of one category keeps its category's row in a table of full size.
CATEGORY_ORDER = {
    "mvtec": (
        "capsule",
        "bottle",
        "grid",
        "leather",
        "metal_nut",
        "tile",
        "transistor",
        "zipper",
        "cable",
        "carpet",
        "hazelnut",
        "pill",
        "screw",
        "toothbrush",
        "wood",
    ),
    "visa": (
        "candle",
        "cashew",
        "fryum",
        "macaroni2",
        "pcb2",
        "pcb4",
        "capsules",
        "chewinggum",
        "macaroni1",
        "pcb1",
        "pcb3",
        "pipe_fryum",
    ),
}


def resize_and_crop(picture: Image.Image, resize: Size = RESIZE, crop: Size = CROP, shift: int = 0) -> Image.Image:
    """Resize with Pillow's antialiased bicubic filter, not keeping the aspect, then cut out the centre.

    Args:
        picture: Of any size.
        resize: Size before the cut.
        crop: Size of the cut, not larger than ``resize``.
        shift: Pixels by which the content moves right and down.

    Raises:
        ValueError: If the crop is larger than the picture it is cut from.
    """
    (height, width), (crop_height, crop_width) = resize, crop
    if crop_height > height or crop_width > width:
        msg = f"crop={crop} must not be larger than resize={resize}; crop=resize keeps the whole picture."
        raise ValueError(msg)
    left, top = (width - crop_width) // 2 - shift, (height - crop_height) // 2 - shift
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + crop_width, top + crop_height))


def prepare_image(
    picture: Image.Image, resize: Size = RESIZE, crop: Size = CROP, *, shifted: bool = False, turned: bool = False
) -> torch.Tensor:
    """Make of a picture what the network is trained and tested on.

    The published augmentation is one fixed shift, taken with :data:`SHIFT_PROBABILITY`, and a half turn, taken with
    :data:`HALF_TURN_PROBABILITY`: two variants of a picture of MVTec AD, four of one of VisA.

    Args:
        picture: Of any size and mode.
        resize: As in :func:`resize_and_crop`.
        crop: As in :func:`resize_and_crop`.
        shifted: Whether the content moves right and down, by 4 pixels at the published sizes.
        turned: Whether the result is turned by 180 degrees.

    Returns:
        torch.Tensor: ``(3, *crop)`` in [-1, 1].
    """
    shift = int(resize[0] / 8 - crop[0] / 8) if shifted else 0
    cut = resize_and_crop(picture.convert("RGB"), resize, crop, shift)
    image = (torch.from_numpy(np.array(cut)).movedim(-1, 0) / 255 - 0.5) / 0.5
    return image.flip(-2, -1) if turned else image


def paper_learning_rate_factor(epoch: int, epochs: int = EPOCHS, warmup_epochs: int = WARMUP_EPOCHS) -> float:
    """Learning rate of an epoch, in units of its peak: linear warm-up, then a cosine, both constant within an epoch.

    The first epoch runs at zero, so it moves no weight (only the optimiser's moments).

    Args:
        epoch: Counted from 0, as Lightning and ``LambdaLR`` do.
        epochs: Epochs of the whole run.
        warmup_epochs: Epochs before the peak.

    Returns:
        float: In [0, 1].
    """
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(1, COSINE_HORIZON * epochs - warmup_epochs)
    return max(0.0, (1 + math.cos(math.pi * progress)) / 2)
