"""The way of the data, with a denoiser whose answer is known."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from decodiff_anomalib.presets import PRESETS
from decodiff_anomalib.torch_model import DeCoDiffModel

PLAIN = replace(PRESETS["balanced"], features=None, num_steps=3)


class KnowsTheDefect(nn.Module):
    """Predicts the deviation of one known image exactly."""

    def __init__(self, deviation: torch.Tensor) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        return self.deviation.expand_as(latents)


def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) - 0.5


def test_a_known_defect_is_corrected_and_mapped_where_it_is() -> None:
    model = DeCoDiffModel(PLAIN, (64, 96)).eval()
    normal = images()
    defective = normal.clone()
    defective[:, :, 16:24, 40:48] = 1
    model.denoiser = KnowsTheDefect(model.encode(defective) - model.encode(normal))
    seen = model.inspect(defective)
    scale = model.schedule.scales[model.schedule.timesteps[0]]
    assert scale == pytest.approx(1, abs=2e-5)
    torch.testing.assert_close(seen.correction, model.decode(model.encode(normal)), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen.reconstruction, model.decode(model.encode(defective)))
    assert seen.anomaly_map.shape == (2, 1, 64, 96)
    row, column = divmod(int(seen.anomaly_map[0, 0].argmax()), 96)
    assert 14 <= row < 26
    assert 38 <= column < 50
    assert torch.equal(seen.pred_score, seen.anomaly_map.amax((1, 2, 3)))
    assert seen.anomaly_map[0, 0, 50:, :20].max() < 1e-3 * seen.pred_score[0]


def test_an_untrained_model_corrects_nothing() -> None:
    model = DeCoDiffModel(PLAIN, (64, 96)).eval()
    seen = model.inspect(images())
    assert torch.equal(seen.correction, seen.reconstruction)
    assert seen.pred_score.max() == 0


@pytest.mark.parametrize("corruption", ["patches", "defects"])
def test_loss_of_an_untrained_model_is_the_energy_of_the_deviation(corruption: str) -> None:
    """Its prediction is 0, so the loss must be the mean square of what it should have predicted; it also repeats."""
    model = DeCoDiffModel(replace(PLAIN, corruption=corruption), (64, 96))
    losses = [model.training_loss(images(), generator=torch.Generator().manual_seed(s)).item() for s in (0, 0, 1)]
    assert losses[0] > 0
    if corruption == "patches":
        assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_latents_have_unit_variance_on_the_images_they_were_fitted_to() -> None:
    model = DeCoDiffModel(PRESETS["balanced"], (64, 96))
    coarse = torch.randn(8, 3, 4, 6, generator=torch.Generator().manual_seed(0)) / 3
    smooth = torch.nn.functional.interpolate(coarse, size=(64, 96), mode="bicubic")
    model.fit_latents(smooth, torch.Generator().manual_seed(0))
    latents = model.encode(smooth)
    assert latents.shape[1] == model.codec.latent_channels + model.features.channels
    assert latents.std((0, 2, 3)).max() < 1.05
    assert latents[:, 0].std() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(model.decode(latents), model.codec.decode(model.codec.encode(smooth)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(250, 256), (0, 32)])
def test_sizes_that_do_not_fit(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be multiples of 32 pixels, such as"):
        DeCoDiffModel(PLAIN, size)
