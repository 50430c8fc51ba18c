"""A sample of the normal images of each category."""

import math
from collections.abc import Callable, Iterable

import torch
from anomalib.data import Batch

IMAGES, IMAGES_OF_CATEGORY = 128, 24
"""Images in total, and at least of each category."""


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
