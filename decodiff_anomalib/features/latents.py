"""Visual features as latents."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from decodiff_anomalib.features.whitening import whitening_matrix

MAX_COMPONENTS = 256
MAX_POSITIONS = 65_536  # of which the components are computed


class FeatureLatents(nn.Module):
    """Principal components of the direction of visual features, whitened separately for each category.

    Only the direction of the features of each layer counts. Their norm follows the local contrast, which varies more
    between normal images than it tells of defects.

    Args:
        layer_channels: Features per position of each layer, ``F`` in total.
        num_categories: ``K``; row ``K`` of each table is fitted to all categories and serves unknown images.

    Attributes:
        channels: Components kept, ``F`` or at most 256.
    """

    def __init__(self, layer_channels: Sequence[int], num_categories: int) -> None:
        super().__init__()
        self.layer_channels = list(layer_channels)
        features = sum(layer_channels)
        self.channels = min(features, MAX_COMPONENTS)
        self.center: torch.Tensor
        self.projection: torch.Tensor
        self.register_buffer("center", torch.zeros(num_categories + 1, features, 1))
        self.register_buffer("projection", torch.eye(self.channels, features).repeat(num_categories + 1, 1, 1))

    def forward(self, features: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Latents ``(B, channels, h, w)``, about unit variance.

        Args:
            features: ``(B, F, h, w)``.
            category: Category index ``(B,)``, in ``[0, K]``.
        """
        centered = self._directions(features).flatten(2) - self.center[category]
        return (self.projection[category] @ centered).unflatten(2, features.shape[-2:])

    @torch.no_grad()
    def fit(self, row: int, features: torch.Tensor) -> None:
        """Fit the components of one category.

        Args:
            row: Category index; -1 is the row of all categories.
            features: Of normal images, ``(N, F, h, w)``.
        """
        flat = self._directions(features).movedim(1, -1).flatten(0, -2)
        flat = flat[:: -(-len(flat) // MAX_POSITIONS)]
        self.center[row], self.projection[row] = flat.mean(0)[:, None], whitening_matrix(flat, self.channels)

    def _directions(self, features: torch.Tensor) -> torch.Tensor:
        """Features ``(B, F, h, w)`` with those of each layer scaled to unit length."""
        return torch.cat([F.normalize(part, dim=1) for part in features.split(self.layer_channels, dim=1)], dim=1)
