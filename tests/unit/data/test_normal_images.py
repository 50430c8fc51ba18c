"""The sample of normal images: how many of each category, and when reading stops."""

from collections.abc import Iterator
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from anomalib.data import AnomalibDataset

from decodiff_anomalib.data.normal_images import IMAGES, IMAGES_OF_CATEGORY, collect_normal_images, hold_out


def batches(categories: list[int], read: list[int], labels: list[int] | None = None) -> Iterator[SimpleNamespace]:
    """Endless batches of one image for each of ``categories``, whose pixels are numbered."""
    number = 0
    while True:
        read.append(number)
        image = torch.arange(number, number + len(categories)).float().view(-1, 1, 1, 1)
        number += len(categories)
        yield SimpleNamespace(
            image=image, category=torch.tensor(categories), gt_label=None if labels is None else torch.tensor(labels)
        )


def test_one_category_fills_the_sample_and_reading_stops() -> None:
    read: list[int] = []
    images, category = collect_normal_images(batches([0, 0], read), lambda batch: batch.category, 1)
    assert images.flatten().tolist() == list(range(IMAGES))
    assert (category == 0).all()
    assert len(read) == IMAGES // 2


def test_many_categories_have_a_minimum_each() -> None:
    images, category = collect_normal_images(batches(list(range(10)), []), lambda batch: batch.category, 10)
    assert category.bincount().tolist() == [IMAGES_OF_CATEGORY] * 10
    assert torch.equal(images.flatten().long() % 10, category)


def test_defective_images_are_left_out() -> None:
    images, _ = collect_normal_images(batches([0, 0], [], labels=[0, 1]), lambda batch: batch.category, 1)
    assert (images.flatten() % 2 == 0).all()


def test_no_normal_images_give_an_empty_sample() -> None:
    images, category = collect_normal_images([], lambda batch: batch.category, 1)
    assert len(images) == len(category) == 0


class Images(AnomalibDataset):
    """Normal images that are never read."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.samples = pd.DataFrame({"image_path": [__file__] * count, "split": "train", "label_index": 0})


@pytest.mark.parametrize(
    ("count", "share", "held_out"),
    [(1, 0.15, 0), (2, 0.15, 1), (7, 0.15, 3), (8, 0.15, 4), (10, 0.15, 4), (110, 0.15, 16)],
)
def test_a_share_is_held_out_but_enough_to_set_a_threshold(count: int, share: float, held_out: int) -> None:
    remaining, chosen = hold_out(Images(count), share, seed=0)
    assert (len(remaining), len(chosen)) == (count - held_out, held_out)
