"""Several product categories in one datamodule, for any of Anomalib's models.

Each category keeps an Anomalib datamodule of its own, which finds the images, splits them and reads them. On top,
:class:`MultiCategory` joins their subsets, and items and batches say which category an image belongs to.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data.dataclasses.numpy.image import NumpyImageBatch, NumpyImageItem
from anomalib.data.dataclasses.torch.image import ImageBatch, ImageItem
from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datamodules.image.tabular import Tabular
from anomalib.data.datasets.base.depth import AnomalibDepthDataset
from anomalib.data.datasets.base.image import AnomalibDataset
from anomalib.data.datasets.base.video import AnomalibVideoDataset
from anomalib.data.datasets.image.tabular import TabularDataset
from anomalib.data.utils import LabelName, Split, ValSplitMode
from anomalib.utils.attrs import get_nested_attr
from anomalib.utils.path import generate_output_filename
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler, WeightedRandomSampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import Transform

SUBSETS = ("train", "val", "test")
VALIDATION = "validation"  # the folder's name, as in MVTec LOCO


class MultiCategory(AnomalibDataModule):
    """Anomalib datamodule of several categories, to train one model for all of them.

    Give either ``root``, a folder with a sub-folder in MVTec AD's layout for each category, or ``datamodules``. Images
    may differ in size, aspect and colour from category to category. Nothing is downloaded for ``root``.

    Where a category has no normal test images, a fifth of its training images become that, as usual in Anomalib.

    A category may come without masks (no ``ground_truth`` folder). Pixel metrics then cover every image whose pixels
    are known: normal images of all categories, which are normal everywhere, and defective images with a mask. Defective
    images without one count in the image metrics only and are batched separately for it.

    Tests of any model end with :class:`~decodiff_anomalib.evaluation.CategoryReport`, a table of all categories.

    Args:
        root: Folder of ``<category>/train/good``, ``<category>/test/<good or defect>`` and, optionally,
            ``<category>/ground_truth/<defect>``, with masks named like their image or with ``_mask`` added, and
            ``<category>/validation/good``.
        categories: Names of the categories to use, in the order of their indices. All by default, sorted for ``root``
            and as given for ``datamodules``.
        datamodules: Category name to an image datamodule, or to its ``class_path`` and ``init_args``. Their roots,
            test splits and augmentations are respected; batch sizes, workers, validation split and seed are those
            given here.
        train_batch_size: Batch size for training.
        eval_batch_size: Batch size for validation and test.
        num_workers: Loader processes.
        train_augmentations: Transform of the training images, for each category whose datamodule brings none.
        val_augmentations: The same for validation.
        test_augmentations: The same for test.
        val_split_mode: As in Anomalib, for each category by itself. By default a category's own validation images are
            used, of ``validation/good`` or of its datamodule, and normal training images are held out where it has
            none; ``from_test`` and ``same_as_test`` let test images set the thresholds.
        val_split_ratio: Share of a category that is held out, in (0, 1).
        balance: Draw every category equally often in training, with replacement: in an epoch, as long as without it,
            images of small categories come several times and some of large ones not at all.
        seed: Seed of the splits and of the order of the training images.

    Attributes:
        categories: Their names; the position is a category's index.
        datamodules: Category name to the datamodule behind it.

    Raises:
        FileNotFoundError: If ``root`` does not exist, or holds no category.
        ValueError: If both or neither of ``root`` and ``datamodules`` are given, ``categories`` names none, an unknown
            one, or one twice, a category below ``root`` lacks training images or some of its masks, or an argument is
            out of range.

    Example:
        >>> datamodule = MultiCategory(root="datasets/MVTecAD", categories=["bottle", "cable"])
        >>> datamodule.setup()
        >>> next(iter(datamodule.test_dataloader())).category[0]
        'bottle'
    """

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
        if self.root is not None:
            folders = _find_categories(self.root)
            self.categories = _choose(categories, list(folders))
            self.datamodules = {name: CategoryFolder(name, _read_layout(folders[name])) for name in self.categories}
        else:
            self.categories = _choose(categories, list(datamodules))
            self.datamodules = {name: _as_datamodule(datamodules[name]) for name in self.categories}

    @property
    def name(self) -> str:
        """Name of the folder that holds all categories, or of this class where they share none.

        Anomalib keeps that part of an image's path which follows a folder of this name, and so tells the pictures of
        ``pcb/test/good/000.png`` and ``tile/test/good/000.png`` apart.
        """
        roots = [self.root] if self.root else [getattr(inner, "root", None) for inner in self.datamodules.values()]
        try:
            shared = os.path.commonpath([Path(root).resolve() for root in roots])
        except (TypeError, ValueError):  # a datamodule without a root; roots on two drives
            shared = ""
        return Path(shared).name or type(self).__name__

    @property
    def counts(self) -> pd.DataFrame:
        """Images of each category, in index order, and in total: a column for each subset and label, after setup."""
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
    def _subsets(self) -> dict[str, "MultiCategoryDataset"]:
        return {name: getattr(self, f"{name}_data") for name in SUBSETS if hasattr(self, f"{name}_data")}

    def prepare_data(self) -> None:
        """Let the given datamodules fetch their images; what is below ``root`` is there already.

        Raises:
            RuntimeError: If a datamodule fails; names its category.
        """
        if self.root is None:
            for name, inner in self.datamodules.items():
                with _naming(name, inner):
                    inner.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Find and split the images; a test ends with a report by category.

        Args:
            stage: Of the trainer: ``fit``, ``validate``, ``test`` or ``predict``.
        """
        super().setup(stage)
        if stage == TrainerFn.TESTING and self.trainer is not None:
            from decodiff_anomalib.evaluation import CategoryReport  # imports SciPy, of no use to other stages

            CategoryReport.attach(self.trainer, self.categories)

    def _setup(self, _stage: str | None = None) -> None:
        """Split every category by itself, then join the categories.

        Raises:
            RuntimeError: If a datamodule fails, or has no images to train or to validate on; names its category.
            ValueError: If two categories contain the same image.
        """
        for name, inner in self.datamodules.items():
            with _naming(name, inner):
                self._split(inner)
        self._refuse_shared_images()
        # Only now, so that a failure leaves no half-filled subsets behind.
        for subset in SUBSETS if self.val_split_mode != ValSplitMode.NONE else ("train", "test"):
            parts = {name: getattr(inner, f"{subset}_data") for name, inner in self.datamodules.items()}
            setattr(self, f"{subset}_data", MultiCategoryDataset(parts))
        rank_zero_info("%d categories:\n%s", len(self.categories), self.counts.to_string())
        self._warn_of_shared_pictures()

    def _split(self, inner: AnomalibDataModule) -> None:
        has_its_own = inner.val_split_mode == ValSplitMode.FROM_DIR and self.val_split_mode == ValSplitMode.FROM_TRAIN
        inner.seed, inner.val_split_ratio = self.seed, self.val_split_ratio
        inner.val_split_mode = ValSplitMode.FROM_DIR if has_its_own else ValSplitMode.NONE
        inner.setup()
        num_train = len(inner.train_data)
        if not num_train:
            msg = "it has no training images. Add normal images, or leave the category out."
            raise ValueError(msg)
        if isinstance(inner.train_data, AnomalibDepthDataset | AnomalibVideoDataset):
            msg = f"{type(inner.train_data).__name__} gives no plain images. Use an image datamodule."
            raise TypeError(msg)
        if not has_its_own:
            inner.val_split_mode = self.val_split_mode
        inner._create_val_split()  # noqa: SLF001 - a method of our own base class, which setup() would call too early
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
        """Do nothing: each category has split its own images."""

    def _create_val_split(self) -> None:
        """Do nothing: each category has split its own images."""

    def _warn_of_shared_pictures(self) -> None:
        paths = self.test_data.samples.image_path
        pictures = {generate_output_filename(path, "", self.name, mkdir=False) for path in paths}
        if len(pictures) < len(paths):
            rank_zero_warn(
                f"Anomalib's visualizer will overwrite {len(paths) - len(pictures)} of {len(paths)} test pictures: it "
                "tells images apart by their path below a folder that all share, and these datamodules name none. "
                "Give each of them a root, all below one folder."
            )

    def _update_augmentations(self) -> None:
        """Give the images of each category the augmentations of its datamodule, else ours, and the model's size."""
        transform = get_nested_attr(self, "trainer.model.pre_processor.transform", None)
        for subset, data in self._subsets.items():
            for part in data.parts:
                own = getattr(self.datamodules[part.category], f"{subset}_augmentations")
                part.augmentations = getattr(self, f"{subset}_augmentations") if own is None else own
                if transform:
                    self._update_subset_augmentations(part, part.augmentations, transform)

    # ---------------------------------------------------------------- loaders

    def train_dataloader(self) -> DataLoader:
        """Training images in an order that the seed decides, whatever else draws random numbers.

        Distributed training keeps the balance: Lightning hands each process a share of what the sampler draws.
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

    def _eval_dataloader(self, dataset: "MultiCategoryDataset") -> DataLoader:
        known = dataset.has_pixel_truth.tolist()
        if len(set(known)) < 2:
            batching = {"batch_size": self.eval_batch_size}
        else:
            batches = RunBatchSampler(SequentialSampler(dataset), self.eval_batch_size, drop_last=False, keys=known)
            batching = {"batch_sampler": batches}
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or dataset.collate_fn,
            **batching,
        )


class CategoryFolder(Tabular):
    """One category below the root, with its own validation images where it has some.

    Args:
        name: Of the category.
        samples: What :func:`_read_layout` found.
    """

    def __init__(self, name: str, samples: pd.DataFrame) -> None:
        has_its_own = (samples.split == VALIDATION).any()
        super().__init__(name, samples, val_split_mode=ValSplitMode.FROM_DIR if has_its_own else ValSplitMode.NONE)

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        if self.val_split_mode == ValSplitMode.FROM_DIR:
            self.val_data = TabularDataset(self.name, samples=self._unprocessed_samples, split=VALIDATION)


# --- Items and batches that know their category ---


@dataclass
class NumpyCategoryItem(NumpyImageItem):
    """Anomalib's item with the name of its category."""

    category: str | None = None


