"""Groups of latents on grids of their own, in one tensor."""

import torch

from decodiff_anomalib.latent_groups import LatentGroup, LatentGroups

GROUPS = LatentGroups({"coarse": LatentGroup(3), "fine": LatentGroup(2, cells=2)})


def test_groups_are_joined_without_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {
        "coarse": torch.randn(2, 3, 4, 6, generator=generator),
        "fine": torch.randn(2, 2, 8, 12, generator=generator),
    }
    joined = GROUPS.join(parts)
    assert joined.shape == (2, GROUPS.channels, 4, 6) == (2, 11, 4, 6)
    for name, part in GROUPS.split(joined).items():
        assert torch.equal(part, parts[name])


def test_a_value_of_each_cell_is_spread_over_the_channels_of_its_group() -> None:
    gates = torch.arange(5.0).view(1, 5, 1, 1)
    parts = GROUPS.split(GROUPS.spread(gates))
    assert torch.equal(parts["coarse"], torch.zeros(1, 3, 1, 1))
    assert torch.equal(parts["fine"], torch.tensor([[1.0, 2], [3, 4]]).expand(1, 2, 2, 2))
