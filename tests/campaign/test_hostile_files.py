"""Image files that are odd, damaged or made to do harm: each is scored or refused by name, in bounded memory."""

import csv
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tifffile
import torch
from anomalib.data.utils.image import IMG_EXTENSIONS
from anomalib.engine import Engine
from PIL import Image, PngImagePlugin

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.data import MultiCategory, read_image
from decodiff_anomalib.image_io import SUFFIXES, is_image_file

SEED = 20_261
FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "jfif": "JPEG",
    "bmp": "BMP",
    "tif": "TIFF",
    "tiff": "TIFF",
    "webp": "WEBP",
    "ppm": "PPM",
    "pgm": "PPM",
    "avif": "AVIF",
}
"""Suffix to Pillow's name of the format."""
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16")
DEEP_MODES = {"I", "F", "I;16"}
SIZES = {"1x1": (1, 1), "1x500": (1, 500), "500x1": (500, 1), "3000x2": (3000, 2)}
DAMAGED = ("png", "jpg", "bmp", "tif", "webp", "jfif", "ppm", "avif")
CUTS, FLIPS = 8, 6
PIXELS = 64

MEMORY_GB = 2.5
"""Of which two thirds are the libraries and the model."""
SECONDS = 400

PREDICTION = """
import json, sys
from pathlib import Path
from anomalib.engine import Engine
from decodiff_anomalib import DeCoDiff

folder, checkpoint, run = sys.argv[1:]
model = DeCoDiff(preset="fast", image_size=64, denoiser="nano")
engine = Engine(default_root_dir=run, accelerator="cpu", logger=False, enable_progress_bar=False)
engine.predict(model, data_path=folder, ckpt_path=checkpoint, return_predictions=False)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"white_level": model.white_level, "gigabytes": int(status["VmHWM"].split()[0]) / 1e6}))
"""


@dataclass
class Hostile:
    """A folder of hostile files.

    Attributes:
        folder: Which they are in.
        good: Must be scored.
        bad: Must have a reason.
    """

    folder: Path
    good: set[Path] = field(default_factory=set)
    bad: set[Path] = field(default_factory=set)

    def write(self, name: str | bytes, content: bytes, *, good: bool | None = None) -> Path:
        """Write a file, which must be served, must be refused, or may be either."""
        path = self.folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists(), path
        path.write_bytes(content)
        if good is not None:
            (self.good if good else self.bad).add(path)
        return path


def encoded(image: Image.Image, suffix: str, **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, FORMATS[suffix], **options)
    return file.getvalue()


def is_read_by_pillow(content: bytes) -> bool:
    """Whether Pillow reads what it wrote: not every TIFF."""
    try:
        Image.open(io.BytesIO(content)).load()
    except OSError:
        return False
    return True


def noise(generator: np.random.Generator, mode: str = "RGB", size: tuple[int, int] = (PIXELS, PIXELS)) -> Image.Image:
    """Random pixels."""
    width, height = size
    if mode in DEEP_MODES:
        values = generator.integers(0, 4096, (height, width))
        return Image.fromarray(values.astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]))
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = generator.integers(0, 256, (height, width, bands), dtype=np.uint8)
    if mode == "1":
        return Image.fromarray(pixels[..., 0]).convert("1")
    if mode == "P":
        image = Image.fromarray(pixels[..., 0], mode="L").convert("P")
        image.putpalette(generator.integers(0, 256, 768).tolist())
        return image
    return Image.frombytes(mode, size, pixels.tobytes())


# ---------------------------------------------------------------- the files


def write_valid(hostile: Hostile, generator: np.random.Generator) -> None:
    """Every mode of every format, and sizes with a side of almost nothing."""
    for suffix in FORMATS:
        for mode in MODES:
            try:
                content = encoded(noise(generator, mode), suffix)
            except (OSError, ValueError, KeyError):
                continue  # which the format does not hold
            hostile.write(f"valid-{mode.replace(';', '-')}.{suffix}", content, good=is_read_by_pillow(content) or None)
        for name, size in SIZES.items():
            hostile.write(f"size-{name}.{suffix}", encoded(noise(generator, size=size), suffix), good=True)


