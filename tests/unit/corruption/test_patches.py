"""Random corruption by its stated properties; worked examples are in ``tests/parity``."""

import pytest
import torch

from decodiff_anomalib.corruption import corrupt_latents, patch_size_probabilities, random_patch_mask, shuffle_patches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mask_corrupts_whole_patches_up_to_the_ratio() -> None:
    mask = random_patch_mask(200, (16, 16), 4, 0.7, generator=generator())
    assert mask.shape == (200, 1, 16, 16)
    cells = mask.view(200, 4, 4, 4, 4).transpose(2, 3).flatten(3)
    assert (cells.amin(-1) == cells.amax(-1)).all()
    corrupted = 1 - mask.mean((1, 2, 3))
    assert corrupted.min() > 0
    assert corrupted.max() <= 0.7 + 1 / 16  # truncation rounds the kept number down
    assert corrupted.mean() == pytest.approx(0.35 + 0.5 / 16, abs=0.03)


def test_shuffle_permutes_whole_patches_of_the_batch() -> None:
    latents = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
    shuffled = shuffle_patches(latents, 4, generator=generator())

    def as_patches(batch: torch.Tensor) -> set[tuple[float, ...]]:
        patches = batch.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        return {tuple(patch.flatten().tolist()) for patch in patches}

    assert as_patches(shuffled) == as_patches(latents)
    identity = torch.arange(8)
    assert torch.equal(shuffle_patches(latents, 4, permutation=identity), latents)


def test_corruption_repeats_with_the_seed() -> None:
    latents = torch.randn(4, 4, 32, 32)
    first, second = (corrupt_latents(latents, generator=generator(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = corrupt_latents(latents, generator=generator(8))
    assert not torch.equal(first[0], other[0])


def test_content_is_gaussian_or_from_the_batch() -> None:
    latents = torch.full((8, 4, 32, 32), 5.0)
    noise, _ = corrupt_latents(latents, max_noise_ratio=1.0, generator=generator())
    shuffled = noise == 5
    assert 0.2 < shuffled.float().mean() < 0.8
    assert noise[~shuffled].std() == pytest.approx(1, abs=0.05)


def test_patch_sizes_always_divide_the_latents() -> None:
    for height, width in ((4, 4), (28, 28), (40, 40), (36, 36), (32, 48), (64, 64)):
        table = patch_size_probabilities(height, width)
        assert sum(table.values()) == pytest.approx(1)
        assert all(height % patch == 0 and width % patch == 0 for patch in table)
    with pytest.raises(ValueError, match="larger image_size"):
        patch_size_probabilities(1, 8)
