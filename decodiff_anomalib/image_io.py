"""Image files: which files are images, whether they are whole, and their pixels in [0, 1].

Anomalib reads every image with Pillow's ``convert("RGB")``. That clips values of more than 8 bits, ignores the
orientation that a camera notes in EXIF, and takes the missing rows of a PNG for black. Here

- values of more than 8 bits, integer or float, are divided by a white level, one for all images of a model;
- an image is upright, as EXIF says. Masks are read as they are stored: they belong to the upright image;
- a file that is not whole, or whose values the white level does not cover, is refused by name.

Otherwise pixels are Anomalib's: of several pages the first, without transparency.
"""

import math
import re
import struct
import sys
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, features
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

SUFFIXES = frozenset({*IMG_EXTENSIONS, ".jfif", *([".avif"] if features.check("avif") else [])})
"""Of image files, in lower case. Not ``.gif``, which is a drawing or an animation."""

WHITE_LEVELS = (1, 255, 1023, 4095, 16383, 32767, 65535)
"""Values of white to choose from: of floats only, then of 8, 10, 12, 14, 15 (signed) and 16 bits."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what makes an image upright."""

LARGE = 2**24
"""Pixels; of images with more, one is decoded at a time."""

_LARGE_IMAGE = Lock()
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR_CONFIGURATION = 258, 262, 284  # tags of TIFF
_PIECE = 2**20  # bytes of a PNG that are inflated at once


@dataclass(frozen=True)
class Depth:
    """The values of an image of more than 8 bits.

    Attributes:
        highest: The largest of them.
        is_float: Whether they are floats.
    """

    highest: float
    is_float: bool


