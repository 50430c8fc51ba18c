"""The demo textures: crops of photographs bundled with scikit-image, with painted defects.

Three photographed surfaces become three categories in MVTec AD's folder layout. Crops for training, validation and test
come from three disjoint parts of each photograph, so that the validation images, which set the thresholds, are as
different from the training images as the test images are. The defects have light, shadow and soft edges: they are
obvious to a person, but cannot be separated by brightness alone.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image as PILImage
from scipy.ndimage import gaussian_filter, gaussian_filter1d, shift
from scipy.spatial import cKDTree

from decodiff_anomalib.data.layout import VALIDATION

Image: TypeAlias = NDArray[np.float64]  # (H, W), grey values in [0, 1]
Coverage: TypeAlias = NDArray[np.float64]  # (H, W), share of each pixel that is covered, in [0, 1]

MANIFEST = "manifest.json"

# Category to the material of its "foreign" defect.
FOREIGN_MATERIAL = {"brick": "grass", "grass": "gravel", "gravel": "grass"}

# Rows and columns of the photographs (512 x 512). The gaps between the parts are as wide as a stone or a blade, so that
# no object is in two parts.
TRAIN_PART = slice(0, 512), slice(0, 304)
VALIDATION_PART = slice(0, 176), slice(320, 512)
TEST_PART = slice(192, 512), slice(320, 512)
CROP_SIZE = 160
IMAGE_SIZE = 256

NUM_TRAIN = 80
NUM_VALIDATION = 24
NUM_TEST_GOOD = 24
NUM_TEST_PER_DEFECT = 8


# --- The folder ---


def build_textures(folder: Path) -> None:
    """Write all categories to ``folder`` atomically; an existing folder is replaced.

    Args:
        folder: Parent folder of ``<category>/train/good``, ``validation/good``, ``test/good``, ``test/<defect>`` and
            ``ground_truth/<defect>``.

    Raises:
        ImportError: If scikit-image or its photographs are missing.
        OSError: If ``folder`` cannot be written.
    """
    photographs = {category: _load_photograph(category) for category in FOREIGN_MATERIAL}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside ``folder``, hence on the same file system, where a rename is atomic.
        with TemporaryDirectory(prefix=".staging-", dir=folder.parent) as staging_directory:
            staged = Path(staging_directory, "staged")
            for seed, category in enumerate(photographs):
                foreign = photographs[FOREIGN_MATERIAL[category]]
                _write_category(staged / category, photographs[category], foreign, np.random.default_rng(seed))
            (staged / MANIFEST).write_text(json.dumps(_digests(staged), indent=0))
            if is_intact(folder):  # another process has finished first and may already be reading
                return
            if folder.exists():
                folder.rename(Path(staging_directory, "replaced"))
            staged.rename(folder)
    except OSError as error:
        msg = f"Cannot write the demo textures to '{folder}' ({error}). Name a writable folder: DemoTextures(root=...)."
        raise OSError(msg) from error


def is_intact(folder: Path) -> bool:
    """Whether ``folder`` contains exactly the images that ``build_textures`` wrote, byte for byte."""
    try:
        return json.loads((folder / MANIFEST).read_text()) == _digests(folder)
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


def _load_photograph(category: str) -> Image:
    # Not skimage.data.<category>(), which may download the file.
    try:
        with as_file(files("skimage") / "data" / f"{category}.png") as path, PILImage.open(path) as photograph:
            return np.asarray(photograph.convert("L")) / 255
    except (ModuleNotFoundError, FileNotFoundError) as error:
        msg = f'DemoTextures cuts up photographs of scikit-image: pip install "decodiff_anomalib[demo]" ({error}).'
        raise ImportError(msg) from error


def _write_category(folder: Path, photograph: Image, foreign: Image, rng: Generator) -> None:
    parts = {
        "train": (TRAIN_PART, NUM_TRAIN),
        VALIDATION: (VALIDATION_PART, NUM_VALIDATION),
        "test": (TEST_PART, NUM_TEST_GOOD),
    }
    for name, (part, number) in parts.items():
        _write_images(folder / name / "good", (_crop(photograph, part, rng) for _ in range(number)))
    for name, paint in DEFECTS.items():
        images, masks = [], []
        for _ in range(NUM_TEST_PER_DEFECT):
            clean, other = _crop(photograph, TEST_PART, rng), _crop(foreign, TEST_PART, rng)
            image, mask = _damage(clean, other, paint, rng)
            images.append(image)
            masks.append(mask)
        _write_images(folder / "test" / name, images)
        _write_images(folder / "ground_truth" / name, masks, suffix="_mask")


def _write_images(folder: Path, images: Iterable[Image | NDArray[np.bool_]], suffix: str = "") -> None:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        pixels = np.rint(image * 255.0).astype(np.uint8)
        PILImage.fromarray(pixels).save(folder / f"{index:03d}{suffix}.png")


# --- The images ---


def _crop(photograph: Image, part: tuple[slice, slice], rng: Generator) -> Image:
    """Crop a random square of a part, enlarge it, and vary exposure and orientation as a camera would."""
    region = photograph[part]
    top, left = (rng.integers(side - CROP_SIZE + 1) for side in region.shape)
    square = region[top : top + CROP_SIZE, left : left + CROP_SIZE]
    square = square[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    enlarged = PILImage.fromarray(square.astype(np.float32)).resize(
        (IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.LANCZOS
    )
    return np.clip(np.asarray(enlarged, dtype=np.float64) * rng.uniform(0.9, 1.1), 0, 1)


# Takes a clean image, a crop of the foreign material and a generator; returns the painted image and its coverage.
Painter: TypeAlias = Callable[[Image, Image, Generator], tuple[Image, Coverage]]


def _damage(clean: Image, foreign: Image, paint: Painter, rng: Generator) -> tuple[Image, NDArray[np.bool_]]:
    """Paint a defect; return the image and the defect's mask ``(H, W)``, outside which no pixel changes."""
    painted, coverage = paint(clean, foreign, rng)
    mask = coverage > 0.1  # a smaller change is invisible and does not belong in the ground truth
    return np.where(mask, np.clip(painted, 0, 1), clean), mask


