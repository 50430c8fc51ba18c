"""Inference copies, in which everything that does not depend on the images is computed in advance."""

from dataclasses import replace

import pytest
import torch

from decodiff_anomalib.denoiser import Denoiser, DenoiserSize, FoldedDenoiser, build_denoiser
from decodiff_anomalib.features import MemoryBank
from decodiff_anomalib.presets import PRESETS
from decodiff_anomalib.torch_model import DeCoDiffModel


def random_denoiser(size: str | DenoiserSize) -> Denoiser:
    denoiser = build_denoiser(size, latent_channels=6, num_categories=3, sample_size=16).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():  # an untrained one predicts zeros
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return denoiser


@pytest.mark.parametrize("size", ["nano", DenoiserSize(16, 8, 12, norm_groups=4)])
def test_folded_denoiser_gives_the_same_prediction(size: str | DenoiserSize) -> None:
    denoiser = random_denoiser(size)
    folded = FoldedDenoiser(denoiser, [9, 4, 0])
    latents = torch.randn(4, 6, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    category = torch.arange(4)  # the last is unknown
    with torch.no_grad():
        for timestep in (9, 4, 0):
            expected = denoiser(latents, torch.full((4,), timestep), category)
            torch.testing.assert_close(folded(latents, timestep, category), expected, atol=1e-12, rtol=0)


def test_folding_keeps_convolutions_and_self_attention_and_shares_their_weights() -> None:
    for size, kept in {"nano": ".time_emb_proj.", DenoiserSize(16, 8, 12, norm_groups=4): None}.items():
        denoiser = random_denoiser(size)
        folded = FoldedDenoiser(denoiser, [9, 4])
        addresses = {parameter.data_ptr() for parameter in denoiser.parameters()}
        assert {parameter.data_ptr() for parameter in folded.parameters()} < addresses
        names = {name.split(".", 2)[2] for name, _ in folded.named_parameters(remove_duplicate=False)}
        embedding = [name for name in names if "emb" in name]
        assert all(kept and kept in name for name in embedding)
        assert not [name for name in names if "attn2" in name]
        assert any("attn1" in name for name in names)


def test_folded_model_gives_the_same_outputs_and_leaves_the_model_unchanged() -> None:
    settings = PRESETS["balanced"]
    settings = replace(settings, correction=replace(settings.correction, num_steps=3))
    model = DeCoDiffModel(settings, (64, 64), num_categories=2).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
    model.fit(images, torch.tensor([0, 0, 1, 1]), generator)
    for parameter in model.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    with torch.no_grad():
        before = model(images)
        folded = model.folded().requires_grad_(requires_grad=False)
        for folded_output, output in zip(folded(images), before, strict=True):
            torch.testing.assert_close(folded_output, output, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(images).anomaly_map, before.anomaly_map)
    assert all(parameter.requires_grad for parameter in model.denoiser.parameters())


def test_squared_norms_of_a_memory_bank_are_computed_when_it_is_loaded() -> None:
    bank, restored = MemoryBank([2, 3], 2), MemoryBank([2, 3], 2)
    bank.fit(1, torch.randn(4, 5, 8, 8), torch.Generator().manual_seed(0))
    restored.load_state_dict(bank.state_dict())
    assert "bank_energy" not in bank.state_dict()
    torch.testing.assert_close(restored.bank_energy, restored.bank.square().sum(2))