def is_image_file(path: str | Path) -> bool:
    """Whether a file is an image by its name: the suffix is one of :data:`SUFFIXES`, and it is not hidden."""
    path = Path(path)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")  # macOS adds "._*" to archives


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and all folders below it, sorted; none if there is no such folder."""
    return sorted(filter(is_image_file, folder.rglob("*")))


def read_image(path: str | Path, white_level: float | None = None) -> torch.Tensor:
    """Read an image as DeCoDiff does, upright and at full depth.

    Args:
        path: The file.
        white_level: The value of white in images of more than 8 bits, ``white_level`` of the model. Images of 8 bits
            need none.

    Returns:
        torch.Tensor: Image ``(3, H, W)`` in [0, 1], float32.

    Raises:
        ValueError: If the file cannot be read, has more than 8 bits and no ``white_level`` is given, or has values
            that are negative, not finite, or above it.

    Example:
        >>> image = read_image("part.png", white_level=4095)
        >>> session.run(None, {"input": image[None].numpy()})
    """
    path = Path(path)
    with _opened(path) as image:
        if not _is_deep(image):
            return to_dtype(pil_to_tensor(_upright(image).convert("RGB")), torch.float32, scale=True)
        values = _deep_values(path)
        if white_level is None:
            msg = "has more than 8 bits: its brightness depends on white_level. Give that of the model"
            raise ValueError(msg)
        if values.max() > white_level:
            raise ValueError(above_white(float(values.max()), white_level))
    scaled = torch.from_numpy(values.astype(np.float32)) / white_level
    return scaled.movedim(-1, 0).contiguous() if scaled.ndim == 3 else scaled.repeat(3, 1, 1)


def inspect_image(path: str | Path) -> tuple[bool, Depth | None]:
    """Check that an image is whole, in as little memory as its format allows.

    A PNG of 8 bits is inflated in pieces and a JPEG decoded at an eighth of its size. What has to be decoded at full
    size is so beside others, but of images above :data:`LARGE` only one at a time. Pillow's limit holds: images of more
    than twice ``PIL.Image.MAX_IMAGE_PIXELS`` (179 megapixels) are refused, and those below it served.

    Returns:
        tuple[bool, Depth | None]: Whether Anomalib would read it wrong, and its depth if it has more than 8 bits.

    Raises:
        ValueError: If it cannot be read, or has values that are negative or not finite.
    """
    path = Path(path)
    with _opened(path) as image:
        if image.format == "JPEG":
            _check_jpeg(path, image.width * image.height)
        may_be_turned = _check_png(path) if image.format == "PNG" else True
        is_turned = may_be_turned and _orientation(image) in TURNS
        if image.format == "JPEG" and "progressive" not in image.info:  # which is held in memory whole
            image.draft(image.mode, (1, 1))
        with _LARGE_IMAGE if image.width * image.height > LARGE else nullcontext():
            if _is_deep(image):
                values = _deep_values(path)
                return True, Depth(float(values.max()), values.dtype.kind == "f")
            if image.format != "PNG":
                image.load()
    return is_turned, None


def choose_white_level(depths: Collection[Depth]) -> float:
    """The smallest of :data:`WHITE_LEVELS` that covers all values; 1 only where all are floats.

    Args:
        depths: Of all images of more than 8 bits, at least one.

    Raises:
        ValueError: If values are above all of them.
    """
    highest = max(depth.highest for depth in depths)
    candidates = WHITE_LEVELS if all(depth.is_float for depth in depths) else WHITE_LEVELS[1:]
    for level in candidates:
        if highest <= level:
            return float(level)
    msg = (
        f"Images of more than 8 bits have values up to {highest:g}, which is above {WHITE_LEVELS[-1]}. State the value "
        "of white: --model.white_level."
    )
    raise ValueError(msg)


def above_white(highest: float, white_level: float) -> str:
    """Why an image is refused that has a value above the white level."""
    return (
        f"its highest value {highest:g} is above the white level {white_level:g}, which images of more than 8 bits are "
        "divided by. State --model.white_level, at best from training on"
    )


# ---------------------------------------------------------------- opening


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image; every error in the block becomes one that names the file.

    Raises:
        ValueError: Instead of any other error.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            msg = "is not a regular file" if path.exists() else "does not exist"
            raise ValueError(msg)  # noqa: TRY301 - the handler below adds the path
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError as error:
        reason = "is in no format that Pillow reads" if path.stat().st_size else "is empty"
        msg = f"{path}: {reason}"
        raise ValueError(msg) from error
    except Image.DecompressionBombError as error:
        msg = (
            f"{path}: {str(error).rstrip('.')}. Reduce the image or cut it up; PIL.Image.MAX_IMAGE_PIXELS, which is "
            "half of that limit, can be raised in Python"
        )
        raise ValueError(msg) from error
    except Exception as error:  # decoders raise anything from SyntaxError to RuntimeError
        msg = f"{path}: {error}"
        raise ValueError(msg) from error


def _orientation(image: Image.Image) -> int | None:
    """EXIF orientation, ``None`` if there is none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return None


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # which turns a TIFF already, and deletes its orientation
    turn = TURNS.get(_orientation(image) or 1)
    return image if turn is None else image.transpose(turn)


# ---------------------------------------------------------------- more than 8 bits


def _is_deep(image: Image.Image) -> bool:
    """Whether channels have more than 8 bits, which Pillow keeps in grey images only."""
    bits = max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,)))
    return _is_deep_grey(image) or bits > 8 or re.search(";16[BLN]$", _raw_mode(image)) is not None


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in {"I", "F"} or image.mode.startswith("I;16")


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name of the layout of an image's bytes, before it is decoded."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw_mode if isinstance(raw_mode, str) else ""