def write_damaged(hostile: Hostile, generator: np.random.Generator) -> None:
    """Cut off, changed, empty, and of another format than the suffix says."""
    for suffix in DAMAGED:
        content = encoded(noise(generator), suffix)
        for number in range(CUTS):
            end = int(generator.integers(1, len(content) - 12)) if number else 4
            hostile.write(f"cut-{number}.{suffix}", content[:end], good=None if number else False)
        for number in range(FLIPS):
            changed = bytearray(content)
            for place in generator.integers(0, len(changed), 1 + 4 * number):
                changed[place] ^= int(generator.integers(1, 256))
            hostile.write(f"flipped-{number}.{suffix}", bytes(changed))
        for other in generator.choice([name for name in DAMAGED if FORMATS[name] != FORMATS[suffix]], 3, replace=False):
            hostile.write(f"is-{other}.{suffix}", encoded(noise(generator), str(other)), good=True)
        hostile.write(f"text.{suffix}", b"<html>404 not found</html>", good=False)
        hostile.write(f"random.{suffix}", generator.bytes(3000), good=False)
    for suffix in FORMATS:
        hostile.write(f"empty.{suffix}", b"", good=False)


def write_deep(hostile: Hostile, generator: np.random.Generator) -> None:
    """Floats and integers of 32 bits, some of which are no brightness."""
    ramp = generator.random((PIXELS, PIXELS), dtype=np.float32)
    values = {"unit": ramp, "sixteen": ramp * 65535, "nan": ramp.copy(), "inf": ramp.copy(), "negative": ramp - 0.5}
    values |= {"nothing": ramp * 0, "white": ramp * 0 + 65535, "above": ramp + 1e30, "integers": ramp * 4095}
    values["nan"][3, 5], values["inf"][60, 1] = math.nan, math.inf
    for name, array in values.items():
        file = io.BytesIO()
        tifffile.imwrite(file, array.astype(np.int32) if name == "integers" else array)
        is_good = name not in {"nan", "inf", "negative", "above"}
        hostile.write(f"float-{name}.tif", file.getvalue(), good=is_good)
    for name, dtype in {"int8": np.int8, "uint32": np.uint32, "double": np.float64, "half": np.float16}.items():
        file = io.BytesIO()
        tifffile.imwrite(file, (ramp * 100).astype(dtype))
        hostile.write(f"type-{name}.tiff", file.getvalue())
    for name, shape in {"planes": (5, PIXELS, PIXELS), "deep-rgb": (PIXELS, PIXELS, 3)}.items():
        file = io.BytesIO()
        deep = generator.integers(0, 60_000, shape, dtype=np.uint16)
        tifffile.imwrite(file, deep, photometric="rgb" if shape[-1] == 3 else "minisblack")
        hostile.write(f"sixteen-{name}.tif", file.getvalue(), good=True)


def png_part(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes, *, before: bytes = b"", interlaced: int = 0) -> bytes:
    """A PNG in grey of 8 bits."""
    header = png_part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + before + png_part(b"IDAT", zlib.compress(rows)) + png_part(b"IEND", b"")


def resized_header(content: bytes, width: int, height: int) -> bytes:
    """A JPEG that claims to be of another size."""
    start = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    return content[: start + 5] + struct.pack(">HH", height, width) + content[start + 9 :]