@dataclass
class NumpyCategoryBatch(NumpyImageBatch):
    """Anomalib's batch with the names of its items' categories."""

    item_class: ClassVar[type[NumpyCategoryItem]] = NumpyCategoryItem
    category: list[str] | None = None


@dataclass
class CategoryItem(ImageItem):
    """Anomalib's item with the name of its category."""

    numpy_class: ClassVar[type[NumpyCategoryItem]] = NumpyCategoryItem
    category: str | None = None


@dataclass
class CategoryBatch(ImageBatch):
    """Anomalib's batch with the names of its items' categories.

    Names rather than indices: those of a trained model need not be those of the data it is tested on.
    """

    item_class: ClassVar[type[CategoryItem]] = CategoryItem
    numpy_class: ClassVar[type[NumpyCategoryBatch]] = NumpyCategoryBatch
    category: list[str] | None = None

    @classmethod
    def collate(cls, items: list[CategoryItem]) -> "CategoryBatch":
        """Batch the items; a field that some of them lack is absent from the batch.

        Anomalib goes by the first item alone, which makes the fields of the others crash or vanish.
        """
        mask_path = [item.mask_path or "" for item in items]
        for field in fields(cls):
            if any(getattr(item, field.name) is None for item in items):
                for item in items:
                    setattr(item, field.name, None)
        batch = super().collate(items)
        batch.mask_path = mask_path if any(mask_path) else None
        return batch


