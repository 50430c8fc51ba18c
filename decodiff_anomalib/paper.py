"""The published protocol: preprocessing, augmentation, categories and learning rate.

Defaults of the model are in :mod:`decodiff_anomalib.settings`, the published metrics in
:mod:`decodiff_anomalib.evaluation`. Unusual points of the authors' program are kept and stated beside the code.
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize, Transform
from torchvision.transforms.v2.functional import resize as resize_nearest

Size = tuple[int, int]
"""Height and width in pixels."""

RESIZE: Size = (288, 288)
CROP: Size = (256, 256)

SHIFT_PROBABILITY = 0.5
HALF_TURN_PROBABILITY = {"mvtec": 0.0, "visa": 0.5}

PUBLISHED_MEANS = {
    "mvtec": {"image_auroc": 0.992, "pixel_ap": 0.768, "pixel_aupro": 0.951},
    "visa": {"image_auroc": 0.962, "pixel_ap": 0.575, "pixel_aupro": 0.915},
}
"""Means over all categories of a data set, one model for all of them."""

PIXEL_CLIP, PIXEL_SIGMA = 0.4, 3.0
LATENT_CLIP, LATENT_SIGMA = 0.2, 1.0
"""Constants of the anomaly maps, see :mod:`decodiff_anomalib.discrepancy`."""

NUM_TRAIN_TIMESTEPS = 10

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


def published_shift(resize: Size = RESIZE, crop: Size = CROP) -> int:
    """Pixels by which the augmentation moves the content right and down: 4 at the published sizes."""
    return int(resize[0] / 8 - crop[0] / 8)


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
        shifted: Whether the content moves by :func:`published_shift`.
        turned: Whether the result is turned by 180 degrees.

    Returns:
        torch.Tensor: ``(3, *crop)`` in [-1, 1].
    """
    shift = published_shift(resize, crop) if shifted else 0
    cut = resize_and_crop(picture.convert("RGB"), resize, crop, shift)
    image = (torch.from_numpy(np.array(cut)).movedim(-1, 0) / 255 - 0.5) / 0.5
    return image.flip(-2, -1) if turned else image


def paper_transform(resize: Size = RESIZE, crop: Size = CROP) -> Compose:
    """The published images as a transform of the model's pre-processor, from images ``(3, H, W)`` in [0, 1].

    Bit-equal to :func:`prepare_image` after :class:`PaperAugmentation`, which resizes as Pillow does. By itself it
    neither rounds nor clips what the filter overshoots: 0.3 grey values from it on average, up to 15 at sharp edges.
    """
    return Compose(
        [
            Resize(resize, interpolation=InterpolationMode.BICUBIC, antialias=True),
            CenterCrop(crop),
            Normalize(mean=[0.5] * 3, std=[0.5] * 3),
        ]
    )


class PaperAugmentation(Transform):
    """The published images as an augmentation of Anomalib's datasets: :func:`prepare_image` but for crop and scale.

    Those are left to :func:`paper_transform`, whose ``Resize`` to the same size then changes nothing. Both
    probabilities at zero give the images of the published evaluation. Masks follow, at the nearest pixel, as Anomalib
    resizes them.

    Random choices come from torch's generator, which Lightning seeds in each process of the loader.

    Args:
        shift_probability: Of moving right and down by :func:`published_shift`.
        half_turn_probability: Of turning by 180 degrees; see :data:`HALF_TURN_PROBABILITY`.
        resize: As in :func:`resize_and_crop`.
        crop: As in :func:`paper_transform`.

    Raises:
        ValueError: If a probability is not in [0, 1].
    """

    def __init__(
        self,
        shift_probability: float = SHIFT_PROBABILITY,
        half_turn_probability: float = 0.0,
        resize: Size = RESIZE,
        crop: Size = CROP,
    ) -> None:
        super().__init__()
        for name, probability in (
            ("shift_probability", shift_probability),
            ("half_turn_probability", half_turn_probability),
        ):
            if not 0 <= probability <= 1:
                msg = f"{name}={probability} must be between 0 and 1; 0 leaves it out."
                raise ValueError(msg)
        self.shift_probability = shift_probability
        self.half_turn_probability = half_turn_probability
        self.resize: Size = (resize[0], resize[1])
        self.shift = published_shift(resize, crop)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, bool]:
        """Decide for an image and its mask together."""
        del flat_inputs
        shift, turn = torch.rand(2).tolist()
        return {"shifted": shift < self.shift_probability, "turned": turn < self.half_turn_probability}

    def transform(self, inpt: torch.Tensor, params: dict[str, bool]) -> torch.Tensor:
        """Prepare an image ``(3, H, W)`` in [0, 1], as read from 8 bits, or a mask ``(H, W)``."""
        if isinstance(inpt, tv_tensors.Mask):
            result = resize_nearest(inpt, list(self.resize)).as_subclass(torch.Tensor)
        else:
            pixels = inpt.mul(255).round().to(torch.uint8).movedim(0, -1).numpy()
            resized = resize_and_crop(Image.fromarray(pixels), self.resize, self.resize)
            result = torch.from_numpy(np.array(resized)).movedim(-1, 0) / 255
        if params["shifted"]:  # what comes in again at the other side lies outside the crop
            result = result.roll((self.shift, self.shift), (-2, -1))
        if params["turned"]:
            result = result.flip(-2, -1)
        return tv_tensors.wrap(result, like=inpt)


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