def write_bombs(hostile: Hostile, generator: np.random.Generator) -> None:
    """Small files that would be large in memory."""
    row = b"\0" * 64
    for width, height in ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (13_000, 13_000), (2**31 - 1, 1)):
        hostile.write(f"bomb-{width}x{height}.png", png(width, height, row), good=False)
    hostile.write("bomb-inflates.png", png(8, 8, b"\0" * 300_000_000))  # more rows than the header says
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        packed = zlib.compress(b"a" * 200_000_000)
        keyword = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"iCCP": b"profile\0\0"}[kind]
        name = f"bomb-{kind.decode()}.png"
        hostile.write(name, png(8, 8, b"\0" * 72, before=png_part(kind, keyword + packed)))
    hostile.write("long-part.png", png(8, 8, b"\0" * 72).replace(b"\0\0\0\rIHDR", b"\xff\xff\xff\xf0IHDR"), good=False)
    plain, progressive = (encoded(noise(generator), "jpg", progressive=mode) for mode in (False, True))
    for width, height in ((65_500, 65_500), (13_000, 13_000), (4000, 4000)):
        for name, content in {"plain": plain, "progressive": progressive}.items():
            hostile.write(f"bomb-{name}-{width}x{height}.jpg", resized_header(content, width, height), good=False)
    hostile.write("cropped.jpg", resized_header(plain, PIXELS // 2, PIXELS // 2))
    bitmap = encoded(noise(generator), "bmp")
    for width, height in ((60_000, 60_000), (12_000, 12_000), (-64, 64), (64, -(2**31)), (0, 0)):
        claimed = bitmap[:18] + struct.pack("<ii", width, height) + bitmap[26:]
        hostile.write(f"bomb-{width}x{height}.bmp", claimed, good=False)
    hostile.write("bomb.ppm", b"P6 60000 60000 255\n" + row, good=False)
    hostile.write("bomb.pgm", b"P5 12000 12000 65535\n" + row, good=False)
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((16, 16), np.uint8))
    claimed = file.getvalue().replace(struct.pack("<HHI", 256, 4, 1), struct.pack("<HHI", 256, 4, 2**31))
    hostile.write("bomb.tif", claimed)


def write_metadata(hostile: Hostile, generator: np.random.Generator) -> None:
    """Broken EXIF, profiles and comments around whole pixels, and files of several pictures."""
    exif = Image.Exif()
    exif[274], exif[0x010E] = 6, "x" * 1000
    whole = exif.tobytes()
    broken = {
        "cut": whole[:20],
        "flipped": bytes(byte ^ 0x55 if index % 7 == 3 else byte for index, byte in enumerate(whole)),
        "empty": b"Exif\0\0",
        "huge-count": whole.replace(struct.pack(">HHI", 274, 3, 1), struct.pack(">HHI", 274, 3, 2**31)),
        "random": b"Exif\0\0" + generator.bytes(200),
    }
    for suffix in ("jpg", "png", "webp"):
        for name, content in broken.items():
            hostile.write(f"exif-{name}.{suffix}", encoded(noise(generator), suffix, exif=content))
        for orientation in (0, 3, 6, 8, 9, 65535):
            turned = Image.Exif()
            turned[274] = orientation
            picture = noise(generator, size=(40, 30))
            hostile.write(f"turned-{orientation}.{suffix}", encoded(picture, suffix, exif=turned.tobytes()), good=True)
    for suffix in ("jpg", "png", "tif", "webp"):
        for name, profile in {"random": generator.bytes(500), "short": b"\0"}.items():
            hostile.write(f"profile-{name}.{suffix}", encoded(noise(generator), suffix, icc_profile=profile), good=True)
    comment = PngImagePlugin.PngInfo()
    comment.add_text("XML:com.adobe.xmp", "<x:xmpmeta>" * 50)
    hostile.write("xmp.png", encoded(noise(generator), "png", pnginfo=comment), good=True)

    pictures = [noise(generator) for _ in range(40)]
    for suffix in ("tif", "webp", "png", "avif"):
        content = encoded(pictures[0], suffix, save_all=True, append_images=pictures[1:])
        hostile.write(f"pages.{suffix}", content, good=True)
    rows = b"".join(b"\0" + generator.bytes(columns) for columns, count in _adam7(16) for _ in range(count))
    hostile.write("interlaced.png", png(16, 16, rows, interlaced=1), good=True)
    hostile.write("interlaced-short.png", png(16, 16, rows[:-40], interlaced=1), good=False)
    hostile.write("progressive.jpg", encoded(noise(generator), "jpg", progressive=True), good=True)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        hostile.write(f"{compression}.tif", encoded(noise(generator), "tif", compression=compression), good=True)
    hostile.write("drawing.png", b"GIF89a" + encoded(noise(generator), "png"), good=False)


def _adam7(side: int) -> list[tuple[int, int]]:
    """Columns and rows of each pass of an interlaced PNG."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    return [(len(range(left, side, across)), len(range(top, side, down))) for left, top, across, down in passes]


NAMES = [
    *("new\nline.png", "carriage\rreturn.png", "tab\t.png", "'single'.png", '"double".png', "a,b;c.png", "100%.png"),
    *("%s%d{0}.png", "-rf.png", "--help.png", "$(touch made).png", "`touch made`.png", "back\\slash.png", "two  .png"),
    *("ümläut.png", "u\u0308mlaut.png", "画像.png", "🔥.png", "\u202efdp.png", "UPPER.PNG", "a.jpg.png", "a.png.png"),
    *("a.b.c.png", "#.png", "?.png", "*.png", "[a].png", "~.png", "=1+1.png", "@SUM(1).png", "x" * 246 + ".png"),
    *("ü" * 120 + "ab" + ".png", "y" * 251 + ".png", "x" * 245 + "z.png", "CON.png", "a .png", " a.png"),
]
BYTE_NAMES = [b"latin-\xe9.png", b"\xff\xfe.png", b"sub \xe4/\xf6.png"]


def write_names(hostile: Hostile, generator: np.random.Generator) -> None:
    """Files whose names are hard to write down, hidden ones, and what is no file."""
    for name in [*NAMES, *BYTE_NAMES, "deep/er/and/deeper/a.png", "b.png/inside.png"]:
        hostile.write(name, encoded(noise(generator), "png"), good=True)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "a.gif", "a.svg", "picture", "list.csv"):
        hostile.write(name, generator.bytes(100))
    os.mkfifo(hostile.folder / "a.png")
    hostile.bad |= {hostile.folder / "a.png", hostile.folder / "b.png"}
    for link, target in (("link.png", "UPPER.PNG"), ("link.jpg", "valid-RGB.bmp")):
        (hostile.folder / link).symlink_to(target)
        hostile.good.add(hostile.folder / link)
    (hostile.folder / "loop").symlink_to(hostile.folder)


def write_hostile(folder: Path) -> Hostile:
    """All hostile files."""
    hostile, generator = Hostile(folder), np.random.default_rng(SEED)
    write_valid(hostile, generator)
    write_damaged(hostile, generator)
    write_deep(hostile, generator)
    write_bombs(hostile, generator)
    write_metadata(hostile, generator)
    write_names(hostile, generator)
    return hostile


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    made = write_hostile(tmp_path_factory.mktemp("hostile") / "files")
    assert {path.suffix.lower() for path in made.good} == SUFFIXES
    return made


# ---------------------------------------------------------------- predictions


@dataclass
class Predicted:
    """What a prediction of the folder left behind."""

    rows: list[dict[str, str]]
    pictures: list[Path]
    white_level: float
    gigabytes: float
    log: str

    @property
    def reasons(self) -> dict[str, str]:
        return {row["path"]: row["reason"] for row in self.rows if row["reason"]}


def cell(path: Path) -> str:
    """A path in the table, which is UTF-8 whatever the bytes of a name."""
    return str(path).encode("utf-8", "backslashreplace").decode()


@pytest.fixture(scope="module")
def predicted(hostile: Hostile, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Predicted:
    run = tmp_path_factory.mktemp("run")
    child = subprocess.run(
        [sys.executable, "-c", PREDICTION, str(hostile.folder), str(checkpoint), str(run)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-5000:]
    (table,) = run.rglob("predictions.csv")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = json.loads(child.stdout.splitlines()[-1])
    pictures = [path for path in run.rglob("images/**/*") if path.is_file()]
    return Predicted(rows, pictures, found["white_level"], found["gigabytes"], child.stderr)


def test_every_image_file_has_one_row_with_a_score_or_a_reason(hostile: Hostile, predicted: Predicted) -> None:
    """The files are those that Anomalib lists; it knows neither ``.jfif`` nor ``.avif``."""
    listed = [path for path in hostile.folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS]
    assert len(listed) >= 350
    assert sorted(row["path"] for row in predicted.rows) == sorted(map(cell, listed))
    for row in predicted.rows:
        scored = [row[name] for name in ("pred_score", "raw_score", "pred_label", "pred_category", "ood_score")]
        if row["reason"]:
            assert not any(scored), row
        else:
            assert all(scored), row
            assert 0 <= float(row["pred_score"]) <= 1, row
            assert all(math.isfinite(float(row[name])) for name in ("raw_score", "ood_score")), row


def test_whole_images_are_scored_and_others_have_a_reason(hostile: Hostile, predicted: Predicted) -> None:
    reasons = predicted.reasons
    listed = {row["path"] for row in predicted.rows}
    assert not [(path, reasons[cell(path)]) for path in hostile.good if cell(path) in reasons]
    assert not {cell(path) for path in hostile.bad} & listed - reasons.keys()
    assert all(len(reason) < 400 and "\n" not in reason for reason in reasons.values()), reasons


def test_every_scored_image_has_a_picture(predicted: Predicted) -> None:
    scored = [row for row in predicted.rows if not row["reason"]]
    assert len(predicted.pictures) == len(scored)
    assert not [path for path in predicted.pictures if path.stat().st_size < 1000]


def test_the_memory_is_bounded_and_nothing_is_executed(predicted: Predicted) -> None:
    assert predicted.gigabytes < MEMORY_GB
    assert "Traceback" not in predicted.log
    assert not Path("made").exists()


def test_an_exported_model_gives_the_same_scores(
    hostile: Hostile, predicted: Predicted, checkpoint: Path, tmp_path: Path
) -> None:
    """Of what ``read_image`` reads; what it refuses, the prediction refused too."""
    model = DeCoDiff.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False).eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path), options)
    (name,) = (entry.name for entry in session.get_inputs())
    rows = {row["path"]: row for row in predicted.rows}
    compared = 0
    for path in sorted(filter(is_image_file, hostile.folder.rglob("*"))):
        row = rows.get(cell(path))
        if path in hostile.good and row is None:  # of a suffix that Anomalib does not list
            assert read_image(path, predicted.white_level).isfinite().all()
        if row is None or row["reason"]:
            continue
        image = read_image(path, predicted.white_level)
        (score,) = session.run(["pred_score"], {name: image[None].numpy()})[0].flatten().tolist()
        assert score == pytest.approx(float(row["pred_score"]), abs=1e-3), path
        compared += 1
    assert compared > 200


# ---------------------------------------------------------------- training


def write_category(root: Path, images: list[Path], noise_root: Path) -> Path:
    """A category that trains on these images, beside the test images of another one."""
    folder = root / "hostile"
    shutil.copytree(noise_root / "bolt" / "test", folder / "test")
    (folder / "train" / "good").mkdir(parents=True)
    for index, path in enumerate(images):
        target = folder / "train" / "good" / f"{index:03}-{os.fsencode(path.name)[-40:].hex()}{path.suffix}"
        target.symlink_to(path)
    return folder / "train" / "good"


def test_a_training_names_every_unreadable_file_before_it_starts(
    hostile: Hostile, predicted: Predicted, noise_root: Path, new_model: Callable[..., DeCoDiff], tmp_path: Path
) -> None:
    """Also what is only called an image: folders and pipes."""
    refused = [path for path in hostile.folder.rglob("*") if cell(path) in predicted.reasons and path.name != "loop"]
    refused = sorted(path for path in refused if "white level" not in predicted.reasons[cell(path)])
    training = write_category(tmp_path, refused, noise_root)
    total = len(refused)
    assert total > 100
    engine = Engine(default_root_dir=tmp_path / "run", accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"image files cannot be read") as raised:
        engine.fit(new_model(), datamodule=MultiCategory(tmp_path, num_workers=0))
    message = str(raised.value)
    assert message.startswith(f"{total} of {total} image files cannot be read:"), message
    assert message.count(str(training)) == 10
    assert f"… and {total - 10} more" in message
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_links_to_nothing_are_refused_by_name(
    noise_root: Path, new_model: Callable[..., DeCoDiff], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(noise_root / "bolt", tmp_path / "root" / "bolt")) / "train" / "good"
    for name, target in (("nothing.png", tmp_path / "missing"), ("itself.png", folder / "itself.png")):
        (folder / name).symlink_to(target)
        engine = Engine(default_root_dir=tmp_path / "run", accelerator="cpu", logger=False, enable_progress_bar=False)
        with pytest.raises(ValueError, match=rf"1 links that lead to no file, such as '.*{name}'"):
            engine.fit(new_model(), datamodule=MultiCategory(tmp_path / "root", num_workers=0))
        (folder / name).unlink()


def test_a_training_on_whatever_can_be_read_has_finite_weights(
    hostile: Hostile, predicted: Predicted, noise_root: Path, new_model: Callable[..., DeCoDiff], tmp_path: Path
) -> None:
    readable = list(_readable(hostile, predicted))
    assert len(readable) > 250
    write_category(tmp_path, readable, noise_root)
    engine = Engine(default_root_dir=tmp_path / "run", accelerator="cpu", logger=False, enable_progress_bar=False)
    model = new_model(visualizer=False)
    engine.fit(model, datamodule=MultiCategory(tmp_path, num_workers=0))
    assert model.white_level == 65535
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.post_processor.has_thresholds
    assert model.post_processor.image_thresholds.isfinite().all()


def _readable(hostile: Hostile, predicted: Predicted) -> Iterator[Path]:
    rows = {row["path"]: row for row in predicted.rows}
    for path in sorted(filter(is_image_file, hostile.folder.rglob("*"))):
        row = rows.get(cell(path))
        if path in hostile.good if row is None else not row["reason"]:
            yield path


# ---------------------------------------------------------------- masks


def write_masks(folder: Path) -> None:
    """Masks of the same defects in every way that annotators have."""
    truth = folder / "ground_truth" / "spot"
    truth.mkdir(parents=True)
    mask = np.zeros((PIXELS, PIXELS), np.uint8)
    mask[20:30, 20:30] = 1
    masks = {
        "000_mask.png": Image.fromarray(mask * 255),
        "001.png": Image.fromarray(mask),
        "002_mask.png": Image.fromarray(mask * 255).resize((130, 90)),
        "003_mask.bmp": Image.fromarray(mask * 40 + mask.T * 13),
        "004_mask.png": Image.fromarray((1 - mask) * 255),
        "005_mask.tif": Image.fromarray(np.stack([mask * 255, mask, mask * 0], -1)),
    }
    for name, image in masks.items():
        image.save(truth / name)


@pytest.fixture
def masked(noise_root: Path, tmp_path: Path) -> Path:
    """A category with a mask for each of its six defective images."""
    folder = tmp_path / "root" / "bolt"
    shutil.copytree(noise_root / "bolt", folder)
    write_masks(folder)
    return folder


def run_test(masked: Path, checkpoint: Path) -> dict[str, float]:
    engine = Engine(
        default_root_dir=masked.parents[1] / "run", accelerator="cpu", logger=False, enable_progress_bar=False
    )
    model = DeCoDiff(preset="fast", image_size=PIXELS, denoiser="nano", visualizer=False)
    (results,) = engine.test(model, datamodule=MultiCategory(masked.parent, num_workers=0), ckpt_path=checkpoint)
    return dict(results)


def test_masks_of_any_size_and_values_are_served(masked: Path, checkpoint: Path) -> None:
    results = run_test(masked, checkpoint)
    pixels = {name: value for name, value in results.items() if "pixel" in name}
    assert pixels
    assert all(0 <= value <= 1 for value in pixels.values()), pixels


def test_masks_of_equal_regions_count_equally_whatever_their_values(masked: Path) -> None:
    datamodule = MultiCategory(masked.parent, num_workers=0)
    datamodule.setup()
    masks = {Path(item.image_path).stem: item.gt_mask for item in datamodule.test_data if "spot" in item.image_path}
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert masks["000"].sum() == masks["001"].sum() == masks["005"].sum() == 100
    assert masks["003"].sum() == 100
    assert masks["004"].sum() == PIXELS**2 - 100


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda truth: (truth / "003_mask.bmp").unlink(), "003.png"),
        (lambda truth: (truth / "001.png").rename(truth / "defect-1.png"), "001.png"),
        (lambda truth: (truth / "001.png").rename(truth / "001_MASK.png"), "001.png"),
        (lambda truth: (truth / "002_mask.png").write_bytes(b""), "002_mask.png"),
        (lambda truth: (truth / "002_mask.png").write_text("no mask"), "002_mask.png"),
        (lambda truth: os.truncate(truth / "005_mask.tif", 5000), "005_mask.tif"),
        (lambda truth: os.truncate(truth / "002_mask.png", 90), "002_mask.png"),
    ],
)
def test_masks_that_are_missing_or_unreadable_are_refused_by_name(
    masked: Path, checkpoint: Path, change: Callable[[Path], object], named: str
) -> None:
    change(masked / "ground_truth" / "spot")
    with pytest.raises((ValueError, OSError, RuntimeError)) as raised:
        run_test(masked, checkpoint)
    assert named in str(raised.value), raised.value
