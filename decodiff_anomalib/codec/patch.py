"""The bundled codec: a whitened patch transform refined by two small convolutional branches.

Every 8x8 patch becomes one latent vector. The straight path is linear and starts as the principal components of
natural patches (each latent channel scaled to unit variance); the residual branches, which see neighbouring patches,
are learned by ``python -m decodiff_anomalib.codec.train``. All convolutions run on the patch grid, which is what makes
the codec about fifty times cheaper than a Stable-Diffusion autoencoder.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F  # noqa: N812

PATCH_SIZE = 8
WEIGHTS = Path(__file__).with_name("patch_codec.safetensors")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an activation, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Refine ``hidden`` ``(B, width, h, w)``; same shape out."""
        return hidden + self.conv2(F.silu(self.conv1(F.silu(hidden))))


def _branch(in_channels: int, width: int, depth: int, out_channels: int) -> nn.Sequential:
    out = nn.Conv2d(width, out_channels, 1)
    nn.init.zeros_(out.weight)  # the codec starts as its linear path, exactly
    nn.init.zeros_(out.bias)
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 1), *(ResidualBlock(width) for _ in range(depth)), nn.SiLU(), out
    )


class PatchCodec(nn.Module):
    """Image <-> latents on an 8x8 patch grid.

    Args:
        latent_channels: Channels of the latents.
        width: Channels of the residual branches.
        encoder_depth: Residual blocks of the encoder's branch.
        decoder_depth: Residual blocks of the decoder's branch.
    """

    downsample_factor = PATCH_SIZE
    spec = "bundled"

    def __init__(
        self, latent_channels: int = 32, width: int = 128, encoder_depth: int = 2, decoder_depth: int = 4
    ) -> None:
        super().__init__()
        patch_channels = 3 * PATCH_SIZE**2
        self.latent_channels = latent_channels
        self.analysis = nn.Conv2d(patch_channels, latent_channels, 1)
        self.analysis_branch = _branch(patch_channels, width, encoder_depth, latent_channels)
        self.synthesis = nn.Conv2d(latent_channels, patch_channels, 1)
        self.synthesis_branch = _branch(latent_channels, width, decoder_depth, patch_channels)

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encode ``images`` ``(B, 3, H, W)`` in [-1, 1] to latents ``(B, C, H/8, W/8)`` of about unit variance."""
        del generator  # nothing is random here
        patches = F.pixel_unshuffle(images, PATCH_SIZE)
        return self.analysis(patches) + self.analysis_branch(patches)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode ``latents`` ``(B, C, h, w)`` to images ``(B, 3, 8h, 8w)``, about [-1, 1] (not clamped)."""
        return F.pixel_shuffle(self.synthesis(latents) + self.synthesis_branch(latents), PATCH_SIZE)

    @torch.no_grad()
    def fit_linear_path(self, images: torch.Tensor) -> None:
        """Set the linear path to the whitened principal components of the patches of ``images`` ``(N, 3, H, W)``."""
        patches = F.pixel_unshuffle(images, PATCH_SIZE).movedim(1, -1).flatten(0, -2)
        mean = patches.mean(0)
        covariance = torch.cov(patches.T.double())
        variances, directions = torch.linalg.eigh(covariance)
        variances = variances.flip(0)[: self.latent_channels].float()
        directions = directions.flip(1)[:, : self.latent_channels].T.float()  # (C, 192)
        whitening = directions / variances.sqrt()[:, None]
        self.analysis.weight.copy_(whitening[:, :, None, None])
        self.analysis.bias.copy_(-whitening @ mean)
        self.synthesis.weight.copy_((directions * variances.sqrt()[:, None]).T[:, :, None, None])
        self.synthesis.bias.copy_(mean)


def load_bundled() -> PatchCodec:
    """The codec that comes with the package."""
    with safe_open(WEIGHTS, framework="pt") as file:
        codec = PatchCodec(**json.loads(file.metadata()["config"]))
        codec.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return codec
