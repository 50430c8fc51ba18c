"""Memory banks: nearest neighbours and the coreset, against torch.cdist."""

import pytest
import torch

from decodiff_anomalib.features import MemoryBank
from decodiff_anomalib.features.memory_bank import greedy_coreset


def latents(seed: int = 0) -> torch.Tensor:
    """Two categories of six images each, the second around another mean."""
    points = torch.randn(12, 5, 8, 8, generator=torch.Generator().manual_seed(seed))
    points[6:] += 3
    return points


@pytest.fixture(scope="module")
def memory_bank(rows: dict[int, slice]) -> MemoryBank:
    memory_bank = MemoryBank(5, num_categories=2, entries=500)
    for row, chosen in rows.items():
        memory_bank.fit(row, latents()[chosen], torch.Generator().manual_seed(0))
    return memory_bank


def test_references_are_the_nearest_entries_of_the_category(memory_bank: MemoryBank) -> None:
    new, distance = latents(1), []
    for category in (0, 1, 2):
        flat = new.movedim(1, -1).flatten(0, -2)
        nearest = torch.cdist(flat, memory_bank.bank[category]).argmin(1)
        expected = memory_bank.bank[category, nearest].unflatten(0, (12, 8, 8)).movedim(-1, 1)
        found = memory_bank(new, torch.full((12,), category))
        torch.testing.assert_close(found, expected)
        distance.append((found - new).norm(dim=1)[:6].mean())
    own, other, pooled = distance
    assert other > 2 * own
    assert pooled < other


def test_the_coreset_covers_all_features(memory_bank: MemoryBank) -> None:
    """Its worst-covered point is nearer than with a random subset."""
    points = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    chosen = greedy_coreset(points, 50)
    assert len(set(chosen)) == 50
    covered, at_random = (torch.cdist(points, points[index]).amin(1).max() for index in (chosen, slice(50)))
    assert covered < 0.75 * at_random
    assert len(memory_bank.bank[0].unique(dim=0)) == 6 * 8 * 8  # fewer positions than entries: all of them are kept


def test_squared_norms_of_a_memory_bank_are_computed_when_it_is_loaded() -> None:
    bank, restored = MemoryBank(5, 2, 10), MemoryBank(5, 2, 10)
    bank.fit(1, torch.randn(4, 5, 8, 8), torch.Generator().manual_seed(0))
    bank.add(1, torch.randn(4, 5, 8, 8), torch.Generator().manual_seed(1))
    restored.load_state_dict(bank.state_dict())
    assert "bank_energy" not in bank.state_dict()
    torch.testing.assert_close(restored.bank_energy, restored.bank.square().sum(2))
    torch.testing.assert_close(bank.bank_energy, restored.bank_energy)
