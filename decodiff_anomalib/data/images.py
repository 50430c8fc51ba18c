"""Images of datasets: checks of files and folders before work starts, and reading what Anomalib would read wrong.

How a file is read is stated in :mod:`decodiff_anomalib.image_io`.
"""

import logging
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from anomalib.data import ImageBatch
from anomalib.data.datamodules.image.mvtecad import MVTecAD
from anomalib.data.datasets.image.mvtecad import CATEGORIES
from anomalib.data.datasets.image.mvtecad import IMG_EXTENSIONS as MVTECAD_SUFFIXES
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import resize

from decodiff_anomalib.image_io import Depth, above_white, choose_white_level, inspect_image, is_image_file, read_image

logger = logging.getLogger(__name__)

MAX_NAMED = 10  # broken files listed in an error


# ---------------------------------------------------------------- files


def inspect_images(paths: Iterable[str | Path]) -> dict[str, Depth | None]:
    """Read every file once, several at a time; :func:`~decodiff_anomalib.image_io.inspect_image` says in what memory.

    Returns:
        dict[str, Depth | None]: Path of each image that Anomalib would read wrong, to its depth if it has more than 8
        bits; others have an EXIF orientation.

    Raises:
        ValueError: If any file cannot be read as an image; names up to ten of them.
    """
    names = [str(path) for path in paths]
    found, reasons = sort_out(names)
    _refuse(list(reasons.values()), len(names), "Replace or remove them.")
    return found


def sort_out(paths: Iterable[str | Path]) -> tuple[dict[str, Depth | None], dict[str, str]]:
    """What :func:`inspect_images` returns of the files that can be read, and path to reason of those that cannot."""
    names = [str(path) for path in paths]
    # Pillow warns of images that it reads all the same; inspection refuses the larger ones that it does not read.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with ThreadPoolExecutor() as pool:
        results = dict(zip(names, pool.map(_inspect, names), strict=True))
    found = {name: result[1] for name, result in results.items() if isinstance(result, tuple) and result[0]}
    return found, {name: result for name, result in results.items() if isinstance(result, str)}


def _inspect(name: str) -> tuple[bool, Depth | None] | str:
    """What :func:`inspect_image` returns, or why it refuses."""
    try:
        return inspect_image(name)
    except ValueError as error:
        return str(error)


def settle_white_level(found: Mapping[str, Depth | None], white_level: float | None) -> float | None:
    """The white level to read images with: the present one, or if there is none yet, one that they need.

    Args:
        found: What :func:`inspect_images` returned.
        white_level: The present one.

    Returns:
        float | None: ``None`` if there is none and no image has more than 8 bits.

    Raises:
        ValueError: If images have values above it, or above all that can be chosen; names up to ten of them.
    """
    depths = {path: depth for path, depth in found.items() if depth is not None}
    if not depths:
        return white_level
    if white_level is None:
        return choose_white_level(depths.values())
    _refuse(list(too_bright(found, white_level).values()), len(depths), "")
    return white_level


def too_bright(found: Mapping[str, Depth | None], white_level: float) -> dict[str, str]:
    """Path to reason of the images that have values above the white level."""
    return {
        path: f"{path}: {above_white(depth.highest, white_level)}"
        for path, depth in found.items()
        if depth is not None and depth.highest > white_level
    }


def _refuse(reasons: list[str], total: int, remedy: str) -> None:
    if reasons:
        shown = "\n  ".join(reasons[:MAX_NAMED])
        more = f"\n  … and {len(reasons) - MAX_NAMED} more" if len(reasons) > MAX_NAMED else ""
        msg = f"{len(reasons)} of {total} image files cannot be read:\n  {shown}{more}\n{remedy}".rstrip()
        raise ValueError(msg)


# ---------------------------------------------------------------- datasets


def image_paths(dataset: Dataset) -> list[str]:
    """Paths of the images of one of Anomalib's datasets, with or without annotations, or of a part or a chain of them.

    Other datasets tell of none.
    """
    if isinstance(dataset, Subset):
        paths = image_paths(dataset.dataset)
        return [paths[index] for index in dataset.indices] if paths else []
    if isinstance(dataset, ConcatDataset):
        return [path for part in dataset.datasets for path in image_paths(part)]
    if hasattr(dataset, "samples"):
        return [str(path) for path in dataset.samples.image_path]
    return [str(path) for path in getattr(dataset, "image_filenames", ())]


