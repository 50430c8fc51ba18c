"""The UNet: its conditioning, and the folded copy for inference; the published sizes are in ``tests/parity``."""

import pytest
import torch

from decodiff_anomalib.denoiser import DENOISER_SIZES, Denoiser, DenoiserSize, FoldedDenoiser, build_denoiser

SMALL = {"width": 16, "head_channels": 8, "context_width": 12, "layers": 1, "norm_groups": 4, "dropout": 0.0}


def randomised(**changes: object) -> Denoiser:
    """A small denoiser of three categories whose weights are all random: a new one predicts 0."""
    denoiser = build_denoiser({**SMALL, **changes}, latent_channels=4, num_categories=3).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return denoiser


def latents() -> torch.Tensor:
    return torch.randn(4, 4, 8, 12, generator=torch.Generator().manual_seed(1))


def test_a_new_denoiser_predicts_no_deviation() -> None:
    denoiser = build_denoiser("nano", latent_channels=4, num_categories=2)
    assert (denoiser(latents(), torch.tensor([0, 3, 6, 9]), torch.tensor([0, 1, 2, 0])) == 0).all()


@pytest.mark.parametrize("modulated", [False, True])
def test_timestep_and_category_matter(modulated: bool) -> None:
    denoiser, zeros = randomised(modulated=modulated), torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        first = denoiser(latents(), 9, zeros)
        assert torch.equal(first, denoiser(latents(), torch.full((4,), 9), zeros))
        assert (first - denoiser(latents(), 2, zeros)).abs().max() > 1e-4
        assert (first - denoiser(latents(), 9, zeros + 1)).abs().max() > 1e-4


def test_an_unknown_category_is_the_mean_of_the_tokens() -> None:
    denoiser = randomised()
    tokens = denoiser.tokens()
    assert tokens.shape == (4, 12)
    torch.testing.assert_close(tokens[3], denoiser.category_embedding.weight.mean(0))


@pytest.mark.parametrize("attention", [(True, True, True), (False, False, True), (False, False)])
@pytest.mark.parametrize("modulated", [False, True])
def test_the_folded_denoiser_predicts_the_same_with_less(modulated: bool, attention: tuple[bool, ...]) -> None:
    denoiser = randomised(modulated=modulated, attention=attention, multipliers=(1, 2, 4)[: len(attention)])
    folded, category = FoldedDenoiser(denoiser, [9, 2]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        for timestep in (9, 2):
            expected = denoiser(latents(), timestep, category)
            torch.testing.assert_close(folded(latents(), timestep, category), expected, atol=1e-5, rtol=1e-5)
    left = {name.split(".", 2)[2] for name, _ in folded.named_parameters()}
    assert not [name for name in left if "attn2" in name or "time_embedding" in name or "class_embedding" in name]


def test_sizes_by_name_fields_and_instance_are_the_same() -> None:
    size = DenoiserSize(**SMALL)
    by_fields, by_instance = (build_denoiser(given).state_dict() for given in (SMALL, size))
    assert {name: tensor.shape for name, tensor in by_fields.items()} == {
        name: tensor.shape for name, tensor in by_instance.items()
    }
    gated = build_denoiser("nano", 944, out_channels=7)
    assert sum(parameter.numel() for parameter in gated.parameters()) == pytest.approx(1.4e6, rel=0.05)
    assert gated(torch.zeros(1, 944, 8, 8), 9, torch.tensor([0])).shape == (1, 7, 8, 8)
    with pytest.raises(ValueError, match=f"denoiser='huge' is unknown; valid: {', '.join(DENOISER_SIZES)}"):
        build_denoiser("huge")


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
    modulated = DenoiserSize(16, 8, 12, norm_groups=4, modulated=True)
    for size, kept in {modulated: ".time_emb_proj.", DenoiserSize(16, 8, 12, norm_groups=4): None}.items():
        denoiser = random_denoiser(size)
        folded = FoldedDenoiser(denoiser, [9, 4])
        addresses = {parameter.data_ptr() for parameter in denoiser.parameters()}
        assert {parameter.data_ptr() for parameter in folded.parameters()} < addresses
        names = {name.split(".", 2)[2] for name, _ in folded.named_parameters(remove_duplicate=False)}
        embedding = [name for name in names if "emb" in name]
        assert all(kept and kept in name for name in embedding)
        assert not [name for name in names if "attn2" in name]
        assert any("attn1" in name for name in names)
