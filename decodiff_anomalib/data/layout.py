"""MVTec AD's folder layout: finding the categories below a root and tabulating the images of each.

- ``<root>/<category>/train/good``: normal training images.
- ``<root>/<category>/validation/good``: normal validation images, optional.
- ``<root>/<category>/test/<good or defect>``: test images.
- ``<root>/<category>/ground_truth/<defect>``: masks, named like their image or with ``_mask`` added, optional.

Images anywhere else, and other files among them, are not used; a warning counts them.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import pandas as pd
from anomalib.data.datamodules.image.tabular import Tabular
from anomalib.data.datasets.image.tabular import TabularDataset
from anomalib.data.utils import LabelName, Split, ValSplitMode
from lightning.pytorch.utilities import rank_zero_warn

from decodiff_anomalib.image_io import is_image_file

VALIDATION = "validation"  # name of the folder, as in MVTec LOCO
PLACES = {
    "train": "train/good",
    VALIDATION: f"{VALIDATION}/good",
    "test": "test/<good or defect>",
    "ground_truth": "ground_truth/<defect>",
}
"""Folder of a category to where images in it are read."""

SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


class CategoryFolder(Tabular):
    """Datamodule of one category, which validates on the category's own validation images if there are any.

    Args:
        name: Name of the category.
        samples: Its images, as returned by :func:`read_layout`.
    """

    def __init__(self, name: str, samples: pd.DataFrame) -> None:
        has_validation = (samples.split == VALIDATION).any()
        super().__init__(name, samples, val_split_mode=ValSplitMode.FROM_DIR if has_validation else ValSplitMode.NONE)

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        if self.val_split_mode == ValSplitMode.FROM_DIR:
            self.val_data = TabularDataset(self.name, samples=self._unprocessed_samples, split=VALIDATION)


def find_categories(root: Path) -> dict[str, Path]:
    """Folder of each category below ``root``, sorted by name.

    A category is a folder with a ``train`` or ``test`` folder in it; hidden folders are ignored.

    Raises:
        FileNotFoundError: If ``root`` does not exist or contains no category.
    """
    layout = "MultiCategory looks for <root>/<category>/train/good and <root>/<category>/test/<good or defect>"
    if not root.is_dir():
        msg = f"root='{root}' is not a folder. {layout}, and downloads nothing."
        raise FileNotFoundError(msg)
    folders = {
        folder.name: folder
        for folder in sorted(root.iterdir())
        if not folder.name.startswith(".")
        and any((folder / split.value).is_dir() for split in (Split.TRAIN, Split.TEST))
    }
    if not folders:
        msg = f"root='{root}' holds no category. {layout}; root is the folder above the categories."
        raise FileNotFoundError(msg)
    return folders


def read_layout(folder: Path) -> pd.DataFrame:
    """Tabulate the images of one category; :func:`~decodiff_anomalib.image_io.is_image_file` tells what is one.

    Returns:
        pd.DataFrame: A row for each image, with ``image_path``, ``split`` (name of the folder), ``label`` (``good`` or
        the defect), ``label_index`` and ``mask_path`` (empty if there is none).

    Raises:
        ValueError: If there are no training images, links that lead to no file, or masks for only some of the defective
            images.
    """
    paths = [path for path in sorted(folder.glob("*/*/*")) if _is_place(*path.parts[-3:-1]) and is_image_file(path)]
    if broken := [path for path in paths if not path.exists()]:
        msg = (
            f"Category {folder.name!r} has {len(broken)} links that lead to no file, such as '{broken[0]}'. Repair or "
            "remove them."
        )
        raise ValueError(msg)
    masks = {
        (path.parent.name, path.stem.removesuffix("_mask")): str(path)
        for path in paths
        if path.parts[-3] == "ground_truth"
    }
    rows = [
        {
            "image_path": str(path),
            "split": path.parts[-3],
            "label": path.parent.name,
            "label_index": LabelName.NORMAL if path.parent.name == "good" else LabelName.ABNORMAL,
            "mask_path": masks.get((path.parent.name, path.stem), ""),
        }
        for path in paths
        if path.parts[-3] != "ground_truth"
    ]
    _warn_of_unused(folder, {Path(row[name]) for row in rows for name in ("image_path", "mask_path") if row[name]})
    samples = pd.DataFrame(rows)
    if samples.empty or not (samples.split == Split.TRAIN.value).any():
        msg = (
            f"Category {folder.name!r} has no training images in '{folder}/train/good'. Add some, or leave it out. "
            "Normal images are those in folders named 'good'."
        )
        raise ValueError(msg)
    unmasked = samples[(samples.label_index == LabelName.ABNORMAL) & (samples.mask_path == "")]
    if masks and len(unmasked):
        msg = (
            f"Category {folder.name!r} has masks, but none for {len(unmasked)} defective images such as "
            f"'{unmasked.image_path.iloc[0]}'. Add ground_truth/<defect>/<image>_mask.png for each, or remove "
            "ground_truth to use the category without masks."
        )
        raise ValueError(msg)
    return samples


def _is_place(split: str, label: str) -> bool:
    """Whether the images in ``<category>/<split>/<label>`` are read."""
    return split in {"test", "ground_truth"} or (split in {"train", VALIDATION} and label == "good")


def _warn_of_unused(folder: Path, used: Collection[Path]) -> None:
    """Warn of images in other places, and of other files among the images, with their number and the reason."""
    reasons = Counter(_reasons(folder, used))
    if reasons:
        listed = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
        count = reasons.total()
        files, are = ("file", "is") if count == 1 else ("files", "are")
        rank_zero_warn(f"{count} {files} of category {folder.name!r} {are} not used: {listed}.")


def _reasons(folder: Path, used: Collection[Path]) -> Iterator[str]:
    """Why each file is not used; nothing of hidden files, nor of documents beside the folders of images."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path in used or path.is_dir() or any(part.startswith(".") for part in parts):
            continue
        in_place = len(parts) == 3 and _is_place(*parts[:2])
        place = "/".join((*parts[:-1], ""))
        if in_place and is_image_file(path):
            yield f"in {place} (masks of no image)"
        elif in_place and path.name.lower() not in SYSTEM_FILES:
            yield f"{path.suffix or 'without suffix'} (no image format that is read)"
        elif is_image_file(path):
            rule = PLACES.get(parts[0], "train/good or test/<good or defect>")
            itself = " itself" if len(parts) < 3 else ""
            yield f"in {place or 'the folder'}{itself} (images belong into {rule})"
