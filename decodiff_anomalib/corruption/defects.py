"""Defects drawn on normal images, as training data in image space instead of corrupted latents.

Target and schedule are those of the paper; only the source of the deviation differs. With ``z`` the latents of an image
and ``z'`` those of the same image with a defect, ``eta = z' - z`` and ``z_t = z + s_t eta``. Masks from thresholded
smooth noise with foreign content follow DRAEM (Zavrtanik et al., ICCV 2021, section 3.3), pieces of the same or another
normal image CutPaste (Li et al., CVPR 2021). The unit of length is 1/256 of the image's side, so that
defects scale with the image.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2.functional import gaussian_blur

SIDE = 256


class Draw:
    """Random numbers from one generator, which lives on the CPU so that training repeats on any device."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in ``[low, high)``."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def log_uniform(self, low: float, high: float) -> float:
        """A number in ``[low, high)``, each octave alike."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """An integer in ``[low, high)``."""
        return int(torch.randint(low, high, (), generator=self.generator))

    def pick(self, options: tuple[Callable, ...]) -> Callable:
        """One of ``options``."""
        return options[self.integer(0, len(options))]

    def field(self, image: torch.Tensor, cells: float, channels: int = 1) -> torch.Tensor:
        """Smooth noise ``(channels, H, W)`` of about unit variance with ``cells`` features along the image."""
        height, width = image.shape[-2:]
        grid = max(2, round(cells)) + 3
        noise = torch.randn(1, channels, grid, grid, generator=self.generator).to(image)
        return F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=True)[0] * 1.4


# ---------------------------------------------------------------- shapes: signed distances (1, H, W), positive inside


def _ellipse(draw: Draw, image: torch.Tensor, radius: float, aspect: float) -> torch.Tensor:
    """An ellipse somewhere on the image."""
    height, width = image.shape[-2:]
    rows = torch.arange(height, device=image.device, dtype=image.dtype)[:, None] * (SIDE / height)
    columns = torch.arange(width, device=image.device, dtype=image.dtype)[None, :] * (SIDE / width)
    angle, stretch = draw.uniform(0, math.pi), math.sqrt(draw.log_uniform(1, aspect))
    y, x = rows - draw.uniform(0, SIDE), columns - draw.uniform(0, SIDE)
    u = (y * math.cos(angle) + x * math.sin(angle)) / stretch
    v = (x * math.cos(angle) - y * math.sin(angle)) * stretch
    return radius - (u.square() + v.square()).sqrt()[None]


def _slope(field: torch.Tensor) -> torch.Tensor:
    """How much ``field`` changes over the unit of length."""
    rows, columns = torch.gradient(field, dim=(-2, -1))
    per_row, per_column = (side / SIDE for side in field.shape[-2:])
    return ((rows * per_row).square() + (columns * per_column).square()).sqrt().clamp_min(1e-4)


def _areas(field: torch.Tensor, share: float) -> torch.Tensor:
    """Where ``field`` is largest, a ``share`` of the image."""
    threshold = torch.quantile(field[:, ::4, ::4].flatten(), 1 - share)
    return (field - threshold) / _slope(field).square().mean().sqrt()


def blobs(draw: Draw, image: torch.Tensor) -> torch.Tensor:
    """One to four spots with uneven outlines."""
    spots = []
    for _ in range(draw.integer(1, 5)):
        radius = draw.log_uniform(1.5, 40)
        outline = draw.field(image, draw.log_uniform(5, 25)) * draw.uniform(0, 0.35) * radius
        spots.append(_ellipse(draw, image, radius, aspect=3) + outline)
    return torch.stack(spots).amax(0)


def _line(draw: Draw, window: torch.Tensor, field: torch.Tensor, widths: tuple[float, float]) -> torch.Tensor:
    """The level set of ``field`` through the middle of ``window``, inside it."""
    distance = (field - field.flatten()[window.argmax()]).abs() / _slope(field)
    return torch.minimum(draw.log_uniform(*widths) - distance, window)


def scratch(draw: Draw, image: torch.Tensor) -> torch.Tensor:
    """A thin wandering line: the level set of smooth noise through a point, in a window around it."""
    window = _ellipse(draw, image, draw.log_uniform(15, 110), aspect=4)
    field = draw.field(image, draw.log_uniform(1, 5))
    field = field + 0.05 * draw.uniform() * draw.field(image, draw.log_uniform(8, 30))
    return _line(draw, window, field, (0.7, 4))


def small_scratch(draw: Draw, image: torch.Tensor) -> torch.Tensor:
    """A short thin line."""
    window = _ellipse(draw, image, draw.log_uniform(5, 25), aspect=4)
    return _line(draw, window, draw.field(image, draw.log_uniform(2, 10)), (0.7, 3))


def small_blob(draw: Draw, image: torch.Tensor) -> torch.Tensor:
    """A small spot with an uneven outline."""
    radius = draw.log_uniform(1.5, 7)
    outline = draw.field(image, draw.log_uniform(10, 50)) * draw.uniform(0, 0.3) * radius
    return _ellipse(draw, image, radius, aspect=4) + outline


def areas(draw: Draw, image: torch.Tensor) -> torch.Tensor:
    """Irregular areas covering 1 to 30 % of the image."""
    return _areas(draw.field(image, draw.log_uniform(2, 12)), draw.log_uniform(0.01, 0.3))


def region(draw: Draw, image: torch.Tensor) -> torch.Tensor:
    """A large part of the image."""
    return _areas(draw.field(image, draw.log_uniform(0.7, 1.6)), draw.uniform(0.1, 0.6))


# ---------------------------------------------------------------- contents: images (3, H, W)


def foreign(draw: Draw, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Another normal image, shifted and rotated."""
    other = other.roll((draw.integer(0, image.shape[1]), draw.integer(0, image.shape[2])), (1, 2))
    turns = draw.integer(0, 4) if image.shape[1] == image.shape[2] else 2 * draw.integer(0, 2)
    return other.rot90(turns, (1, 2))


