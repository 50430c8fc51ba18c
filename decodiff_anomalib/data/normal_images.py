"""Normal training images: some held out to set thresholds, and a sample of each category."""

import math
from collections.abc import Callable, Iterable

import torch
from anomalib.data import AnomalibDataset, Batch
from anomalib.data.utils.split import random_split

from decodiff_anomalib.calibration import FEWEST_NORMALS

IMAGES, IMAGES_OF_CATEGORY = 128, 24
"""Images in total, and at least of each category."""


def hold_out(dataset: AnomalibDataset, share: float, seed: int) -> tuple[AnomalibDataset, AnomalibDataset]:
    """Split off images at random: a share of them, but at least as many as set a threshold, or half of fewer than 8.

    Args:
        dataset: Of ``N`` images.
        share: To hold out, in (0, 1).
        seed: Chooses them.

    Returns:
        tuple[AnomalibDataset, AnomalibDataset]: The remaining and the held-out images.
    """
    total = len(dataset)
    held_out = max(int(total * share), min(FEWEST_NORMALS, total // 2))
    # Anomalib rounds the two parts separately; in the middle between two counts, they cannot disagree.
    remaining, chosen = random_split(dataset, (held_out + 0.5) / total, seed=seed)
    return remaining, chosen


def collect_normal_images(
    batches: Iterable[Batch], category_of: Callable[[Batch], torch.Tensor], num_categories: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read batches until there are enough normal images of each category.

    Args:
        batches: Of images ``(B, 3, H, W)``; without labels, all images are normal.
        category_of: Category index ``(B,)`` of a batch.
        num_categories: Categories that the batches hold.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: Images ``(N, 3, H, W)`` and their category index ``(N,)``; empty where there
        are none.
    """
    enough = max(math.ceil(IMAGES / num_categories), IMAGES_OF_CATEGORY)
    kept: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        normal = slice(None) if batch.gt_label is None else ~batch.gt_label.bool()
        for image, category in zip(batch.image[normal], category_of(batch)[normal].tolist(), strict=True):
            if len(kept.setdefault(category, [])) < enough:
                kept[category].append(image)
        if len(kept) == num_categories and all(len(images) == enough for images in kept.values()):
            break
    images = [image for of_category in kept.values() for image in of_category]
    if not images:
        return torch.empty(0), torch.empty(0)
    return torch.stack(images), torch.tensor([index for index, of_category in kept.items() for _ in of_category])
