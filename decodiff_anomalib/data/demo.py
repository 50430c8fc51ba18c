"""A first data set without a download: photographs bundled with scikit-image, cut up and damaged on purpose.

Three photographed surfaces become three categories in MVTec AD's folder layout. Crops for training, validation and test
come from three parts of each photograph: no pixel of one is ever in another, and thresholds rest on images as new as
those of the test. The defects are painted with light, shadow and soft edges: plain to a person, but not separable by
brightness alone.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import numpy as np
from anomalib.data.datamodules.image.mvtecad import MVTecAD
from anomalib.data.datasets.image.mvtecad import MVTecADDataset
from anomalib.data.utils import ValSplitMode
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image as PILImage
from platformdirs import user_cache_path
from scipy.ndimage import gaussian_filter, gaussian_filter1d, shift
from scipy.spatial import cKDTree

from decodiff_anomalib.data.multi_category import VALIDATION

logger = logging.getLogger(__name__)

Image: TypeAlias = NDArray[np.float64]  # (H, W), grey, in [0, 1]
Coverage: TypeAlias = NDArray[np.float64]  # (H, W), how much a pixel is covered, in [0, 1]

VERSION = "v2"  # part of the cache's path and of nothing else: raise it with every change to the images
MANIFEST = "manifest.json"

# Each category with the material that its "foreign" defect brings in.
FOREIGN_MATERIAL = {"brick": "grass", "grass": "gravel", "gravel": "grass"}

# Rows and columns of the photographs (512 x 512). Gaps are a stone or a blade wide, so that none is seen on both sides.
TRAIN_PART = slice(0, 512), slice(0, 304)
VALIDATION_PART = slice(0, 176), slice(320, 512)
TEST_PART = slice(192, 512), slice(320, 512)
CROP_SIZE = 160
IMAGE_SIZE = 256

NUM_TRAIN = 80
NUM_VALIDATION = 24
NUM_TEST_GOOD = 24
NUM_TEST_PER_DEFECT = 8


class DemoTextures(MVTecAD):
    """Anomalib datamodule of photographed textures with painted defects; needs no network.

    The images are made on first use (a few seconds, 17 MB), kept, and identical however often they are made. Unlike
    its parent, it never validates on the test set but on normal images of their own.

    Args:
        root: Folder below which the images are kept. Defaults to the user's cache folder.
        category: ``"brick"``, ``"grass"`` or ``"gravel"``.
        train_batch_size: Batch size for training.
        eval_batch_size: Batch size for validation and test.
        num_workers: Loader processes. None by default: starting them takes longer than reading so few small images.

    Raises:
        ValueError: If ``category`` is unknown.

    Example:
        >>> datamodule = DemoTextures(category="gravel")
        >>> datamodule.prepare_data()
        >>> datamodule.setup()
        >>> len(datamodule.train_data), len(datamodule.val_data), len(datamodule.test_data)
        (80, 24, 64)
    """

    def __init__(
        self,
        root: Path | str | None = None,
        category: str = "gravel",
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        if category not in FOREIGN_MATERIAL:
            msg = f"Unknown category {category!r}; DemoTextures has {', '.join(FOREIGN_MATERIAL)}."
            raise ValueError(msg)
        cache = user_cache_path("decodiff_anomalib", appauthor=False) if root is None else Path(root)
        super().__init__(
            # Anomalib files result pictures under the part of the path that follows a folder named like the class.
            root=cache / VERSION / "DemoTextures",
            category=category,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            val_split_mode=ValSplitMode.FROM_DIR,
        )

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        self.val_data = MVTecADDataset(root=self.root, category=self.category, split=VALIDATION)

    def prepare_data(self) -> None:
        """Make the images of all categories unless they are there, complete and unaltered.

        Raises:
            ImportError: If scikit-image, whose photographs are used, is missing.
            OSError: If the folder cannot be written.
        """
        if is_intact(self.root):
            logger.info("Found the demo textures in %s.", self.root)
        else:
            logger.info("Making the demo textures in %s.", self.root)
            build_textures(self.root)


# --- The folder ---


def build_textures(folder: Path) -> None:
    """Write all categories to ``folder``, all at once or not at all; what was there before is replaced.

    Args:
        folder: ``<category>/train/good``, ``validation/good``, ``test/good``, ``test/<defect>`` and
            ``ground_truth/<defect>`` go below it.

    Raises:
        ImportError: If scikit-image or its photographs are missing.
        OSError: If ``folder`` cannot be written.
    """
    photographs = {category: _load_photograph(category) for category in FOREIGN_MATERIAL}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Built beside its destination: a rename within one file system is atomic, whenever we are interrupted.
        with TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
            fresh = Path(scratch, "fresh")
            for seed, category in enumerate(photographs):
                foreign = photographs[FOREIGN_MATERIAL[category]]
                _write_category(fresh / category, photographs[category], foreign, np.random.default_rng(seed))
            (fresh / MANIFEST).write_text(json.dumps(_digests(fresh), indent=0))
            if is_intact(folder):  # another process was quicker and may be reading already
                return
            if folder.exists():
                folder.rename(Path(scratch, "damaged"))
            fresh.rename(folder)
    except OSError as error:
        msg = f"Cannot write the demo textures to '{folder}' ({error}). Name a writable folder: DemoTextures(root=...)."
        raise OSError(msg) from error


def is_intact(folder: Path) -> bool:
    """Whether ``folder`` holds exactly the files, byte for byte, that ``build_textures`` wrote."""
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
    # skimage.data.<category>() may fall back to a download; the file in the package cannot.
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
    """Cut a random square out of a part, enlarge it, and vary exposure and orientation as a camera would."""
    region = photograph[part]
    top, left = (rng.integers(side - CROP_SIZE + 1) for side in region.shape)
    square = region[top : top + CROP_SIZE, left : left + CROP_SIZE]
    square = square[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    enlarged = PILImage.fromarray(square.astype(np.float32)).resize(
        (IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.LANCZOS
    )
    return np.clip(np.asarray(enlarged, dtype=np.float64) * rng.uniform(0.9, 1.1), 0, 1)


# Paints on a clean image, given also a crop of the foreign material; returns the result and where it was touched.
Painter: TypeAlias = Callable[[Image, Image, Generator], tuple[Image, Coverage]]


def _damage(clean: Image, foreign: Image, paint: Painter, rng: Generator) -> tuple[Image, NDArray[np.bool_]]:
    """Paint a defect; the mask ``(H, W)`` marks it, and outside the mask every pixel stays what it was."""
    painted, coverage = paint(clean, foreign, rng)
    mask = coverage > 0.1  # below, nobody sees the difference: a ground truth has no business there
    return np.where(mask, np.clip(painted, 0, 1), clean), mask


def _paint_crack(image: Image, _foreign: Image, rng: Generator) -> tuple[Image, Coverage]:
    """A dark, branching fissure whose lower lip catches the light."""
    trunk = _random_path(rng, length=rng.integers(110, 190), bend=0.7, stiffness=3)
    crack = _stroke(trunk, width=rng.uniform(4.0, 5.5))
    for start in rng.choice(trunk[20:-20], size=2):
        branch = _random_path(rng, length=rng.integers(25, 60), bend=0.7, stiffness=3, start=start)
        crack = np.maximum(crack, _stroke(branch, width=2.5))
    lip = np.clip(-_relief(crack), 0, 1) * (1 - crack)
    painted = image * (1 - 0.75 * crack) + 0.35 * lip
    return painted, np.maximum(crack, lip)


def _paint_foreign(image: Image, foreign: Image, rng: Generator) -> tuple[Image, Coverage]:
    """A clump of another material, as bright as its surroundings, that casts a shadow."""
    clump = _blob(rng, radii=rng.uniform(18, 32, size=2), softness=4)
    material = foreign * (image.mean() / foreign.mean())
    return _lay_on(image, clump, material)


def _paint_smear(image: Image, _foreign: Image, rng: Generator) -> tuple[Image, Coverage]:
    """Something dragged across the surface: the texture runs along one direction and loses its contrast."""
    along = rng.permutation([1.0, 9.0])
    smear = 0.9 * _blob(rng, radii=(16, 16) + 2.5 * along, softness=12)
    streaks = gaussian_filter(image, along) + 0.04 * _smooth_noise(rng, along)
    return image + smear * (streaks - image), smear


def _paint_stain(image: Image, _foreign: Image, rng: Generator) -> tuple[Image, Coverage]:
    """A liquid that soaked in: the texture shows through, darker, and darkest along the rim where it dried."""
    stain = _blob(rng, radii=rng.uniform(22, 42, size=2), softness=14)
    rim = 4 * stain * (1 - stain)
    absorbed = rng.uniform(0.3, 0.45) * stain + 0.2 * rim
    return image * (1 - absorbed), np.maximum(stain, rim)


def _paint_wire(image: Image, _foreign: Image, rng: Generator) -> tuple[Image, Coverage]:
    """A bent wire that lies on the surface, lit along one side and casting a shadow on the other."""
    path = _random_path(rng, length=rng.integers(90, 200), bend=0.5, stiffness=15)
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


# --- The brushes. Light comes from the upper left. ---


def _lay_on(image: Image, thing: Coverage, surface: Image) -> tuple[Image, Coverage]:
    """Put a thing with the given ``surface`` on the image; its shadow falls to the lower right."""
    shadow = np.clip(gaussian_filter(shift(thing, (4, 4), order=1), 1.5), 0, 1)
    painted = image * (1 - 0.5 * shadow)
    return painted + thing * (surface - painted), np.maximum(thing, shadow)


def _relief(height: Coverage) -> Image:
    """Shade a raised surface, about [-1, 1]: positive where it faces the light, negative where it turns away."""
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
        rng: Source of randomness.
        length: Number of steps.
        bend: Standard deviation of the heading in radians; it has no drift, so the path does not curl up.
        stiffness: Number of steps over which the heading turns.
        start: Where it begins, ``(2,)``. Random by default.
    """
    start = rng.uniform(48, IMAGE_SIZE - 48, size=2) if start is None else start
    turns = gaussian_filter1d(rng.standard_normal(length), stiffness)
    to_row, to_column = IMAGE_SIZE / 2 - start  # head inwards, roughly: most of the path should be in the picture
    heading = np.arctan2(to_column, to_row) + rng.uniform(-0.9, 0.9) + bend * turns / turns.std()
    return start + np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)


def _stroke(path: NDArray[np.float64], width: float, taper: float = 0.7) -> Coverage:
    """Draw along ``path`` ``(N, 2)`` with a pen that loses the share ``taper`` of its width on the way."""
    pixels = np.indices((IMAGE_SIZE, IMAGE_SIZE)).reshape(2, -1).T
    # Beyond the bound the distance is infinite and the nearest step len(path): nothing is drawn, and fast.
    distance, nearest = cKDTree(path).query(pixels, distance_upper_bound=width)
    half_width = width / 2 * (1 - taper * nearest / len(path))
    return np.clip(half_width + 0.5 - distance, 0, 1).reshape(IMAGE_SIZE, IMAGE_SIZE)


def _smooth_noise(rng: Generator, sigma: float | NDArray[np.float64]) -> Image:
    """Noise of zero mean and unit variance with lumps of about ``sigma`` pixels."""
    noise = gaussian_filter(rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE)), sigma, mode="wrap")
    return noise / noise.std()