def _paint_crack(image: Image, _foreign: Image, rng: Generator) -> tuple[Image, Coverage]:
    """A dark, branching crack whose lower edge is lit."""
    trunk = _random_path(rng, length=int(rng.integers(110, 190)), bend=0.7, stiffness=3)
    crack = _stroke(trunk, width=rng.uniform(4.0, 5.5))
    for start in rng.choice(trunk[20:-20], size=2):
        branch = _random_path(rng, length=int(rng.integers(25, 60)), bend=0.7, stiffness=3, start=start)
        crack = np.maximum(crack, _stroke(branch, width=2.5))
    edge = np.clip(-_relief(crack), 0, 1) * (1 - crack)
    painted = image * (1 - 0.75 * crack) + 0.35 * edge
    return painted, np.maximum(crack, edge)


def _paint_foreign(image: Image, foreign: Image, rng: Generator) -> tuple[Image, Coverage]:
    """A clump of another material with the mean brightness of the image; it casts a shadow."""
    clump = _blob(rng, radii=rng.uniform(18, 32, size=2), softness=4)
    material = foreign * (image.mean() / foreign.mean())
    return _lay_on(image, clump, material)


def _paint_smear(image: Image, _foreign: Image, rng: Generator) -> tuple[Image, Coverage]:
    """A smear along one axis: the texture is blurred in that direction and loses its contrast."""
    along = rng.permutation([1.0, 9.0])
    smear = 0.9 * _blob(rng, radii=(16, 16) + 2.5 * along, softness=12)
    streaks = gaussian_filter(image, along) + 0.04 * _smooth_noise(rng, along)
    return image + smear * (streaks - image), smear


def _paint_stain(image: Image, _foreign: Image, rng: Generator) -> tuple[Image, Coverage]:
    """A stain of dried liquid: the texture is darker, most of all along the rim."""
    stain = _blob(rng, radii=rng.uniform(22, 42, size=2), softness=14)
    rim = 4 * stain * (1 - stain)
    absorbed = rng.uniform(0.3, 0.45) * stain + 0.2 * rim
    return image * (1 - absorbed), np.maximum(stain, rim)