def mask_paths(dataset: Dataset) -> list[str]:
    """Paths of the masks of one of Anomalib's datasets, or of that which a part or a chain is of."""
    if isinstance(dataset, Subset):
        return mask_paths(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return [path for part in dataset.datasets for path in mask_paths(part)]
    paths = getattr(getattr(dataset, "samples", None), "mask_path", ())
    return [str(path) for path in paths if path and isinstance(path, str | Path) and Path(path).is_file()]


def image_owners(dataset: Dataset) -> dict[str, Dataset]:
    """Path of each image to the dataset whose transform it goes through: of several categories, the one it is from."""
    paths = image_paths(dataset)
    if isinstance(dataset, Subset):
        owners = image_owners(dataset.dataset)
        return {path: owners[path] for path in paths}
    if isinstance(dataset, ConcatDataset):
        return {path: owner for part in dataset.datasets for path, owner in image_owners(part).items()}
    if hasattr(dataset, "parts") and hasattr(dataset, "samples"):
        return dict(zip(paths, map(dataset.parts.__getitem__, dataset.samples.part), strict=True))
    return dict.fromkeys(paths, dataset)


def reread(batch: ImageBatch, owners: Mapping[str, Dataset], white_level: float | None) -> None:
    """Replace images that Anomalib has read wrong, by :func:`read_image` and the transform of their dataset.

    Random augmentations are drawn anew, and for the image alone: only training has any, which does not look at masks.
    Upright images of several sizes, which no transform has resized, get the size of the batch.

    Args:
        batch: Images ``(B, 3, H, W)`` in [0, 1], changed in place.
        owners: Path of each image that is to be replaced, to its dataset.
        white_level: As in :func:`read_image`.

    Raises:
        ValueError: If an image has become one that :func:`read_image` refuses.
    """
    wrong = {index: str(path) for index, path in enumerate(batch.image_path or ()) if str(path) in owners}
    if not wrong:
        return
    assert batch.image is not None
    images = list(batch.image)
    for index, path in wrong.items():
        owner = owners[path]
        transform = getattr(owner, "augmentations", None) or getattr(owner, "transform", None)
        image = tv_tensors.Image(read_image(path, white_level))
        images[index] = (transform(image) if transform else image).to(batch.image)
    if len({image.shape for image in images}) > 1:
        images = [resize(image, list(batch.image.shape[-2:]), antialias=True) for image in images]
    batch.image = torch.stack(images)


# ---------------------------------------------------------------- folders


def check_folders(datamodule: MVTecAD) -> None:
    """Check that the folders of MVTec AD's layout exist, before the datamodule reads or downloads them.

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
    _check_normal_images(folder / "train")
    defects = _subfolders(folder / "test") - {"good"}
    unmasked = sorted(name for name in defects if not _has_mvtecad_images(folder / "ground_truth" / name))
    if unmasked:
        msg = (
            f"{folder / 'ground_truth'} has no masks for {', '.join(unmasked)}, which MVTecAD needs. "
            "`--data MultiCategory` reads the same folders without masks. In test, only the folder 'good' holds normal "
            "images; every other one is a defect."
        )
        raise FileNotFoundError(msg)


def _check_normal_images(train: Path) -> None:
    good = train / "good"
    if _has_mvtecad_images(good):
        return
    msg = f"There are no .png images in {good}. DeCoDiff learns from normal images there."
    if others := sorted(_subfolders(train) - {"good"}):
        msg += f" Normal images are those in a folder named 'good'; {train} has {', '.join(others)}: rename it."
    if good.is_dir() and any(map(is_image_file, good.iterdir())):
        msg += " `--data MultiCategory` reads the same folders with images of other formats."
    raise FileNotFoundError(msg)


def _has_mvtecad_images(folder: Path) -> bool:
    """Whether ``MVTecAD`` finds images there; it knows two spellings of one suffix."""
    return any(path.suffix in MVTECAD_SUFFIXES for path in folder.glob("*"))


def _subfolders(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*") if path.is_dir()}
