"""Transfer of weights to a network with other categories."""

import pytest
import torch

from decodiff_anomalib.denoiser import DenoiserSize
from decodiff_anomalib.weights import transfer


@pytest.mark.parametrize("num_categories", [2, 3, 5])
def test_rows_are_copied_by_position_without_names(num_categories: int, make_denoiser) -> None:
    source, target = make_denoiser(3), make_denoiser(num_categories)
    before, shared = target.category_embedding.weight.detach().clone(), min(3, num_categories)
    transfer(source, target)
    assert torch.equal(target.category_embedding.weight[:shared], source.category_embedding.weight[:shared])
    assert torch.equal(target.category_embedding.weight[shared:], before[shared:])
    for key, tensor in source.unet.state_dict().items():
        assert torch.equal(target.unet.state_dict()[key], tensor)


def test_rows_are_copied_by_name(make_denoiser) -> None:
    source, target = make_denoiser(3), make_denoiser(3)
    old, before = source.category_embedding.weight, target.category_embedding.weight.detach().clone()
    transfer(source, target, ("a", "b", "c"), ("c", "new", "a"))
    assert torch.equal(target.category_embedding.weight, torch.stack([old[2], before[1], old[0]]))


def test_target_shares_no_memory_with_its_source(make_denoiser) -> None:
    source, target = make_denoiser(), make_denoiser()
    transfer(source, target)
    assert all(parameter.requires_grad for parameter in target.parameters())
    copied, original = target.state_dict(), source.state_dict()
    assert all(copied[key].data_ptr() != original[key].data_ptr() for key in original)


def test_latents_of_other_channels_are_refused(make_denoiser) -> None:
    with pytest.raises(ValueError, match="latents of 4 channels, the model's have 48"):
        transfer(make_denoiser(), make_denoiser(latent_channels=48))


def test_another_size_is_refused(make_denoiser) -> None:
    wide = DenoiserSize(64, 8, 16, layers=1, multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match=r"block_out_channels=\(32, 32, 32\) of the weights is \(64, 64, 64\)"):
        transfer(make_denoiser(), make_denoiser(size=wide))


def test_other_heads_are_refused_even_if_every_tensor_fits(make_denoiser) -> None:
    other = DenoiserSize(32, 16, 16, layers=1, multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match=r"attention_head_dim=\(4, 4, 4\) of the weights is \(2, 2, 2\)"):
        transfer(make_denoiser(), make_denoiser(size=other))
