"""Images that exports are compared on."""

import pytest
import torch

from decodiff_anomalib.export.sample_images import drawn_images


@pytest.mark.parametrize("size", [(64, 64), (33, 90)])
def test_drawn_images_are_reproducible_and_differ(size: tuple[int, int]) -> None:
    images = torch.stack(drawn_images(12, size))
    assert images.shape == (12, 3, *size)
    assert torch.equal(images, torch.stack(drawn_images(12, size)))
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.mean((1, 2, 3)).std() > 0.1
