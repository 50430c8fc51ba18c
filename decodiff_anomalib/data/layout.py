"""MVTec AD's folder layout: finding the categories below a root and tabulating the images of each.

- ``<root>/<category>/train/good``: normal training images.
- ``<root>/<category>/validation/good``: normal validation images, optional.
- ``<root>/<category>/test/<good or defect>``: test images.
- ``<root>/<category>/ground_truth/<defect>``: masks, named like their image or with ``_mask`` added, optional.
"""

from pathlib import Path

import pandas as pd
from anomalib.data.datamodules.image.tabular import Tabular
from anomalib.data.datasets.image.tabular import TabularDataset
from anomalib.data.utils import LabelName, Split, ValSplitMode
from torchvision.datasets.folder import IMG_EXTENSIONS

VALIDATION = "validation"  # name of the folder, as in MVTec LOCO


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
    """Tabulate the images of one category; all image formats that torchvision lists are accepted.

    Returns:
        pd.DataFrame: A row for each image, with ``image_path``, ``split`` (name of the folder), ``label`` (``good`` or
        the defect), ``label_index`` and ``mask_path`` (empty if there is none).

    Raises:
        ValueError: If there are no training images, or masks for only some of the defective images.
    """
    paths = [
        path
        for path in sorted(folder.glob("*/*/*"))
        if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")  # macOS adds "._*" to archives
    ]
    masks = {
        (path.parent.name, path.stem.removesuffix("_mask")): str(path)
        for path in paths
        if path.parts[-3] == "ground_truth"
    }
    samples = pd.DataFrame(
        [
            {
                "image_path": str(path),
                "split": path.parts[-3],
                "label": path.parent.name,
                "label_index": LabelName.NORMAL if path.parent.name == "good" else LabelName.ABNORMAL,
                "mask_path": masks.get((path.parent.name, path.stem), ""),
            }
            for path in paths
            if path.parts[-3] in {Split.TRAIN.value, Split.TEST.value} or path.parts[-3:-1] == (VALIDATION, "good")
        ]
    )
    if samples.empty or not (samples.split == Split.TRAIN.value).any():
        msg = f"Category {folder.name!r} has no training images in '{folder}/train/good'. Add some, or leave it out."
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
