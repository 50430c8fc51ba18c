"""Feature latents: whitened principal components of each category."""

import pytest
import torch

from decodiff_anomalib.features import FeatureLatents, VisualFeatures
from decodiff_anomalib.features import latents as module


def test_components_are_whitened(backbone: VisualFeatures, features: torch.Tensor, rows: dict[int, slice]) -> None:
    feature_latents = FeatureLatents(backbone.groups["image"].layer_channels, num_categories=2)
    for row, chosen in rows.items():
        feature_latents.fit(row, features[chosen])
    assert feature_latents(features, torch.arange(12) // 6).shape == (12, 152, 8, 8)
    for row, chosen in rows.items():
        category = torch.full((len(features[chosen]),), row)
        latents = feature_latents(features[chosen], category)
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(152), atol=1e-3, rtol=0)
        assert latents.std((0, 2, 3))[0] == pytest.approx(1, abs=0.01)
        covariance = torch.cov(latents.movedim(1, 0).flatten(1))
        assert (covariance - covariance.diag().diag()).abs().max() < 1e-2
        contrast = feature_latents(3 * features[chosen], category)
        torch.testing.assert_close(contrast, latents, atol=1e-3, rtol=1e-3)  # only directions count


def test_many_features_keep_their_leading_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 x 768 features, 256 components: whitening and bank stay small."""
    assert FeatureLatents([768] * 4, 1).projection.shape == (2, 256, 3072)
    monkeypatch.setattr(module, "MAX_COMPONENTS", 2)
    few = FeatureLatents([4], 1)
    points = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([5, 1, 1, 1]).view(
        4, 1, 1
    )
    few.fit(0, points)
    assert few(points, torch.zeros(40, dtype=torch.long)).shape == (40, 2, 8, 8)
    assert few.projection[0, 0].abs().argmax() == 0
