"""The replay buffer: what it returns, keeps and forgets."""

import torch

from decodiff_anomalib.corruption import ReplayBuffer


def exchange(buffer: ReplayBuffer, first: int, count: int, batch_size: int, seed: int = 0) -> list[int]:
    """Add samples numbered from ``first``; the numbers of the returned ones."""
    numbers = torch.arange(first, first + count)
    values = numbers.float().view(-1, 1, 1, 1).expand(-1, 2, 4, 4)
    (latents, deviation), category = buffer.exchange(
        [values, -values], numbers, batch_size, torch.Generator().manual_seed(seed)
    )
    assert latents.shape == deviation.shape == (batch_size, 2, 4, 4)
    assert torch.equal(latents, -deviation)
    assert torch.equal(latents[:, 0, 0, 0].long(), category)
    return category.tolist()


def test_fresh_samples_come_first_and_older_ones_fill_the_batch() -> None:
    buffer = ReplayBuffer(capacity=8)
    assert exchange(buffer, 0, 4, batch_size=4) == [0, 1, 2, 3]
    returned = exchange(buffer, 4, 2, batch_size=20)
    assert returned[:2] == [4, 5]
    assert set(returned[2:]) == set(range(6))
    assert len(buffer) == 6


def test_the_oldest_samples_are_overwritten() -> None:
    buffer = ReplayBuffer(capacity=4)
    for first in (0, 3, 6):
        exchange(buffer, first, 3, batch_size=3)
    assert len(buffer) == 4
    assert set(exchange(buffer, 9, 1, batch_size=60)) == {6, 7, 8, 9}


def test_draws_repeat_with_the_seed() -> None:
    first, second, other = (
        [exchange(buffer, 0, 6, 12, seed), exchange(buffer, 6, 2, 30, seed)]
        for buffer, seed in ((ReplayBuffer(), 1), (ReplayBuffer(), 1), (ReplayBuffer(), 2))
    )
    assert first == second != other


def test_a_sample_is_kept_in_half_precision() -> None:
    buffer = ReplayBuffer()
    values = torch.full((1, 1, 2, 2), 1 + 2**-12)
    (fresh,), _ = buffer.exchange([values], torch.zeros(1, dtype=torch.long), 1)
    assert torch.equal(fresh, values)
    (older,), _ = buffer.exchange([torch.zeros_like(values)], torch.zeros(1, dtype=torch.long), 40)
    assert set(older[1:].flatten().tolist()) == {0.0, 1.0}


def test_a_buffer_goes_on_from_its_state() -> None:
    buffer, taken_up = ReplayBuffer(capacity=4), ReplayBuffer(capacity=4)
    exchange(buffer, 0, 6, batch_size=6)
    taken_up.load_state_dict(buffer.state_dict())
    assert exchange(taken_up, 6, 1, batch_size=40) == exchange(buffer, 6, 1, batch_size=40)
