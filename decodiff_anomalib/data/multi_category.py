"""Datamodule of several categories, for any of Anomalib's models.

Each category has an Anomalib datamodule, which finds, splits and reads its images. :class:`MultiCategory` joins their
subsets.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datasets.base.depth import AnomalibDepthDataset
from anomalib.data.datasets.base.video import AnomalibVideoDataset
from anomalib.data.utils import LabelName, ValSplitMode
from anomalib.utils.attrs import get_nested_attr
from anomalib.utils.path import generate_output_filename
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler, WeightedRandomSampler
from torchvision.transforms.v2 import Transform

from decodiff_anomalib.data.dataset import HomogeneousBatchSampler, MultiCategoryDataset
from decodiff_anomalib.data.layout import CategoryFolder, find_categories, read_layout
from decodiff_anomalib.data.normal_images import hold_out
from decodiff_anomalib.folder_names import check_folder_name

SUBSETS = ("train", "val", "test")


class MultiCategory(AnomalibDataModule):
    """Anomalib datamodule of several categories, to train one model for all of them.

    Give either ``root``, a folder with one sub-folder in MVTec AD's layout for each category, or ``datamodules``. Size,
    aspect ratio and colour of the images may differ between categories. Nothing is downloaded for ``root``.

    If a category has no normal test images, a fifth of its training images are used for testing, as Anomalib does.

    A category may have no masks (no ``ground_truth`` folder). Pixel metrics then cover every image whose anomalous
    pixels are known: the normal images of all categories, which have none, and the defective images with a mask.
    Defective images without a mask count in the image metrics only, and are batched separately for this reason.

    Testing any model ends with :class:`~decodiff_anomalib.evaluation.CategoryReport`, a table of all categories.

    Args:
        root: Folder of ``<category>/train/good``, ``<category>/test/<good or defect>`` and, optionally,
            ``<category>/ground_truth/<defect>``, with masks named like their image or with ``_mask`` added, and
            ``<category>/validation/good``.
        categories: Names of the categories to use, in the order of their indices. All by default, sorted for ``root``
            and in the given order for ``datamodules``.
        datamodules: Category name to an image datamodule, or to its ``class_path`` and ``init_args``. Their roots,
            test splits and augmentations are kept; batch sizes, workers, validation split and seed are the ones given
            here.
        train_batch_size: Batch size for training.
        eval_batch_size: Batch size for validation and test.
        num_workers: Number of loader processes.
        train_augmentations: Transform of the training images, for each category whose datamodule has none.
        val_augmentations: The same for validation.
        test_augmentations: The same for test.
        val_split_mode: As in Anomalib, for each category separately. By default, validation images that a category has
            (in ``validation/good`` or in its datamodule) are used, and otherwise normal training images are held out;
            with ``from_test`` and ``same_as_test``, thresholds depend on test images.
        val_split_ratio: Share of a category that is held out, in (0, 1).
        balance: Draw every category equally often in training, with replacement. The length of an epoch stays the same,
            so it repeats images of small categories and omits some of large ones.
        seed: Seed of the splits and of the order of the training images.

    Attributes:
        categories: Their names; the position is a category's index.
        datamodules: Category name to its datamodule.

    Raises:
        FileNotFoundError: If ``root`` does not exist, or contains no category.
        ValueError: If both or neither of ``root`` and ``datamodules`` are given, ``categories`` is empty, names an
            unknown category, or names one twice, a name cannot be that of a folder, a category below ``root`` lacks
            training images or some of its masks, or an argument is out of range.

    Example:
        >>> datamodule = MultiCategory(root="datasets/MVTecAD", categories=["bottle", "cable"])
        >>> datamodule.setup()
        >>> next(iter(datamodule.test_dataloader())).category[0]
        'bottle'
    """

    seed: int
    train_data: MultiCategoryDataset
    val_data: MultiCategoryDataset
    test_data: MultiCategoryDataset

    def __init__(
        self,
        root: str | Path | None = None,
        categories: list[str] | None = None,
        datamodules: dict[str, AnomalibDataModule] | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TRAIN,
        val_split_ratio: float = 0.15,
        balance: bool = False,
        seed: int = 0,
    ) -> None:
        if (root is None) == (datamodules is None):
            given = "neither" if root is None else "both"
            msg = f"MultiCategory takes its categories from root or from datamodules; {given} were given. Give one."
            raise ValueError(msg)
        modes = [mode.value for mode in ValSplitMode]
        if val_split_mode not in modes:
            msg = f"val_split_mode={val_split_mode!r} is unknown; valid: {', '.join(modes)}."
            raise ValueError(msg)
        if not 0 < val_split_ratio < 1:
            msg = f"val_split_ratio={val_split_ratio} must be between 0 and 1; val_split_mode=none holds nothing out."
            raise ValueError(msg)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = None if root is None else Path(root).resolve()
        self.balance = balance
        self.datamodules: dict[str, AnomalibDataModule]
        if self.root is not None:
            folders = find_categories(self.root)
            self.categories = _choose(categories, list(folders))
            self.datamodules = {name: CategoryFolder(name, read_layout(folders[name])) for name in self.categories}
        elif datamodules is not None:
            self.categories = _choose(categories, list(datamodules))
            self.datamodules = {name: _as_datamodule(datamodules[name]) for name in self.categories}

    @property
    def name(self) -> str:
        """Name of the folder that contains all categories, or of this class if there is no such folder.

        Anomalib saves a picture under the part of the image's path that follows a folder of this name; this keeps
        ``pcb/test/good/000.png`` and ``tile/test/good/000.png`` apart.
        """
        roots: list[Any] = [self.root]
        if self.root is None:
            roots = [getattr(inner, "root", None) for inner in self.datamodules.values()]
        try:
            shared = os.path.commonpath([Path(root).resolve() for root in roots])
        except (TypeError, ValueError):  # a datamodule without a root; roots on two drives
            shared = ""
        return Path(shared).name or type(self).__name__

    @property
    def counts(self) -> pd.DataFrame:
        """Number of images of each category, in index order, and in total; available after setup.

        One column for each subset and label, and one for the test masks.
        """
        label = {LabelName.NORMAL: "normal", LabelName.ABNORMAL: "defective", LabelName.UNKNOWN: "unlabelled"}
        samples = pd.concat(
            [data.samples.assign(subset=subset) for subset, data in self._subsets.items()], ignore_index=True
        )
        kind = samples.subset + " " + samples.label_index.map(label)
        columns = [f"{subset} {word}" for subset in self._subsets for word in label.values()]
        table = pd.crosstab(samples.category, kind).reindex(index=self.categories, columns=columns, fill_value=0)
        table = table.loc[:, table.any()]
        tested = self.test_data.samples
        masked = tested[(tested.label_index == LabelName.ABNORMAL) & self.test_data.has_pixel_truth]
        table["test masks"] = masked.category.value_counts().reindex(self.categories, fill_value=0)
        table.loc["total"] = table.sum()
        return table.rename_axis(index=None, columns=None)

    @property
    def _subsets(self) -> dict[str, MultiCategoryDataset]:
        return {name: getattr(self, f"{name}_data") for name in SUBSETS if hasattr(self, f"{name}_data")}

    def prepare_data(self) -> None:
        """Let the given datamodules download or create their images; does nothing for ``root``.

        Raises:
            RuntimeError: If a datamodule fails; names its category.
        """
        if self.root is None:
            for name, inner in self.datamodules.items():
                with _name_category_in_errors(name, inner):
                    inner.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Find and split the images; attach the report by category if ``stage`` is a test.

        Args:
            stage: Stage of the trainer: ``fit``, ``validate``, ``test`` or ``predict``.
        """
        super().setup(stage)
        if stage == TrainerFn.TESTING and self.trainer is not None:
            from decodiff_anomalib.evaluation import CategoryReport  # imports SciPy, which other stages do not need

            CategoryReport.attach(self.trainer, self.categories)

    def _setup(self, _stage: str | None = None) -> None:
        """Split every category separately, then join the categories.

        Raises:
            RuntimeError: If a datamodule fails, or has no images to train or to validate on; names its category.
            ValueError: If two categories contain the same image.
        """
        for name, inner in self.datamodules.items():
            with _name_category_in_errors(name, inner):
                self._split(inner)
        self._refuse_shared_images()
        # After all checks, so that an error leaves no subset of only some categories.
        for subset in SUBSETS if self.val_split_mode != ValSplitMode.NONE else ("train", "test"):
            parts = {name: getattr(inner, f"{subset}_data") for name, inner in self.datamodules.items()}
            setattr(self, f"{subset}_data", MultiCategoryDataset(parts))
        rank_zero_info("%d categories:\n%s", len(self.categories), self.counts.to_string())
        self._warn_of_overwritten_pictures()

    def _split(self, inner: AnomalibDataModule) -> None:
        uses_own_validation = (
            inner.val_split_mode == ValSplitMode.FROM_DIR and self.val_split_mode == ValSplitMode.FROM_TRAIN
        )
        inner.seed, inner.val_split_ratio = self.seed, self.val_split_ratio
        inner.val_split_mode = ValSplitMode.FROM_DIR if uses_own_validation else ValSplitMode.NONE
        inner.setup()
        num_train = len(inner.train_data)
        if not num_train:
            msg = "it has no training images. Add normal images, or leave the category out."
            raise ValueError(msg)
        if isinstance(inner.train_data, AnomalibDepthDataset | AnomalibVideoDataset):
            msg = f"{type(inner.train_data).__name__} gives no plain images. Use an image datamodule."
            raise TypeError(msg)
        if not uses_own_validation:
            inner.val_split_mode = self.val_split_mode
        if inner.val_split_mode == ValSplitMode.FROM_TRAIN:
            inner.train_data, inner.val_data = hold_out(inner.train_data, self.val_split_ratio, self.seed)
        else:
            inner._create_val_split()  # noqa: SLF001 - of our own base class; setup() would call it too early
        if self.val_split_mode != ValSplitMode.NONE and not len(getattr(inner, "val_data", ())):
            msg = (
                f"val_split_mode={self.val_split_mode.value} and val_split_ratio={self.val_split_ratio} give no "
                f"validation images ({num_train} to train on). Add images, change these, or leave the category out."
            )
            raise ValueError(msg)

    def _refuse_shared_images(self) -> None:
        owner: dict[str, str] = {}
        for name, inner in self.datamodules.items():
            for path in map(str, [*inner.train_data.samples.image_path, *inner.test_data.samples.image_path]):
                if owner.setdefault(path, name) != name:
                    msg = (
                        f"Categories {owner[path]!r} and {name!r} both contain '{path}', which one might train on and "
                        "the other test on. Give every image to one category."
                    )
                    raise ValueError(msg)

    def _create_test_split(self) -> None:
        """Do nothing: the datamodule of each category has split its own images."""

    def _create_val_split(self) -> None:
        """Do nothing: the datamodule of each category has split its own images."""

    def _warn_of_overwritten_pictures(self) -> None:
        paths = self.test_data.samples.image_path
        pictures = {generate_output_filename(path, "", self.name, mkdir=False) for path in paths}
        if len(pictures) < len(paths):
            rank_zero_warn(
                f"Anomalib's visualizer will overwrite {len(paths) - len(pictures)} of {len(paths)} test pictures: it "
                "tells images apart by their path below a folder that all share, and these datamodules name none. "
                "Give each of them a root, all below one folder."
            )

    def _update_augmentations(self) -> None:
        """Set the augmentations of each category and the model's image size.

        The augmentations are those of the category's datamodule, or of this one where that has none.
        """
        transform = get_nested_attr(self, "trainer.model.pre_processor.transform", None)
        for subset, data in self._subsets.items():
            for part in data.parts:
                own = getattr(self.datamodules[str(part.category)], f"{subset}_augmentations")
                part.augmentations = getattr(self, f"{subset}_augmentations") if own is None else own
                if transform:
                    self._update_subset_augmentations(part, part.augmentations, transform)

    def train_dataloader(self) -> DataLoader:
        """Training images in an order that depends on ``seed`` alone, not on the global random state.

        Distributed training keeps the balance: Lightning gives each process a share of the indices that the sampler
        draws.
        """
        generator = torch.Generator().manual_seed(self.seed)
        sampler: Sampler[int] = RandomSampler(self.train_data, generator=generator)
        if self.balance:
            category = self.train_data.samples.category
            weights = 1 / category.map(category.value_counts())
            sampler = WeightedRandomSampler(weights.tolist(), len(weights), generator=generator)
        return DataLoader(
            self.train_data,
            batch_size=self.train_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or self.train_data.collate_fn,
            generator=generator,
        )

    def val_dataloader(self) -> DataLoader:
        """Validation images in the order of their paths."""
        return self._eval_dataloader(self.val_data)

    def test_dataloader(self) -> DataLoader:
        """Test images in the order of their paths."""
        return self._eval_dataloader(self.test_data)

    def _eval_dataloader(self, dataset: MultiCategoryDataset) -> DataLoader:
        known = dataset.has_pixel_truth.tolist()
        batching: dict[str, Any]
        if len(set(known)) < 2:
            batching = {"batch_size": self.eval_batch_size}
        else:
            batches = HomogeneousBatchSampler(
                SequentialSampler(dataset), self.eval_batch_size, drop_last=False, keys=known
            )
            batching = {"batch_sampler": batches}
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or dataset.collate_fn,
            **batching,
        )


