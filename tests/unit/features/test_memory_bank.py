"""Memory banks: nearest-neighbour distances and the coreset, against torch.cdist."""

import pytest
import torch

from decodiff_anomalib.features import MemoryBank, VisualFeatures
from decodiff_anomalib.features.memory_bank import greedy_coreset


@pytest.fixture(scope="module")
def memory_bank(backbone: VisualFeatures, features: torch.Tensor, rows: dict[int, slice]) -> MemoryBank:
    memory_bank = MemoryBank(backbone.stride_channels, num_categories=2)
    for row, chosen in rows.items():
        memory_bank.fit(row, features[chosen], torch.Generator().manual_seed(0))
    return memory_bank


def test_map_is_the_distance_to_the_nearest_entry_of_the_category(
    backbone: VisualFeatures, memory_bank: MemoryBank, features: torch.Tensor
) -> None:
    for category in (0, 1, 2):
        directions = torch.cat([part / part.norm(dim=1, keepdim=True) for part in features.split([40, 112], 1)], 1)
        centered = directions.movedim(1, -1) - memory_bank.center[category, :, 0]
        whitened = centered @ memory_bank.whitening[category].T
        expected = torch.cdist(whitened.flatten(0, -2), memory_bank.bank[category]).amin(1).view(12, 1, 8, 8)
        found = memory_bank(features, torch.full((12,), category))
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-3)
    own, other, pooled = (memory_bank(features[:6], torch.full((6,), category)).mean() for category in (0, 1, 2))
    assert other > 1.5 * own
    assert pooled < other
    noise = backbone(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).round() * 2 - 1)
    distance = memory_bank(noise, torch.tensor([0]))
    assert distance.mean() > 2 * own
    torch.testing.assert_close(memory_bank(3 * noise, torch.tensor([0])), distance)  # only directions count


def test_the_coreset_covers_all_features(memory_bank: MemoryBank) -> None:
    """Its worst-covered point is nearer than with a random subset."""
    points = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    chosen = greedy_coreset(points, 50)
    assert len(set(chosen)) == 50
    covered, at_random = (torch.cdist(points, points[index]).amin(1).max() for index in (chosen, slice(50)))
    assert covered < 0.75 * at_random
    assert len(memory_bank.bank[0].unique(dim=0)) == 6 * 8 * 8  # fewer positions than entries: all of them are kept


def test_squared_norms_of_a_memory_bank_are_computed_when_it_is_loaded() -> None:
    bank, restored = MemoryBank([2, 3], 2), MemoryBank([2, 3], 2)
    bank.fit(1, torch.randn(4, 5, 8, 8), torch.Generator().manual_seed(0))
    restored.load_state_dict(bank.state_dict())
    assert "bank_energy" not in bank.state_dict()
    torch.testing.assert_close(restored.bank_energy, restored.bank.square().sum(2))