class MultiCategoryDataset(AnomalibDataset):
    """Images of several datasets, each read by its own.

    Args:
        parts: Category name to its dataset, whose ``category`` is set to that name.

    Attributes:
        parts: The datasets. ``samples`` has a row for each image, with its ``category``, the ``part`` that reads it and
            its ``row`` there.
    """

    def __init__(self, parts: dict[str, AnomalibDataset]) -> None:
        super().__init__()
        self.parts = list(parts.values())
        for part, category in zip(self.parts, parts, strict=True):
            part.category = category
        self.samples = pd.concat([_tabulate(part, index) for index, part in enumerate(self.parts)], ignore_index=True)

    @property
    def task(self) -> TaskType:
        """Segmentation if any category has masks."""
        tasks = {part.task for part in self.parts}
        return TaskType.SEGMENTATION if TaskType.SEGMENTATION in tasks else TaskType.CLASSIFICATION

    @property
    def has_pixel_truth(self) -> "pd.Series[bool]":
        """Whether it is known, for each sample, which pixels are anomalous."""
        if self.task == TaskType.CLASSIFICATION:
            return pd.Series(data=False, index=self.samples.index)
        segmented = [part.task == TaskType.SEGMENTATION for part in self.parts]
        label = self.samples.label_index
        return (label == LabelName.NORMAL) | (
            (label == LabelName.ABNORMAL) & self.samples.part.map(segmented.__getitem__)
        )

    @property
    def collate_fn(self) -> Callable:
        """Batches of :class:`CategoryBatch`."""
        return CategoryBatch.collate

    def __getitem__(self, index: int) -> CategoryItem:
        sample = self.samples.iloc[index]
        item = self.parts[sample["part"]][sample["row"]]
        values = {field.name: getattr(item, field.name) for field in fields(ImageItem)}
        if item.gt_mask is None and item.gt_label == LabelName.NORMAL and self.task == TaskType.SEGMENTATION:
            values["gt_mask"] = torch.zeros(item.image.shape[-2:], dtype=torch.bool)
        return CategoryItem(**values, category=sample["category"])

    def __add__(self, other: "MultiCategoryDataset") -> "MultiCategoryDataset":
        """Concatenate; every image is still read by the dataset it came from."""
        dataset = super().__add__(other)
        dataset.parts += other.parts
        shifted = other.samples.assign(part=other.samples["part"] + len(self.parts))
        dataset.samples = pd.concat([self.samples, shifted], ignore_index=True)
        return dataset