def displaced(draw: Draw, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """The image itself, shifted."""
    reach = (6, image.shape[1] // 4)
    shifts = [draw.integer(*reach) * (1 if draw.uniform() < 0.5 else -1) for _ in range(2)]
    return image.roll(shifts, (1, 2))


def stain(draw: Draw, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A flat tone, the normal images' or any."""
    if draw.uniform() < 0.6:
        tone = other[:, draw.integer(0, image.shape[1]), draw.integer(0, image.shape[2])]
    else:
        tone = torch.rand(3, generator=draw.generator).to(image) * 0.6 - 0.3 + draw.uniform(-0.9, 0.9)
    return tone[:, None, None] + draw.uniform(0, 0.12) * draw.field(image, draw.log_uniform(8, 128))


def own_tone(draw: Draw, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """The tone of one of the image's own pixels, flat: material added or missing."""
    return image[:, draw.integer(0, image.shape[1]), draw.integer(0, image.shape[2]), None, None]


def texture(draw: Draw, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """Noise on two scales, about as bright and as rough as the image."""
    spread = image.std()
    rough = draw.field(image, draw.log_uniform(3, 24)) + draw.uniform() * draw.field(image, draw.log_uniform(24, 128))
    return image.mean((1, 2), keepdim=True) + spread * (draw.uniform(-2, 2) + draw.log_uniform(0.3, 1.5) * rough)


def illumination(draw: Draw, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """The image brighter or darker, with more or less contrast."""
    mean = F.interpolate(F.avg_pool2d(image[None], 16), size=image.shape[-2:], mode="bilinear")[0]
    return (image - mean) * draw.log_uniform(0.5, 1.8) + mean + draw.uniform(-0.6, 0.6)


def smear(draw: Draw, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """The image blurred, often in one direction."""
    sigma = draw.log_uniform(1, 6) * image.shape[1] / 256
    sigmas = [sigma, sigma] if draw.uniform() < 0.5 else ([sigma, 0.1] if draw.uniform() < 0.5 else [0.1, sigma])
    return gaussian_blur(image, [2 * math.ceil(3 * s) + 1 for s in sigmas], sigmas)


def warp(draw: Draw, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """The image warped by a smooth displacement field."""
    height, width = image.shape[-2:]
    rows = torch.linspace(-1, 1, height, device=image.device, dtype=image.dtype)
    columns = torch.linspace(-1, 1, width, device=image.device, dtype=image.dtype)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)
    bend = draw.field(image, draw.log_uniform(2, 10), channels=2) * draw.log_uniform(3, 12) * 2 / 256
    return F.grid_sample(
        image[None], (grid + bend.movedim(0, -1))[None], padding_mode="reflection", align_corners=True
    )[0]


class DefectKind(NamedTuple):
    """A kind of defect and its share.

    Attributes:
        share: Of all drawn defects, in [0, 1].
        shapes: Of which one is drawn at random.
        contents: Of which one is drawn at random.
        softness: Range of the width of the edge, in units of length.
        opacity: Smallest opacity; the largest is 1.
        number: Range of how many are drawn on the image, both included.
    """

    share: float
    shapes: tuple[Callable, ...]
    contents: tuple[Callable, ...]
    softness: tuple[float, float]
    opacity: float
    number: tuple[int, int] = (1, 1)


KINDS = (
    # Made of the product's own tones, such as a closed gap or a missing piece: the hardest to tell from it.
    DefectKind(
        0.5,
        (small_blob, small_blob, small_scratch),
        (own_tone, own_tone, own_tone, displaced),
        (0.3, 0.8),
        0.7,
        number=(2, 6),
    ),
    DefectKind(
        0.22, (blobs, blobs, blobs, scratch, areas), (own_tone, own_tone, own_tone, displaced, warp), (0.3, 0.8), 1.0
    ),
    DefectKind(
        0.25,
        (areas, areas, areas, blobs, blobs, blobs, blobs, scratch, scratch),
        (foreign, displaced, stain, texture, illumination, smear, warp),
        (0.4, 3.0),
        0.2,
    ),
    DefectKind(0.03, (region,), (illumination, illumination, smear, texture), (3.0, 30.0), 1.0),
)


def draw_defects(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw defects of one kind on each image.

    Args:
        images: Normal images ``(B, 3, H, W)`` in [-1, 1].
        generator: Source of all randomness, on the CPU.

    Returns:
        torch.Tensor: The images with defects, ``(B, 3, H, W)`` in [-1, 1].
    """
    draw = Draw(generator)
    shares = torch.tensor([kind.share for kind in KINDS])
    defective = []
    for image in images:
        kind = KINDS[int(torch.multinomial(shares, 1, generator=generator))]
        for _ in range(draw.integer(kind.number[0], kind.number[1] + 1)):
            other = images[draw.integer(0, len(images))]
            distance = draw.pick(kind.shapes)(draw, image)
            content = draw.pick(kind.contents)(draw, image, other).clamp(-1, 1)
            mask = torch.sigmoid(2 * distance / draw.log_uniform(*kind.softness))
            image = image + draw.uniform(kind.opacity, 1) * mask * (content - image)  # noqa: PLW2901
        defective.append(image)
    return torch.stack(defective)
