"""Defects drawn on normal images, for training: where real anomalies live, rather than anywhere in latent space.

The deviation to be learned stays the paper's, only its source differs: with ``z`` the latents of the image and ``z'``
those of the image with a drawn defect, ``eta = z' - z`` and ``z_t = z + s_t eta``. Content comes from the user's own
normal images or from noise; sizes are in 1/256 of the image side, so that they scale with the working size.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2.functional import gaussian_blur


class Draw:
    """Random numbers from one generator, which lives on the CPU so that a run repeats on any device."""

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


# ---------------------------------------------------------------- where: soft masks (1, H, W) in [0, 1]


def _coordinates(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = image.shape[-2:]
    rows = torch.arange(height, device=image.device, dtype=image.dtype) * (256 / height)
    columns = torch.arange(width, device=image.device, dtype=image.dtype) * (256 / width)
    return rows[:, None], columns[None, :]


def _ellipse(draw: Draw, image: torch.Tensor, smallest: float, largest: float, aspect: float) -> torch.Tensor:
    """Signed distance, positive inside, of an ellipse somewhere on the image."""
    rows, columns = _coordinates(image)
    angle, stretch = draw.uniform(0, math.pi), math.sqrt(draw.log_uniform(1, aspect))
    y, x = rows - draw.uniform(0, 256), columns - draw.uniform(0, 256)
    u = (y * math.cos(angle) + x * math.sin(angle)) / stretch
    v = (x * math.cos(angle) - y * math.sin(angle)) * stretch
    return draw.log_uniform(smallest, largest) - (u.square() + v.square()).sqrt()


def _slope(field: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.gradient(field, dim=(-2, -1))
    return (rows.square() + columns.square()).sqrt().clamp_min(1e-4)


def blobs(draw: Draw, image: torch.Tensor) -> torch.Tensor:
    """One to three spots of one size, with uneven outlines."""
    largest = draw.log_uniform(3, 40)
    outline = draw.field(image, draw.log_uniform(5, 25))[0] * draw.uniform(0, 0.3) * largest
    spots = [_ellipse(draw, image, max(1.5, largest / 3), largest, 3) for _ in range(draw.integer(1, 4))]
    distance = torch.stack(spots).amax(0) + outline
    return torch.sigmoid(distance / draw.log_uniform(0.3, 2))[None]


def scratch(draw: Draw, image: torch.Tensor) -> torch.Tensor:
    """A thin wandering line: the level set of smooth noise through a point, in a window around it."""
    window = _ellipse(draw, image, 15, 110, 4)
    field = draw.field(image, draw.log_uniform(1, 5)) + 0.04 * draw.field(image, draw.log_uniform(8, 30))
    level = field.flatten()[window.argmax()]
    distance = torch.minimum(draw.log_uniform(0.7, 4) - (field - level).abs() / _slope(field), window)
    return torch.sigmoid(distance / draw.log_uniform(0.3, 1))


def patches(draw: Draw, image: torch.Tensor) -> torch.Tensor:
    """Irregular areas covering 1 to 30 % of the image: thresholded noise."""
    field = draw.field(image, draw.log_uniform(2, 12))
    threshold = torch.quantile(field[:, ::4, ::4].flatten(), 1 - draw.log_uniform(0.01, 0.3))
    return torch.sigmoid((field - threshold) / _slope(field).mean() / draw.log_uniform(0.3, 2))


def region(draw: Draw, image: torch.Tensor) -> torch.Tensor:
    """A large part of the image with a soft edge."""
    field = draw.field(image, draw.uniform(1, 2))
    threshold = torch.quantile(field[:, ::4, ::4].flatten(), 1 - draw.uniform(0.1, 0.6))
    return torch.sigmoid((field - threshold) / _slope(field).mean() / draw.log_uniform(2, 20))


# ---------------------------------------------------------------- what: content (3, H, W)


def foreign(draw: Draw, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Another normal image, from elsewhere and turned."""
    other = other.roll((draw.integer(0, image.shape[1]), draw.integer(0, image.shape[2])), (1, 2))
    turns = draw.integer(0, 4) if image.shape[1] == image.shape[2] else 2 * draw.integer(0, 2)
    return other.rot90(turns, (1, 2))


def displaced(draw: Draw, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """The image itself, from a little further on."""
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
    """The image bent out of shape."""
    height, width = image.shape[-2:]
    rows = torch.linspace(-1, 1, height, device=image.device, dtype=image.dtype)
    columns = torch.linspace(-1, 1, width, device=image.device, dtype=image.dtype)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)
    bend = draw.field(image, draw.log_uniform(2, 10), channels=2) * draw.log_uniform(3, 12) * 2 / 256
    return F.grid_sample(
        image[None], (grid + bend.movedim(0, -1))[None], padding_mode="reflection", align_corners=True
    )[0]


SHAPES = (blobs, blobs, scratch, patches)
CONTENTS = (foreign, displaced, stain, texture, illumination, smear, warp)
REGION_CONTENTS = (texture, illumination, smear)
REGION_SHARE = 0.1
MIN_OPACITY = 0.25


def draw_defects(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one defect on each image.

    Args:
        images: Normal images ``(B, 3, H, W)`` in [-1, 1].
        generator: Source of all randomness, on the CPU.

    Returns:
        torch.Tensor: The images with defects, ``(B, 3, H, W)`` in [-1, 1].
    """
    draw = Draw(generator)
    defective = []
    for image in images:
        other = images[draw.integer(0, len(images))]
        if draw.uniform() < REGION_SHARE:
            mask, content = region(draw, image), draw.pick(REGION_CONTENTS)(draw, image, other)
        else:
            mask, content = draw.pick(SHAPES)(draw, image), draw.pick(CONTENTS)(draw, image, other)
        opacity = draw.uniform(MIN_OPACITY, 1)
        defective.append(image + opacity * mask * (content.clamp(-1, 1) - image))
    return torch.stack(defective)
