"""Visual features as latent channels."""

import torch
from torch import nn

from decodiff_anomalib.features.whitening import whitening_matrix


class FeatureLatents(nn.Module):
    """Leading principal components of visual features, whitened separately for each category.

    Args:
        features: Features per position, ``F``.
        num_categories: ``K``; row ``K`` of each table is fitted to all categories and serves unknown images.
        channels: Principal components kept as latents.
    """

    def __init__(self, features: int, num_categories: int, channels: int = 32) -> None:
        super().__init__()
        self.channels = channels
        self.center: torch.Tensor
        self.projection: torch.Tensor
        self.register_buffer("center", torch.zeros(num_categories + 1, features, 1))
        self.register_buffer("projection", torch.eye(channels, features).repeat(num_categories + 1, 1, 1))

    def forward(self, features: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Latents ``(B, channels, h, w)``, about unit variance.

        Args:
            features: ``(B, F, h, w)``.
            category: Category index ``(B,)``, in ``[0, K]``.
        """
        centered = features.flatten(2) - self.center[category]
        return (self.projection[category] @ centered).unflatten(2, features.shape[-2:])

    @torch.no_grad()
    def fit(self, row: int, features: torch.Tensor) -> None:
        """Fit the components of one category.

        Args:
            row: Category index; -1 is the row of all categories.
            features: Of normal images, ``(N, F, h, w)``.
        """
        flat = features.movedim(1, -1).flatten(0, -2)
        self.center[row], self.projection[row] = flat.mean(0)[:, None], whitening_matrix(flat, self.channels)
