"""Datamodule of a demo data set that needs no download; :mod:`decodiff_anomalib.data.textures` makes its images."""

import logging
from pathlib import Path

from anomalib.data.datamodules.image.mvtecad import MVTecAD
from anomalib.data.datasets.image.mvtecad import MVTecADDataset
from anomalib.data.utils import ValSplitMode
from platformdirs import user_cache_path

from decodiff_anomalib.data.layout import VALIDATION

logger = logging.getLogger(__name__)

VERSION = "v2"  # part of the cache's path: increase it with every change to the images
CATEGORIES = ("brick", "grass", "gravel")


class DemoTextures(MVTecAD):
    """Anomalib datamodule of photographed textures with painted defects; needs no network.

    The images are created on first use (a few seconds, 17 MB) and kept; creating them again gives identical files.
    Unlike its parent class, it validates on normal images that are not in the test set.

    Args:
        root: Folder below which the images are stored. Defaults to the user's cache folder.
        category: ``"brick"``, ``"grass"`` or ``"gravel"``.
        train_batch_size: Batch size for training.
        eval_batch_size: Batch size for validation and test.
        num_workers: Number of loader processes. 0 by default: starting them takes longer than reading the images.

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
        if category not in CATEGORIES:
            msg = f"Unknown category {category!r}; DemoTextures has {', '.join(CATEGORIES)}."
            raise ValueError(msg)
        cache = user_cache_path("decodiff_anomalib", appauthor=False) if root is None else Path(root)
        super().__init__(
            # Anomalib saves a picture under the part of the image's path that follows a folder named like the class.
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
        """Create the images of all categories unless they exist, complete and unchanged.

        Raises:
            ImportError: If scikit-image, which contains the photographs, is missing.
            OSError: If the folder cannot be written.
        """
        from decodiff_anomalib.data.textures import build_textures, is_intact  # imports SciPy

        if is_intact(self.root):
            logger.info("Found the demo textures in %s.", self.root)
        else:
            logger.info("Creating the demo textures in %s.", self.root)
            build_textures(self.root)
