"""A replay buffer of recent training samples: drawing and encoding a defect costs more than a step on it."""

import torch


class ReplayBuffer:
    """The most recent samples of clean latents and their deviations, kept in half precision.

    Args:
        capacity: Samples kept; the oldest is overwritten.
    """

    def __init__(self, capacity: int = 512) -> None:
        self.capacity = capacity
        self._samples: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._samples)

    def exchange(
        self,
        latents: torch.Tensor,
        deviation: torch.Tensor,
        category: torch.Tensor,
        batch_size: int,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Add fresh samples and return them together with older ones drawn at random.

        Args:
            latents: Fresh clean latents ``(F, C, h, w)``.
            deviation: Their deviations ``(F, C, h, w)``.
            category: Their category indices ``(F,)``.
            batch_size: Samples to return, at least ``F``.
            generator: Source of randomness, on the CPU.

        Returns:
            tuple[torch.Tensor, torch.Tensor, torch.Tensor]: Latents and deviations ``(batch_size, C, h, w)``, category
            indices ``(batch_size,)``; the fresh samples come first.
        """
        for sample in zip(latents.half(), deviation.half(), category, strict=True):
            if len(self._samples) < self.capacity:
                self._samples.append(sample)
            else:
                self._samples[self._next] = sample
            self._next = (self._next + 1) % self.capacity
        drawn = torch.randint(len(self._samples), (batch_size - len(latents),), generator=generator).tolist()
        older = [self._samples[index] for index in drawn]
        return (
            torch.cat([latents, *(sample[0][None].to(latents) for sample in older)]),
            torch.cat([deviation, *(sample[1][None].to(deviation) for sample in older)]),
            torch.cat([category, *(sample[2][None] for sample in older)]),
        )
