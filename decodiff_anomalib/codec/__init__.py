"""Image <-> latents. Every codec is a frozen module with one interface.

codec.encode(images, generator=None)   (B, 3, H, W) in [-1, 1]  ->  latents (B, C, h, w), about unit variance
codec.decode(latents)                  (B, C, h, w)             ->  images (B, 3, H, W), about [-1, 1]
codec.latent_channels, codec.downsample_factor
codec.spec                             what :func:`build_codec` rebuilds the architecture from, without a network
"""

from pathlib import Path
from typing import Any

from torch import nn

from .patch import BUNDLED, PatchCodec


def build_codec(codec: str | Path | dict[str, Any] = BUNDLED) -> nn.Module:
    """Build a frozen codec.

    Args:
        codec: ``"bundled"`` (in the package, nothing is downloaded); a file that ``decodiff_anomalib.codec.train``
            wrote; a hub id, local folder or single ``.safetensors`` file of a diffusers ``AutoencoderKL`` or
            ``AutoencoderTiny``; or the ``spec`` of a codec, which restores its architecture and leaves its weights to a
            checkpoint.

    Raises:
        OSError: If the weights are neither local nor reachable.
        ValueError: If they are of another kind of model.
    """
    if codec == BUNDLED:
        built = PatchCodec.load()
    elif isinstance(codec, dict) and codec.get("_class_name") == PatchCodec.__name__:
        built = PatchCodec(codec["latent_channels"])
    elif not isinstance(codec, dict) and PatchCodec.wrote(Path(codec)):
        built = PatchCodec.load(Path(codec))
    else:
        from .autoencoder import AutoencoderCodec

        built = AutoencoderCodec(codec)
    return built.eval().requires_grad_(requires_grad=False)


__all__ = ["BUNDLED", "build_codec"]
