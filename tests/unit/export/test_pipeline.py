"""The graph from images to predictions: resizing and the other transforms."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from decodiff_anomalib.export import AntialiasedResize, exportable


@pytest.mark.parametrize("target", [(256, 256), (64, 96)])
@pytest.mark.parametrize("source", [(256, 256), (64, 64), (1, 1), (100, 333), (257, 255), (700, 500), (1999, 1201)])
def test_resize_equals_antialiased_interpolation(source: tuple[int, int], target: tuple[int, int]) -> None:
    images = torch.rand(1, 3, *source, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(images, target, mode="bilinear", antialias=True)
    torch.testing.assert_close(AntialiasedResize(target)(images), expected, atol=1e-5, rtol=0)


def test_resize_to_the_same_size_is_the_identity() -> None:
    images = torch.rand(2, 3, 48, 80)
    assert torch.equal(AntialiasedResize((48, 80))(images), images)


@pytest.mark.parametrize("interpolation", ["bilinear", InterpolationMode.BILINEAR])  # as constructed and as restored
def test_exportable_keeps_antialiasing(interpolation: str | InterpolationMode) -> None:
    transform = Resize((64, 96), InterpolationMode.BILINEAR, antialias=True)
    images = torch.rand(1, 3, 300, 200)
    expected = transform(images)
    transform.interpolation = interpolation
    torch.testing.assert_close(exportable(transform)(images), expected, atol=1e-5, rtol=0)


def test_exportable_replaces_only_transforms_that_exporters_do_not_support() -> None:
    whole = exportable(Compose([Resize((64, 64), antialias=True), CenterCrop(48), Normalize([0.5] * 3, [0.5] * 3)]))
    assert [type(part).__name__ for part in whole.transforms] == [
        "AntialiasedResize",
        "ExportableCenterCrop",
        "Normalize",
    ]
    for kept in (Resize((64, 64), antialias=False), Resize(64, antialias=True)):
        assert isinstance(exportable(kept), Resize)
    assert exportable(None) is None
