"""Items and batches carry the right category and mask; datasets can be split and concatenated; batches by key."""

from itertools import chain, pairwise

import pytest
import torch
from anomalib.data.utils.split import random_split
from anomalib.metrics import AUROC
from torch.utils.data import DataLoader, SequentialSampler

from decodiff_anomalib.data.dataset import CategoryBatch, HomogeneousBatchSampler


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_batches_from_worker_processes_have_category_and_masks(root, start, grey_values, set_up):
    datamodule = set_up(root, num_workers=1)
    loader = datamodule.test_dataloader()
    loader.multiprocessing_context = start
    batches = list(loader)

    assert sum(len(batch) for batch in batches) == 20
    for batch in batches:
        assert isinstance(batch, CategoryBatch)
        for item in batch:
            grey = round(item.image[0, 0, 0].item() * 255)
            assert abs(grey - grey_values[item.category]) < 3
            defective = "/good/" not in item.image_path
            assert bool(item.gt_label) == defective
            if item.gt_mask is None:
                assert defective
                assert item.category == "felt"
            else:
                width = item.gt_mask.shape[1]
                expected = torch.zeros_like(item.gt_mask)
                expected[:, : width // 2] = defective
                assert (item.gt_mask == expected).float().mean() > 0.97  # resized to the batch's largest image
    assert {item.category for batch in batches for item in batch if item.gt_mask is None} == {"felt"}


def test_pixel_metrics_cover_exactly_the_images_with_known_pixels(root, set_up):
    known = {}
    for batch in set_up(root).test_dataloader():
        assert batch.gt_mask is None or len(batch.gt_mask) == len(batch)
        known.update(dict.fromkeys(batch.image_path, batch.gt_mask is not None))
    unknown = [path for path, is_known in known.items() if not is_known]
    assert len(unknown) == 2
    assert all("/felt/test/hole/" in path for path in unknown)

    metric = AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False)
    for batch in set_up(root).test_dataloader():
        metric.update(batch.update(anomaly_map=torch.zeros(len(batch), 1, *batch.image.shape[-2:])))
    assert metric.compute() == 0.5


def test_images_with_and_without_masks_can_be_batched_together(root, set_up):
    data = set_up(root).test_data
    batch = next(iter(DataLoader(data, batch_size=len(data), collate_fn=data.collate_fn)))
    assert len(batch) == 20
    assert batch.gt_mask is None
    assert sum(path != "" for path in batch.mask_path) == 9


def test_conversion_to_numpy_keeps_the_category(root, set_up):
    batch = next(iter(set_up(root).val_dataloader()))
    assert (
        [item.category for item in batch.to_numpy()] == [item.to_numpy().category for item in batch] == batch.category
    )


def test_split_and_concatenated_datasets_read_the_right_images(root, set_up):
    datamodule = set_up(root)
    kept, held_out = random_split(datamodule.train_data, 0.5, label_aware=True, seed=0)
    joined = held_out + datamodule.test_data + kept
    assert len(joined) == len(datamodule.train_data) + len(datamodule.test_data)
    assert joined.task == "segmentation"
    for index, item in enumerate(joined):
        sample = joined.samples.iloc[index]
        assert (item.image_path, item.category) == (sample.image_path, sample.category)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_homogeneous_batches_keep_the_order_and_never_mix_keys(size):
    keys = [0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1]
    sampler = HomogeneousBatchSampler(SequentialSampler(keys), size, drop_last=False, keys=keys)
    batches = list(sampler)
    assert list(chain.from_iterable(batches)) == list(range(11))
    assert len(sampler) == len(batches)
    assert all(len({keys[index] for index in batch}) == 1 for batch in batches)
    for batch, following in pairwise(batches):
        assert len(batch) == size or keys[batch[-1]] != keys[following[0]]


def test_homogeneous_batches_can_drop_smaller_batches():
    sampler = HomogeneousBatchSampler(SequentialSampler(range(5)), 2, drop_last=True, keys=[0, 0, 0, 1, 1])
    assert list(sampler) == [[0, 1], [3, 4]]
