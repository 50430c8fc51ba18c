"""Dataset of several categories, whose items and batches carry the name of the category of each image."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby, islice
from typing import ClassVar, cast

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data.dataclasses.numpy.image import NumpyImageBatch, NumpyImageItem
from anomalib.data.dataclasses.torch.image import ImageBatch, ImageItem
from anomalib.data.datasets.base.image import AnomalibDataset
from anomalib.data.utils import LabelName
from torch.utils.data import BatchSampler, Sampler


@dataclass
class NumpyCategoryItem(NumpyImageItem):
    """Anomalib's item plus the name of its category."""

    category: str | None = None


@dataclass
class NumpyCategoryBatch(NumpyImageBatch):
    """Anomalib's batch plus the name of each item's category."""

    item_class: ClassVar[type[NumpyCategoryItem]] = NumpyCategoryItem
    category: list[str] | None = None


@dataclass
class CategoryItem(ImageItem):
    """Anomalib's item plus the name of its category."""

    numpy_class: ClassVar[type[NumpyCategoryItem]] = NumpyCategoryItem
    category: str | None = None


@dataclass
class CategoryBatch(ImageBatch):
    """Anomalib's batch plus the name of each item's category.

    Names, not indices: a model may have been trained on other categories than those it is tested on.
    """

    item_class: ClassVar[type[CategoryItem]] = CategoryItem
    numpy_class: ClassVar[type[NumpyCategoryBatch]] = NumpyCategoryBatch
    category: list[str] | None = None

    @classmethod
    def collate(cls, items: list[ImageItem]) -> "CategoryBatch":
        """Batch the items; a field that is None in some of them is None in the batch.

        Anomalib takes the fields of the first item for all; the fields of the others then crash or disappear.
        """
        mask_path = [item.mask_path or "" for item in items]
        for field in fields(cls):
            if any(getattr(item, field.name) is None for item in items):
                for item in items:
                    setattr(item, field.name, None)
        batch = cast("CategoryBatch", super().collate(items))
        batch.mask_path = mask_path if any(mask_path) else None
        return batch


class MultiCategoryDataset(AnomalibDataset):
    """Images of several datasets; each image is read by the dataset it came from.

    Args:
        parts: Category name to its dataset, whose ``category`` is set to that name.

    Attributes:
        parts: The datasets. ``samples`` has a row for each image, with its ``category``, the index ``part`` of its
            dataset and its ``row`` in that dataset.
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
        """Whether the anomalous pixels of each sample are known."""
        if self.task == TaskType.CLASSIFICATION:
            return pd.Series(data=False, index=self.samples.index)
        segmented = [part.task == TaskType.SEGMENTATION for part in self.parts]
        label = self.samples.label_index
        return (label == LabelName.NORMAL) | (
            (label == LabelName.ABNORMAL) & self.samples.part.map(segmented.__getitem__)
        )

    @property
    def collate_fn(self) -> Callable:
        """Function that makes a :class:`CategoryBatch` of a list of items."""
        return CategoryBatch.collate

    def __getitem__(self, index: int) -> CategoryItem:
        sample = self.samples.iloc[index]
        item = self.parts[sample["part"]][sample["row"]]
        values = {field.name: getattr(item, field.name) for field in fields(ImageItem)}
        if item.gt_mask is None and item.gt_label == LabelName.NORMAL and self.task == TaskType.SEGMENTATION:
            values["gt_mask"] = torch.zeros(item.image.shape[-2:], dtype=torch.bool)
        return CategoryItem(**values, category=sample["category"])

    def __add__(self, other: "MultiCategoryDataset") -> "MultiCategoryDataset":
        """Concatenate the samples and the datasets that read them."""
        dataset = cast("MultiCategoryDataset", super().__add__(other))
        dataset.parts += other.parts
        shifted = other.samples.assign(part=other.samples["part"] + len(self.parts))
        dataset.samples = pd.concat([self.samples, shifted], ignore_index=True)
        return dataset


class HomogeneousBatchSampler(BatchSampler):
    """Batches of samples with the same key; a batch ends early where the key changes.

    Args:
        sampler: Yields the indices of the samples in order.
        batch_size: Maximum size of a batch.
        drop_last: Whether smaller batches are left out.
        keys: Key of each sample of the dataset.
    """

    # In distributed training Lightning replaces ``sampler`` and passes the other arguments by these names.
    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, keys: Sequence[object]) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.keys = keys

    def __iter__(self) -> Iterator[list[int]]:
        for _, group in groupby(self.sampler, key=self.keys.__getitem__):
            while batch := list(islice(group, self.batch_size)):
                if len(batch) == self.batch_size or not self.drop_last:
                    yield batch

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _tabulate(part: AnomalibDataset, index: int) -> pd.DataFrame:
    """The columns that all of Anomalib's datasets have, plus the dataset and row that each sample came from."""
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
