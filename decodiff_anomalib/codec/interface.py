"""The interface of every codec."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn


class Codec(nn.Module, ABC):
    """A frozen module between images and latents.

    Attributes:
        latent_channels: Channels ``C`` of the latents.
        downsample_factor: Pixels of a side that become one latent pixel.
        spec: Plain data from which :func:`decodiff_anomalib.codec.build_codec` rebuilds the architecture.
    """

    latent_channels: int
    downsample_factor: int
    spec: str | dict[str, Any]

    @abstractmethod
    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Latents ``(B, C, h, w)``, about unit variance, of ``images`` ``(B, 3, H, W)`` in [-1, 1].

        Args:
            images: ``(B, 3, H, W)``.
            generator: Where codecs sample from a distribution, the source of randomness; ``None`` takes its mean.
        """

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 3, H, W)``, about [-1, 1], not clamped, of ``latents`` ``(B, C, h, w)``."""
