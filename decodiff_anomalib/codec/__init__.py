"""Codecs between images and latents, see :class:`decodiff_anomalib.codec.interface.Codec`."""

from pathlib import Path
from typing import Any

from .interface import Codec
from .linear import BUNDLED, PatchCodec


def build_codec(codec: Codec | str | Path | dict[str, Any] = BUNDLED) -> Codec:
    """Build a frozen codec.

    Args:
        codec: ``"bundled"`` (in the package, nothing is downloaded); a file that ``decodiff_anomalib.codec.train``
            wrote; a hub id, local folder or single ``.safetensors`` file of a diffusers ``AutoencoderKL`` or
            ``AutoencoderTiny``; the ``spec`` of a codec, which restores its architecture and leaves its weights to a
            checkpoint; or a codec, which is returned as it is.

    Raises:
        OSError: If the weights are neither local nor reachable.
        ValueError: If they are of another kind of model.
    """
    built: Codec
    if isinstance(codec, Codec):
        built = codec
    elif codec == BUNDLED:
        built = PatchCodec.load()
    elif isinstance(codec, dict) and codec.get("_class_name") == PatchCodec.__name__:
        built = PatchCodec(codec["latent_channels"])
    elif not isinstance(codec, dict) and PatchCodec.wrote(Path(codec)):
        built = PatchCodec.load(Path(codec))
    else:
        from .autoencoder import AutoencoderCodec

        built = AutoencoderCodec(codec)
    return built.eval().requires_grad_(requires_grad=False)


__all__ = ["BUNDLED", "Codec", "build_codec"]
