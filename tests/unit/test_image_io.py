"""Which files are images, whether they are whole, and that one rule gives their pixels."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from anomalib.data.utils import read_image as anomalib_read_image
from PIL import Image

from decodiff_anomalib import image_io
from decodiff_anomalib.image_io import Depth, choose_white_level, inspect_image, is_image_file, read_image

RAMP = np.linspace(0, 1, 24 * 40).reshape(24, 40)
NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, **options)
    else:
        Image.fromarray(array).save(path, **options)
    return path


def png(rows: bytes, *, width: int = 40, height: int = 24, depth: int = 8, interlaced: int = 0) -> bytes:
    """A PNG of RGB ``rows``, each with its filter."""

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def rows_of(array: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in array)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "is_image"),
    [
        ("a.png", True),
        ("a.PNG", True),
        ("a.Jpeg", True),
        ("a.jfif", True),
        ("a.webp", True),
        ("._a.png", False),
        (".png", False),
        ("Thumbs.db", False),
        ("a.gif", False),
        ("a.heic", False),
        ("png", False),
    ],
)
def test_images_are_told_by_their_names(name: str, is_image: bool) -> None:
    assert is_image_file(Path("folder.png") / name) is is_image


# ---------------------------------------------------------------- pixels


def test_images_of_8_bits_are_anomalibs(tmp_path: Path) -> None:
    for name, array, options in (
        ("colour.png", NOISE, {}),
        ("grey.png", NOISE[..., 0], {}),
        ("photo.jpg", NOISE, {"quality": 80}),
        ("strips.tif", NOISE, {"photometric": "rgb", "compression": "zlib"}),
    ):
        path = save(tmp_path / name, array, **options)
        assert inspect_image(path) == (False, None)
        for white_level in (None, 4095):
            assert torch.equal(read_image(path, white_level), anomalib_read_image(path, as_tensor=True))


@pytest.mark.parametrize(
    ("name", "dtype", "highest", "white_level"),
    [
        ("a.png", np.uint16, 65535, 65535),
        ("a.png", np.uint16, 4095, 4095),
        ("a.png", np.uint16, 4000, 4095),
        ("a.png", np.uint16, 4096, 16383),
        ("a.png", np.uint16, 200, 255),
        ("a.tif", np.uint16, 1023, 1023),
        ("a.tif", np.int16, 32767, 32767),
        ("a.tif", np.int32, 65535, 65535),
        ("a.tif", np.float32, 1.0, 1),
        ("a.tif", np.float32, 0.3, 1),
        ("a.tif", np.float32, 255.0, 255),
        ("a.tif", np.float32, 65535.0, 65535),
    ],
)
def test_deep_values_are_divided_by_the_white_level(
    tmp_path: Path, name: str, dtype: type, highest: float, white_level: float
) -> None:
    values = (RAMP * highest).astype(dtype)
    path = save(tmp_path / name, values)
    wrong, depth = inspect_image(path)
    assert wrong
    assert depth == Depth(float(np.float32(highest)), np.issubdtype(dtype, np.floating))
    assert choose_white_level([depth]) == white_level
    image = read_image(path, white_level)
    assert image.shape == (3, 24, 40)
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image.numpy(), np.broadcast_to(values / white_level, (3, 24, 40)), atol=1e-6)


@pytest.mark.parametrize("kind", ["png", "little", "big", "deflated", "tiled", "unused fourth channel"])
def test_colours_of_16_bits_keep_both_bytes(tmp_path: Path, kind: str) -> None:
    values = np.stack([RAMP * 4095, RAMP * 2000, RAMP * 77], axis=-1).astype(np.uint16)
    path = tmp_path / f"{kind}.tif"
    if kind == "png":
        path.write_bytes(png(rows_of(values.astype(">u2")), depth=16))
    elif kind == "unused fourth channel":
        save(path, np.dstack([values, values[..., 0]]), photometric="rgb", extrasamples=["unspecified"])
    else:
        options = {
            "little": {"byteorder": "<"},
            "big": {"byteorder": ">"},
            "deflated": {"compression": "zlib", "predictor": True, "rowsperstrip": 7},
            "tiled": {"compression": "zlib", "tile": (16, 16)},
        }[kind]
        save(path, values, photometric="rgb", **options)
    assert inspect_image(path) == (True, Depth(4095.0, is_float=False))
    np.testing.assert_allclose(read_image(path, 4095).numpy(), np.moveaxis(values / 4095, -1, 0), atol=1e-6)


def test_a_surface_about_4095_counts_keeps_its_brightness(tmp_path: Path) -> None:
    """The white level is one for all: an image that stays below a power of two is no brighter than its neighbour."""
    darker, brighter = (save(tmp_path / f"{top}.png", (RAMP * top).astype(np.uint16)) for top in (4090, 4100))
    level = choose_white_level([inspect_image(path)[1] for path in (darker, brighter)])
    assert level == 16383
    assert read_image(darker, level).max() == pytest.approx(4090 / 16383)
    assert read_image(brighter, level).max() == pytest.approx(4100 / 16383)


def test_one_is_white_of_floats_only() -> None:
    floats, integers = Depth(1.0, is_float=True), Depth(1.0, is_float=False)
    assert choose_white_level([floats, floats]) == 1
    assert choose_white_level([floats, integers]) == 255
    with pytest.raises(ValueError, match=r"values up to 70000, which is above 65535\. State the value of white"):
        choose_white_level([floats, Depth(70000.0, is_float=False)])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["photo.jpg", "colour.png", "deep.png", "colour.tif"])
def test_images_are_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    stored = {"deep.png": (RAMP * 65535).astype(np.uint16)}.get(kind, NOISE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "photo.jpg" else {}
    Image.fromarray(stored).save(path := tmp_path / kind, exif=exif, **options)
    wrong, depth = inspect_image(path)
    assert wrong is (orientation > 1 or depth is not None)
    plain = tmp_path / f"plain{path.suffix}"
    Image.fromarray(stored).save(plain, **options)
    image = read_image(plain, 65535)
    # EXIF 2.32, 4.6.4 A: what the first row and the first column show
    upright = {
        1: image,
        2: image.flip(2),
        3: image.flip(1, 2),
        4: image.flip(1),
        5: image.mT,
        6: image.rot90(-1, (1, 2)),
        7: image.rot90(2, (1, 2)).mT,
        8: image.rot90(1, (1, 2)),
    }[orientation]
    assert torch.equal(read_image(path, 65535), upright)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "white_level", "message"),
    [
        ([[0, 5000]], 4095, r"highest value 5000 is above the white level 4095, .* State --model\.white_level"),
        ([[0, 1.5]], 1, "highest value 1.5 is above the white level 1"),
        ([[0, 5000]], None, "has more than 8 bits: its brightness depends on white_level"),
        ([[-1, 5]], 255, "has values from -1 to 5; they must be finite and not negative"),
        ([[0, np.nan]], 1, "has values from nan to nan"),
        ([[0, np.inf]], 1, "has values from 0 to inf"),
    ],
)
def test_values_that_the_rule_does_not_cover_are_refused(
    tmp_path: Path, values: list, white_level: float | None, message: str
) -> None:
    path = save(tmp_path / "a.tif", np.array(values, np.float32))
    with pytest.raises(ValueError, match=message) as caught:
        read_image(path, white_level)
    assert str(path) in str(caught.value)


def test_layouts_that_are_not_read_are_refused(tmp_path: Path) -> None:
    colour = np.stack([(RAMP * 65535).astype(np.uint16)] * 3)
    separate = save(tmp_path / "a.tif", colour, photometric="rgb", planarconfig="separate")
    packed = save(tmp_path / "b.tif", colour, photometric="rgb", planarconfig="separate", compression="zlib")
    inverted = save(tmp_path / "c.tif", colour[0], photometric="miniswhite")
    for path, message in (
        (separate, "16-bit channels in a layout that is not read"),
        (packed, "16-bit channels in a layout that is not read"),
        (inverted, "stores white as 0"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_image(path)


def test_pngs_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    whole = png(rows_of(NOISE))
    path.write_bytes(whole)
    assert inspect_image(path) == (False, None)
    half, wrong = png(rows_of(NOISE[:12])), bytearray(whole)
    wrong[whole.index(b"IEND") - 5] ^= 1  # the last byte before the next part is one of the checksum
    for content, message in (
        (half, r"lacks rows: 1452 bytes of pixels are missing"),
        (wrong, "is damaged: wrong checksum of IDAT"),
        (whole[: len(whole) // 2], "ends early"),
        (whole[:-12], "ends early"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            inspect_image(path)


def test_interlaced_pngs_are_whole(tmp_path: Path) -> None:
    """Their size follows the seven passes of Adam7, PNG 1.2, section 2.6."""
    passes = [NOISE[0::8, 0::8], NOISE[0::8, 4::8], NOISE[4::8, 0::4], NOISE[0::4, 2::4], NOISE[2::4, 0::2]]
    passes += [NOISE[0::2, 1::2], NOISE[1::2]]
    rows = b"".join(map(rows_of, passes))
    path = tmp_path / "a.png"
    path.write_bytes(png(rows, interlaced=1))
    assert inspect_image(path) == (False, None)
    torch.testing.assert_close(read_image(path), torch.from_numpy(NOISE).movedim(-1, 0) / 255)
    path.write_bytes(png(rows[:-1], interlaced=1))
    with pytest.raises(ValueError, match="lacks rows: 1 bytes"):
        inspect_image(path)


def test_other_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(save(tmp_path / "whole.jpg", noise).read_bytes()[:1500])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    make_pipe = getattr(os, "mkfifo", Path.mkdir)  # Windows has none
    make_pipe(tmp_path / "pipe.png")
    for name, message in (
        ("cut.jpg", "truncated"),
        ("text.png", "is in no format that Pillow reads"),
        ("empty.png", "is empty"),
        ("folder.png", "is not a regular file"),
        ("pipe.png", "is not a regular file"),
        ("absent.png", "does not exist"),
    ):
        for read in (inspect_image, read_image):
            with pytest.raises(ValueError, match=message) as caught:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value)


def test_images_above_pillows_limit_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", NOISE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 40 // 2 - 1)
    with pytest.raises(ValueError, match=r"a\.png: Image size \(960 pixels\) exceeds limit .* Reduce the image"):
        inspect_image(path)


def test_large_images_are_decoded_one_at_a_time_and_a_jpeg_never_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, sizes = [], []
    load = image_io.Image.Image.load
    for name in ("a.bmp", "a.jpg", "a.png"):
        save(tmp_path / name, NOISE)

    class Lock:
        def __enter__(self) -> None:
            held.append(1)

        def __exit__(self, *_: object) -> None:
            held.append(-1)

    def record(image: Image.Image) -> object:
        sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(image_io, "_LARGE_IMAGE", Lock())
    monkeypatch.setattr(image_io, "LARGE", 100)
    monkeypatch.setattr(image_io.Image.Image, "load", record)
    for name, locked in (("a.bmp", [1, -1]), ("a.jpg", []), ("a.png", [1, -1])):
        inspect_image(tmp_path / name)
        assert held == locked
        held.clear()
    assert set(sizes) == {(40, 24), (5, 3)}


def refusal(read: Callable[[Path], object], path: Path) -> str | None:
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return None


def test_damaged_files_raise_nothing_but_what_names_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, kind in (("a.png", "png"), ("a.jpg", "jpeg"), ("a.webp", "webp"), ("a.bmp", "bmp"), ("a.ppm", "ppm")):
        Image.fromarray(NOISE).save(path := tmp_path / name, format=kind)
        content = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(content[: rng.integers(1, len(content))] if rng.random() < 0.5 else content)
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            for read in (inspect_image, read_image):
                reason = refusal(read, path)
                assert reason is None or str(path) in reason  # some damage is harmless