def _choose(wanted: Sequence[str] | None, available: list[str]) -> list[str]:
    """The wanted categories in the given order, or all."""
    chosen = available if wanted is None else list(wanted)
    if not chosen:
        msg = "MultiCategory needs at least one category; none was named."
        raise ValueError(msg)
    unknown = [name for name in chosen if name not in available]
    if unknown:
        msg = f"Unknown categories {', '.join(map(repr, unknown))}; valid: {', '.join(available)}."
        raise ValueError(msg)
    repeated = sorted({name for name in chosen if chosen.count(name) > 1})
    if repeated:
        msg = f"categories names {', '.join(map(repr, repeated))} more than once; name each category once."
        raise ValueError(msg)
    for name in chosen:
        check_folder_name(name, "category")
    return chosen


def _as_datamodule(given: AnomalibDataModule | dict[str, Any]) -> AnomalibDataModule:
    """The given datamodule, or the one built from its configuration, which ``anomalib benchmark`` passes."""
    if isinstance(given, AnomalibDataModule):
        return given
    from anomalib.data import get_datamodule  # defined only after the plugin has imported this module

    return get_datamodule(given)


@contextmanager
def _name_category_in_errors(category: str, datamodule: AnomalibDataModule) -> Iterator[None]:
    """Turn any exception of the block into one that names the category."""
    try:
        yield
    except Exception as error:
        msg = f"Category {category!r} ({type(datamodule).__name__}) failed: {error}"
        raise RuntimeError(msg) from error