class RunBatchSampler(BatchSampler):
    """Batches that end early where the key of the samples changes, so that all samples of a batch share it.

    Args:
        sampler: Gives the order of the samples.
        batch_size: Largest size of a batch.
        drop_last: Whether smaller batches are left out.
        keys: A key for every sample of the dataset.
    """

    # Lightning puts a sampler for distributed runs in the place of ours; it knows the arguments by these names.
    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, keys: Sequence[object]) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.keys = keys

    def __iter__(self) -> Iterator[list[int]]:
        for _, run in groupby(self.sampler, key=self.keys.__getitem__):
            while batch := list(islice(run, self.batch_size)):
                if len(batch) == self.batch_size or not self.drop_last:
                    yield batch

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _tabulate(part: AnomalibDataset, index: int) -> pd.DataFrame:
    """The columns that all of Anomalib's datasets have, and where each sample comes from."""
    samples = part.samples
    return pd.DataFrame(
        {
            "image_path": samples.image_path.astype(str),
            "split": samples.split.astype(str),
            "label": samples.get("label", pd.Series("", index=samples.index)).astype(str),
            "label_index": samples.label_index.astype(int),
            "mask_path": samples.mask_path.fillna("").astype(str),
            "category": part.category,
            "part": index,
            "row": range(len(samples)),
        }
    )


# --- Finding categories ---


def _choose(wanted: Sequence[str] | None, available: list[str]) -> list[str]:
    """The wanted categories in their order, or all."""
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
    return chosen


def _as_datamodule(given: AnomalibDataModule | dict[str, Any]) -> AnomalibDataModule:
    """A datamodule as it is, or built from its configuration, which is what ``anomalib benchmark`` hands over."""
    if isinstance(given, AnomalibDataModule):
        return given
    from anomalib.data import get_datamodule  # defined after the plugin has imported this module

    return get_datamodule(given)


def _find_categories(root: Path) -> dict[str, Path]:
    """Folders of the categories below ``root``, by name."""
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


def _read_layout(folder: Path) -> pd.DataFrame:
    """Tabulate the images of one category in MVTec AD's layout, of any of the usual image formats.

    Raises:
        ValueError: If there are no training images, or masks for some defective images only.
    """
    paths = [
        path
        for path in sorted(folder.glob("*/*/*"))
        if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")  # such as macOS leaves in archives
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


@contextmanager
def _naming(category: str, datamodule: AnomalibDataModule) -> Iterator[None]:
    """Say which category failed."""
    try:
        yield
    except Exception as error:
        msg = f"Category {category!r} ({type(datamodule).__name__}) failed: {error}"
        raise RuntimeError(msg) from error
