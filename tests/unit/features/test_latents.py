"""Feature latents: whitened principal components of each category."""

import pytest
import torch

from decodiff_anomalib.features import FeatureLatents, VisualFeatures


def test_components_are_whitened(backbone: VisualFeatures, features: torch.Tensor, rows: dict[int, slice]) -> None:
    feature_latents = FeatureLatents(backbone.channels, num_categories=2)
    for row, chosen in rows.items():
        feature_latents.fit(row, features[chosen])
    assert feature_latents(features, torch.arange(12) // 6).shape == (12, 32, 8, 8)
    for row, chosen in rows.items():
        latents = feature_latents(features[chosen], torch.full((len(features[chosen]),), row))
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(32), atol=1e-3, rtol=0)
        assert latents.std((0, 2, 3))[0] == pytest.approx(1, abs=0.01)
        covariance = torch.cov(latents.movedim(1, 0).flatten(1))
        assert (covariance - covariance.diag().diag()).abs().max() < 1e-2
