"""The images of a test or prediction: which loaders tell of, what they are called, and which are left out."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from anomalib.data import ImageBatch
from anomalib.data.predict import PredictDataset
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset

from decodiff_anomalib.data.images import image_paths

_ALL = "all_image_filenames"  # attribute of a dataset that images were left out of: what it had


def datasets_of(loaders: object) -> list[Dataset]:
    """Datasets of a trainer's loaders, one or a collection; loaders that are other iterables have none."""
    return [loader.dataset for loader in CombinedLoader(loaders, "sequential").flattened if hasattr(loader, "dataset")]


def common_folder(datasets: Iterable[Dataset]) -> Path | None:
    """The deepest folder that holds all images which datasets tell of, those left out too; ``None`` without any."""
    folders = {os.path.dirname(path) for dataset in datasets for path in _all_paths(dataset)}  # noqa: PTH120 - many
    try:
        return Path(os.path.commonpath([absolute(folder) for folder in folders]))
    except ValueError:  # of no image; of images on several drives
        return None


def _all_paths(dataset: Dataset) -> list[str]:
    if isinstance(dataset, Subset):
        return _all_paths(dataset.dataset)
    return [str(path) for path in getattr(dataset, _ALL, ())] or image_paths(dataset)


def absolute(path: str) -> Path:
    """The absolute path without ``..``. Links stay: two links to one file are two images."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow them


class ImageNumbers:
    """Names the images of a run: by their path, or where they have none, by their number in the data.

    Args:
        trainer: Whose processes share the images in turn, so that no two of them give the same number.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._rank, self._processes, self._seen = trainer.global_rank, trainer.world_size, 0

    def numbered(self, batch: ImageBatch) -> list[tuple[int, str]]:
        """The number in the data and the name of each image of the next batch ``(B,)``."""
        first, self._seen = self._seen, self._seen + len(batch)
        paths = batch.image_path or [None] * len(batch)
        numbers = (seen * self._processes + self._rank for seen in range(first, self._seen))
        return [
            (number, str(path) if path else f"image-{number:06d}") for path, number in zip(paths, numbers, strict=True)
        ]

    def names(self, batch: ImageBatch) -> list[str]:
        """A name for each image of the next batch ``(B,)``."""
        return [name for _, name in self.numbered(batch)]


# ---------------------------------------------------------------- leaving images out


def shortenable(loaders: object) -> list[PredictDataset]:
    """Datasets that images can be left out of: of loaders that read Anomalib's ``PredictDataset`` from end to end."""
    flat = CombinedLoader(loaders, "sequential").flattened
    found = [loader.dataset for loader in flat if isinstance(loader, DataLoader) and _reads_all(loader)]
    return [dataset for dataset in found if isinstance(dataset, PredictDataset)]


def _reads_all(loader: DataLoader) -> bool:
    """Whether the order of a loader follows the length of its dataset."""
    batches = loader.batch_sampler
    return type(batches) is BatchSampler and type(batches.sampler) is SequentialSampler


def leave_out(dataset: PredictDataset, paths: Collection[str]) -> None:
    """Leave images out of a dataset until :func:`restore`."""
    vars(dataset).setdefault(_ALL, dataset.image_filenames)
    dataset.image_filenames = [path for path in dataset.image_filenames if str(path) not in paths]


def put_back(dataset: PredictDataset, paths: Collection[str]) -> None:
    """Put images back that :func:`leave_out` left out, in their places."""
    kept = {*map(str, dataset.image_filenames), *paths}
    everything = vars(dataset).get(_ALL, dataset.image_filenames)
    dataset.image_filenames = [path for path in everything if str(path) in kept]


def restore(dataset: PredictDataset) -> None:
    """Undo :func:`leave_out`."""
    dataset.image_filenames = vars(dataset).pop(_ALL, dataset.image_filenames)
