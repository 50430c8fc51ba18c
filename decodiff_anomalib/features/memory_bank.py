"""A memory bank of normal latents, as in PatchCore, which gives each position a normal reference.

Reference: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022 (PatchCore), section 3.2 and
algorithm 1 for the coreset. Here each category has a bank, of whitened latents.
"""

import torch
from torch import nn

BANK_CANDIDATES = 10_000


class MemoryBank(nn.Module):
    """The nearest of the normal latents of a category.

    Args:
        channels: Of the latents, ``C``.
        num_categories: ``K``; row ``K`` of each table is fitted to all categories and serves unknown images.
        entries: Latents kept of each category.
    """

    def __init__(self, channels: int, num_categories: int, entries: int) -> None:
        super().__init__()
        rows = num_categories + 1
        self.products = MatrixProduct()
        self.bank: torch.Tensor
        self.bank_energy: torch.Tensor
        self.register_buffer("bank", torch.zeros(rows, entries, channels))
        self.register_buffer("bank_energy", torch.zeros(rows, entries), persistent=False)

    def forward(self, latents: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """The nearest entry ``(B, C, h, w)`` of the category's bank for each position.

        Args:
            latents: ``(B, C, h, w)``.
            category: Category index ``(B,)``; ``K`` searches the bank of all categories.
        """
        # The nearest entry minimises |a - b|^2 - |a|^2, a matrix product: torch.cdist has no ONNX counterpart.
        products = self.products(-2 * latents.flatten(2).mT, self.bank[category].mT)
        index = (products + self.bank_energy[category][:, None]).argmin(2)
        nearest = self.bank[category[:, None], index]
        return nearest.mT.unflatten(2, latents.shape[-2:])

    @torch.no_grad()
    def fit(self, row: int, latents: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Fill the bank of one category with a coreset of the latents of normal images.

        Args:
            row: Category index; -1 is the row of all categories.
            latents: ``(N, C, h, w)``.
            generator: Draws the candidates of the coreset, on the CPU.
        """
        candidates = _draw(latents, generator)
        self.bank[row] = candidates[greedy_coreset(candidates, self.bank.shape[1])]
        self._update_energy()

    @torch.no_grad()
    def add(self, row: int, latents: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Replace the entries of one category that others make needless by latents of further normal images.

        Args:
            row: As in :meth:`fit`.
            latents: As in :meth:`fit`.
            generator: As in :meth:`fit`.
        """
        candidates = torch.cat([self.bank[row], _draw(latents, generator)])
        self.bank[row] = candidates[greedy_coreset(candidates, self.bank.shape[1])]
        self._update_energy()

    def _update_energy(self) -> None:
        self.bank_energy.copy_(self.bank.square().sum(2))

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._update_energy()


def _draw(latents: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Candidates of a coreset ``(BANK_CANDIDATES, C)`` from latents ``(N, C, h, w)``."""
    positions = latents.movedim(1, -1).flatten(0, -2)
    drawn = torch.randint(len(positions), (BANK_CANDIDATES,), generator=generator)
    return positions[drawn.to(latents.device)]


class MatrixProduct(nn.Module):
    """A matrix product as a module, which quantisation of an export finds by its name."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b``."""
        return a @ b


def greedy_coreset(points: torch.Tensor, count: int) -> list[int]:
    """Indices of ``count`` points ``(N, F)`` by farthest-point sampling (PatchCore, algorithm 1).

    Anomalib's ``KCenterGreedy`` draws its first point from the global random state, so that a fit would not repeat.
    """
    chosen, distance = [0], torch.full_like(points[:, 0], float("inf"))
    while len(chosen) < count:
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
        chosen.append(int(distance.argmax()))
    return chosen