def _paint_wire(image: Image, _foreign: Image, rng: Generator) -> tuple[Image, Coverage]:
    """A bent wire on the surface, lit on one side, with a shadow on the other."""
    path = _random_path(rng, length=int(rng.integers(90, 200)), bend=0.5, stiffness=15)
    wire = _stroke(path, width=rng.uniform(3.5, 5.5), taper=0)
    metal = rng.uniform(0.35, 0.65) + 0.5 * _relief(wire)
    return _lay_on(image, wire, metal)


DEFECTS: dict[str, Painter] = {
    "crack": _paint_crack,
    "foreign": _paint_foreign,
    "smear": _paint_smear,
    "stain": _paint_stain,
    "wire": _paint_wire,
}


# --- Drawing functions; light comes from the upper left. ---


def _lay_on(image: Image, cover: Coverage, surface: Image) -> tuple[Image, Coverage]:
    """Draw an object with the given ``surface`` on the image; its shadow falls to the lower right."""
    shadow = np.clip(gaussian_filter(shift(cover, (4, 4), order=1), 1.5), 0, 1)
    painted = image * (1 - 0.5 * shadow)
    return painted + cover * (surface - painted), np.maximum(cover, shadow)


def _relief(height: Coverage) -> Image:
    """Shading of a raised surface, about [-1, 1]: positive where it faces the light, negative where it faces away."""
    down, right = np.gradient(gaussian_filter(height, 1.0))
    return 2 * (down + right)


def _blob(rng: Generator, radii: NDArray[np.float64], softness: float) -> Coverage:
    """An ellipse with an uneven outline that fades out over ``softness`` pixels."""
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    row, column = rng.uniform(24, IMAGE_SIZE - 24, size=2)
    distance = np.hypot((rows - row) / radii[0], (columns - column) / radii[1])
    depth = (1 + 0.25 * _smooth_noise(rng, 12) - distance) * np.mean(radii)  # pixels from the outline, inwards
    fade = np.clip(depth / softness + 0.5, 0, 1)
    return fade**2 * (3 - 2 * fade)


def _random_path(
    rng: Generator, length: int, bend: float, stiffness: float, start: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """A path of unit steps ``(length, 2)``, row and column, across the image.

    Args:
        rng: Random number generator.
        length: Number of steps.
        bend: Standard deviation of the heading in radians; without drift, so that the path does not curl up.
        stiffness: Number of steps over which the heading changes.
        start: First point ``(2,)``, row and column. Random by default.
    """
    start = rng.uniform(48, IMAGE_SIZE - 48, size=2) if start is None else start
    turns = gaussian_filter1d(rng.standard_normal(length), stiffness)
    to_row, to_column = (
        IMAGE_SIZE / 2 - start
    )  # roughly towards the centre, so that most of the path is inside the image
    heading = np.arctan2(to_column, to_row) + rng.uniform(-0.9, 0.9) + bend * turns / turns.std()
    return start + np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)


def _stroke(path: NDArray[np.float64], width: float, taper: float = 0.7) -> Coverage:
    """Draw a line along ``path`` ``(N, 2)`` whose width decreases by the share ``taper`` from start to end."""
    pixels = np.indices((IMAGE_SIZE, IMAGE_SIZE)).reshape(2, -1).T
    # Beyond the bound, which makes the query fast, the distance is infinite and the index len(path): nothing is drawn.
    distance, nearest = cKDTree(path).query(pixels, distance_upper_bound=width)
    half_width = width / 2 * (1 - taper * nearest / len(path))
    return np.clip(half_width + 0.5 - distance, 0, 1).reshape(IMAGE_SIZE, IMAGE_SIZE)


def _smooth_noise(rng: Generator, sigma: float | NDArray[np.float64]) -> Image:
    """Gaussian noise, smoothed with standard deviation ``sigma`` in pixels and scaled to unit variance."""
    noise = gaussian_filter(rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE)), sigma, mode="wrap")
    return noise / noise.std()
