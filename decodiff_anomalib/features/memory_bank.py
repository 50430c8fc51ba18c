"""A memory bank of normal features, as in PatchCore, and the distance from it.

Reference: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022 (PatchCore): section 3.1 for
locally aware patch features, section 3.2 and algorithm 1 for the coreset. Here features are compared by their direction
in whitened coordinates, and each category has a bank.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from decodiff_anomalib.features.whitening import whitening_matrix

BANK_SIZE, BANK_CANDIDATES = 1000, 10_000


class MemoryBank(nn.Module):
    """Nearest-neighbour distance of visual features from those of normal images.

    Only the direction of the features of each stride is compared. Their norm follows the local contrast, which varies
    more between normal images than it tells of defects.

    Args:
        stride_channels: Features per position of each stride, ``F`` in total.
        num_categories: ``K``; row ``K`` of each table is fitted to all categories and serves unknown images.
    """

    def __init__(self, stride_channels: Sequence[int], num_categories: int) -> None:
        super().__init__()
        self.stride_channels = list(stride_channels)
        features, rows = sum(stride_channels), num_categories + 1
        self.products = MatrixProduct()
        self.center: torch.Tensor
        self.whitening: torch.Tensor
        self.bank: torch.Tensor
        self.bank_energy: torch.Tensor
        self.register_buffer("center", torch.zeros(rows, features, 1))
        self.register_buffer("whitening", torch.eye(features).repeat(rows, 1, 1))
        self.register_buffer("bank", torch.zeros(rows, BANK_SIZE, features))
        self.register_buffer("bank_energy", torch.zeros(rows, BANK_SIZE), persistent=False)

    def forward(self, features: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Distance ``(B, 1, h, w)`` to the nearest entry of the category's bank, in whitened directions, at least 0.

        Args:
            features: ``(B, F, h, w)``.
            category: Category index ``(B,)``; ``K`` compares with the bank of all categories.
        """
        directions = self._directions(features).flatten(2)
        whitened = self.whitening[category] @ (directions - self.center[category])
        # The nearest entry minimises |a - b|^2 - |a|^2, a matrix product: torch.cdist has no ONNX counterpart. Its
        # distance is computed again from the difference, because |a|^2 + |b|^2 - 2ab loses its digits to cancellation
        # in half precision and integers.
        products = self.products(self.bank[category], -2 * whitened)
        nearest = self.bank[category[:, None], (products + self.bank_energy[category][:, :, None]).argmin(1)]
        return torch.linalg.vector_norm(whitened.mT - nearest, dim=2)[:, None].unflatten(2, features.shape[-2:])

    @torch.no_grad()
    def fit(self, row: int, features: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Fill the bank of one category with a coreset of the features of normal images.

        Args:
            row: Category index; -1 is the row of all categories.
            features: ``(N, F, h, w)``.
            generator: Draws the candidates of the coreset, on the CPU.
        """
        directions = self._directions(features).movedim(1, -1).flatten(0, -2)
        self.center[row], self.whitening[row] = directions.mean(0)[:, None], whitening_matrix(directions)
        drawn = torch.randint(len(directions), (BANK_CANDIDATES,), generator=generator).to(features.device)
        candidates = (directions[drawn] - directions.mean(0)) @ self.whitening[row].T
        self.bank[row] = candidates[greedy_coreset(candidates, BANK_SIZE)]
        self._update_energy()

    def _directions(self, features: torch.Tensor) -> torch.Tensor:
        """Features ``(B, F, h, w)`` with those of each stride scaled to unit length."""
        return torch.cat([F.normalize(part, dim=1) for part in features.split(self.stride_channels, dim=1)], dim=1)

    def _update_energy(self) -> None:
        self.bank_energy.copy_(self.bank.square().sum(2))

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._update_energy()


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
