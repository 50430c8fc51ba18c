"""Images to compare exports on and to measure integer ranges on: of a datamodule, or drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, Batch
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Subset

from decodiff_anomalib.data.images import image_owners, image_paths, inspect_images, reread, settle_white_level


def set_up(datamodule: AnomalibDataModule) -> None:
    """Make the training and test data of ``datamodule`` available, as the trainer does."""
    datamodule.prepare_data()
    datamodule.setup("fit")


def evenly_spaced(dataset: AnomalibDataset, count: int, white_level: float | None = None) -> DataLoader:
    """Batches of one image, up to ``count``, at equal distances in a data set that is sorted by category.

    Args:
        dataset: Of images and masks.
        count: Images to choose.
        white_level: Of the model, see :func:`decodiff_anomalib.data.read_image`.
    """
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    paths = image_paths(dataset)
    found = inspect_images(paths[index] for index in chosen)
    white_level = settle_white_level(found, white_level)
    owners = {path: owner for path, owner in image_owners(dataset).items() if path in found}

    def collate(items: list[Any]) -> Batch:
        batch = dataset.collate_fn(items)
        reread(batch, owners, white_level)
        return batch

    return DataLoader(Subset(dataset, chosen.tolist()), batch_size=1, collate_fn=collate)


def drawn_images(count: int, size: Sequence[int]) -> list[torch.Tensor]:
    """Random images ``(3, height, width)`` in [0, 1], from smooth to textured, dark to bright, grey to coloured."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for index in range(count):
        cells = 2 ** (index % 6 + 1)
        coarse = torch.rand(1, 3 if index % 3 else 1, cells, cells, generator=generator)
        image = F.interpolate(coarse, size=tuple(size), mode="bicubic")[0].expand(3, -1, -1)
        fine = torch.rand(3, *size, generator=generator) - 0.5
        contrast, brightness, roughness = torch.rand(3, generator=generator).tolist()
        images.append((brightness + contrast * (image - 0.5) + 0.3 * roughness * fine).clamp(0, 1))
    return images
