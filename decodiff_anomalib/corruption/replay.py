"""A replay buffer of recent training samples: drawing and encoding a defect costs more than a step on it."""

from collections.abc import Sequence
from typing import Any

import torch


class ReplayBuffer:
    """The most recent samples of latents, their deviations and references, kept in half precision.

    Args:
        capacity: Samples kept; the oldest is overwritten.
    """

    def __init__(self, capacity: int = 128) -> None:
        self.capacity = capacity
        self._samples: list[tuple[list[torch.Tensor], torch.Tensor]] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._samples)

    def state_dict(self) -> dict[str, Any]:
        """All samples, for a checkpoint."""
        return {"samples": self._samples, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the samples of :meth:`state_dict`."""
        self._samples, self._next = list(state["samples"]), state["next"]

    def exchange(
        self,
        latents: Sequence[torch.Tensor],
        category: torch.Tensor,
        batch_size: int,
        generator: torch.Generator | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Add fresh samples and return them together with older ones drawn at random.

        Args:
            latents: What a sample consists of, each ``(F, C, h, w)``.
            category: Category indices ``(F,)`` of the fresh samples.
            batch_size: Samples to return, at least ``F``.
            generator: Source of randomness, on the CPU.

        Returns:
            tuple[list[torch.Tensor], torch.Tensor]: The same, each ``(batch_size, C, h, w)``, and category indices
            ``(batch_size,)``; the fresh samples come first.
        """
        for index, own in enumerate(category):
            sample = [part[index].half() for part in latents], own
            if len(self._samples) < self.capacity:
                self._samples.append(sample)
            else:
                self._samples[self._next] = sample
            self._next = (self._next + 1) % self.capacity
        drawn = torch.randint(len(self._samples), (batch_size - len(category),), generator=generator).tolist()
        older = [self._samples[index] for index in drawn]
        together = [
            torch.cat([part, *(sample[0][position][None].to(part) for sample in older)])
            for position, part in enumerate(latents)
        ]
        return together, torch.cat([category, *(sample[1][None] for sample in older)])