def _deep_values(path: Path) -> NDArray[np.number]:
    """Values ``(H, W)`` or ``(H, W, 3)`` of an upright image of more than 8 bits, as they are stored.

    Raises:
        ValueError: If the layout is not known, or values are negative or not finite.
    """
    with Image.open(path) as image:
        raw_mode, tags = _raw_mode(image), getattr(image, "tag_v2", {})
        if tags.get(_PHOTOMETRIC) == 0:
            msg = "stores white as 0 (TIFF's WhiteIsZero). Save it with black as 0"
            raise ValueError(msg)
        if _is_deep_grey(image):
            values = np.asarray(_upright(image))
        elif re.match("RGB[AX]?;16[BLN]$", raw_mode) and tags.get(_PLANAR_CONFIGURATION, 1) == 1:
            # Pillow keeps the higher byte of two. In the other byte order, that is the lower one.
            higher = np.asarray(_upright(image))[..., :3].astype(np.uint16)
            values = 256 * higher + _lower_bytes(path, raw_mode)
        else:
            msg = (
                f"has 16-bit channels in a layout that is not read ({image.mode} from {raw_mode}). Save it as grey or "
                "RGB, without transparency and with interleaved channels"
            )
            raise ValueError(msg)
    lowest, highest = float(values.min()), float(values.max())
    if not 0 <= lowest <= highest < math.inf:  # NaN fails every comparison
        msg = f"has values from {lowest:g} to {highest:g}; they must be finite and not negative. Convert it"
        raise ValueError(msg)
    return values


def _lower_bytes(path: Path, raw_mode: str) -> NDArray[np.uint8]:
    """The lower bytes ``(H, W, 3)`` of an image with channels of 16 bits."""
    swapped = raw_mode[:-1] + {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[raw_mode[-1]]
    with Image.open(path) as image:
        tiles: list[Any] = []
        for tile in image.tile:
            arguments = (swapped, *tile[3][1:]) if isinstance(tile[3], tuple) else swapped
            make = getattr(tile, "_make", tuple)  # Pillow's older tiles are plain tuples
            tiles.append(make((*tile[:3], arguments)))
        image.tile = tiles
        return np.asarray(_upright(image))[..., :3]


# ---------------------------------------------------------------- JPEG


def _check_jpeg(path: Path, pixels: int) -> None:
    """Check that a JPEG is not much too short: libjpeg makes up what is missing, up to gigabytes.

    Raises:
        ValueError: If it has less than a bit for each block of 8 × 8 pixels, which have a code each.
    """
    size = path.stat().st_size
    if 8 * size < pixels // 64:
        msg = f"lacks rows: {size} bytes cannot hold {pixels} pixels"
        raise ValueError(msg)


# ---------------------------------------------------------------- PNG


def _check_png(path: Path) -> bool:
    """Check that a PNG has all its rows and right checksums, which Pillow does not; its pixels are not kept.

    Returns:
        bool: Whether there is a part that may have an orientation. Pillow decodes the image to find one.

    Raises:
        ValueError: If it is damaged or ends early.
    """
    inflater, missing, may_be_turned, kind = zlib.decompressobj(), 0, False, b""
    with path.open("rb") as file:
        file.seek(8)
        while kind != b"IEND":
            head = file.read(8)
            length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"")
            content, checksum = file.read(length), file.read(4)
            if len(checksum) < 4:
                msg = "ends early"
                raise ValueError(msg)
            if zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
                msg = f"is damaged: wrong checksum of {kind.decode('latin-1')}"
                raise ValueError(msg)
            if kind == b"IHDR":
                missing = _inflated_size(content)
            elif kind == b"IDAT":
                while content:
                    missing -= len(inflater.decompress(content, _PIECE))
                    content = inflater.unconsumed_tail
            else:
                may_be_turned |= kind == b"eXIf" or any(word in content[:32] for word in (b"exif", b"xmp"))
    missing -= len(inflater.flush())
    if missing > 0:
        msg = f"lacks rows: {missing} bytes of pixels are missing"
        raise ValueError(msg)
    return may_be_turned


def _inflated_size(header: bytes) -> int:
    """Bytes of the inflated rows of a PNG, each with one more for its filter."""
    width, height, depth, colour, interlaced = struct.unpack(">IIBBxxB", header)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    adam7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    size = 0
    for left, top, step_x, step_y in adam7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = len(range(left, width, step_x)), len(range(top, height, step_y))
        size += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return size
