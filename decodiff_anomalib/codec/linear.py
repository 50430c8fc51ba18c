"""The linear codec: whitened principal components of 8x8 patches of photographs.

Among all linear codecs of its size it has the least squared error (Eckart & Young, 1936). MODEL_CARD.md states what the
bundled one keeps and costs.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.codec.interface import Codec

BUNDLED = "bundled"
PATCH_SIZE = 8
WEIGHTS = Path(__file__).with_name("patch_codec.safetensors")


class PatchCodec(Codec):
    """Image <-> latents, one vector for each 8x8 patch.

    Args:
        latent_channels: Principal components kept, of 192.
    """

    downsample_factor = PATCH_SIZE

    def __init__(self, latent_channels: int = 48) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.spec = {"_class_name": type(self).__name__, "latent_channels": latent_channels}
        self.analysis = nn.Conv2d(3 * PATCH_SIZE**2, latent_channels, 1)
        self.synthesis = nn.Conv2d(latent_channels, 3 * PATCH_SIZE**2, 1)

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encode ``images`` ``(B, 3, H, W)`` in [-1, 1] to latents ``(B, C, H/8, W/8)`` of about unit variance."""
        del generator  # nothing is random here
        return self.analysis(F.pixel_unshuffle(images, PATCH_SIZE))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode ``latents`` ``(B, C, h, w)`` to images ``(B, 3, 8h, 8w)``, about [-1, 1] (not clamped)."""
        return F.pixel_shuffle(self.synthesis(latents), PATCH_SIZE)

    @torch.no_grad()
    def fit(self, images: torch.Tensor) -> None:
        """Set the components to the principal ones of ``images`` ``(N, 3, H, W)`` in [-1, 1], each of unit variance."""
        patches = F.pixel_unshuffle(images, PATCH_SIZE).movedim(1, -1).flatten(0, -2)
        mean = patches.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov(patches.T.double()))
        scale = variances.flip(0)[: self.latent_channels].sqrt().float()
        directions = directions.flip(1)[:, : self.latent_channels].float()  # (192, C)
        whitening = directions.T / scale[:, None]
        self.analysis.weight.copy_(whitening[:, :, None, None])
        self.analysis.bias.copy_(-whitening @ mean)  # type: ignore[union-attr] # built with a bias
        self.synthesis.weight.copy_((directions * scale)[:, :, None, None])
        self.synthesis.bias.copy_(mean)  # type: ignore[union-attr]

    def save(self, path: Path) -> None:
        """Store as safetensors, the number of channels in the header."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(path) as staged:
            save_file(tensors, staged, metadata={"config": json.dumps({"latent_channels": self.latent_channels})})

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "PatchCodec":
        """Read what :meth:`save` stored; without a path, the codec that comes with the package."""
        with safe_open(path, framework="pt") as file:
            codec = cls(**json.loads(file.metadata()["config"]))
            codec.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        if path == WEIGHTS:
            codec.spec = BUNDLED
        return codec

    @classmethod
    def wrote(cls, path: Path) -> bool:
        """Whether a file is one that :meth:`save` stored."""
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                return "config" in (file.metadata() or {})
        except SafetensorError:
            return False
