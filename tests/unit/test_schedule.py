"""The schedule against closed forms; the recorded tables are in ``tests/parity``."""

import pytest
import torch

from decodiff_anomalib.schedule import DeviationSchedule


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("num_steps", range(1, 11))
def test_every_step_count_undoes_the_deviation_it_starts_from(num_steps: int, spacing: str) -> None:
    schedule = DeviationSchedule(num_inference_steps=num_steps, timestep_spacing=spacing)
    timesteps = schedule.timesteps.tolist()
    assert len(set(timesteps)) == num_steps
    assert timesteps == sorted(timesteps, reverse=True)
    assert all(0 <= timestep < 10 for timestep in timesteps)

    clean, deviation = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    latents = schedule.deviate(clean, deviation, torch.full((2,), timesteps[0]))
    for index in range(num_steps):
        latents = schedule.step(latents, deviation, index)  # an oracle that predicts the deviation exactly
    torch.testing.assert_close(latents, clean, atol=1e-5, rtol=0)


def test_trailing_starts_at_full_strength() -> None:
    for num_steps in range(1, 11):
        schedule = DeviationSchedule(num_inference_steps=num_steps, timestep_spacing="trailing")
        assert schedule.timesteps[0] == 9
        assert schedule.scales[9] == pytest.approx(1, abs=2e-5)


def test_two_forms_of_the_forward_process_agree() -> None:
    schedule = DeviationSchedule()
    latents, noise = torch.randn(10, 4, 8, 8), torch.randn(10, 4, 8, 8)
    mask, timesteps = (torch.rand(10, 8, 8) < 0.5).float(), torch.arange(10)
    signal = schedule.alphas_cumprod.sqrt().float().view(-1, 1, 1, 1)
    scale = (1 - schedule.alphas_cumprod).sqrt().float().view(-1, 1, 1, 1)
    keep = mask[:, None]
    expected = keep * latents + (1 - keep) * (signal * latents + scale * noise)
    torch.testing.assert_close(schedule.corrupt(latents, noise, mask, timesteps), expected, atol=2e-6, rtol=0)
    target = schedule.target(latents, noise, mask, timesteps)
    assert (target * keep == 0).all()


@pytest.mark.parametrize("arguments", [{"num_inference_steps": 0}, {"num_inference_steps": 11}])
def test_step_count_out_of_range(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must be between 1 and 10"):
        DeviationSchedule(**arguments)


def test_unknown_spacing() -> None:
    with pytest.raises(ValueError, match="valid: 'leading', 'trailing'"):
        DeviationSchedule(timestep_spacing="linspace")
