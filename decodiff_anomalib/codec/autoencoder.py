"""Codecs from diffusers: ``AutoencoderKL`` (the paper's Stable-Diffusion autoencoder) and ``AutoencoderTiny``."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from decodiff_anomalib.codec.interface import Codec

logger = logging.getLogger(__name__)

KINDS = ("AutoencoderKL", "AutoencoderTiny")

# The architecture of every Stable-Diffusion 1/2 autoencoder, for single files, which carry no configuration.
STABLE_DIFFUSION_CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}


class AutoencoderCodec(Codec):
    """A diffusers autoencoder as a codec.

    Args:
        source: Hub id, local folder, single ``.safetensors`` file, or a ``spec`` (architecture only).

    Raises:
        OSError: If the weights are neither local nor reachable.
        ValueError: If they are of another kind of model.
    """

    def __init__(self, source: str | Path | dict[str, Any]) -> None:
        super().__init__()
        self.autoencoder: Any = _from_spec(source) if isinstance(source, dict) else _load(str(source))
        config: Any = self.autoencoder.config
        self.kind = type(self.autoencoder).__name__
        if self.kind not in KINDS:
            msg = f"codec={str(source)!r} is a {self.kind}; valid kinds: {', '.join(KINDS)}."
            raise ValueError(msg)
        self.latent_channels = config.latent_channels
        widths = config.block_out_channels if self.kind == "AutoencoderKL" else config.decoder_block_out_channels
        self.downsample_factor = 2 ** (len(widths) - 1)
        self.scaling_factor: float = config.scaling_factor
        names = (name for name in config if not name.startswith("_"))
        self.spec = {"_class_name": self.kind, **{name: config[name] for name in names}}

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encode to the posterior's mean, or to a sample of it where a ``generator`` is given (``AutoencoderKL``)."""
        encoded = self.autoencoder.encode(images)
        if self.kind == "AutoencoderTiny":
            return encoded.latents * self.scaling_factor
        posterior = encoded.latent_dist
        latents = posterior.mean if generator is None else posterior.sample(generator)
        return latents * self.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode, not clamped."""
        return self.autoencoder.decode(latents / self.scaling_factor, return_dict=False)[0]


def _from_spec(spec: dict[str, Any]) -> nn.Module:
    import diffusers

    config = dict(spec)
    kind = config.pop("_class_name", None)
    if kind not in KINDS:
        msg = f"codec={kind!r} is unknown; valid kinds: {', '.join(KINDS)}."
        raise ValueError(msg)
    return getattr(diffusers, kind)(**config)


def _load(source: str) -> nn.Module:
    from diffusers import AutoModel
    from safetensors.torch import load_file

    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            msg = f"codec={source!r} is not a .safetensors file; other formats can execute code when read. Convert it."
            raise ValueError(msg)
        if not (path.parent / "config.json").is_file():
            from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

            state = load_file(path)
            if any(name.startswith("encoder.down.") for name in state):  # the names of the original training code
                state = convert_ldm_vae_checkpoint(state, STABLE_DIFFUSION_CONFIG)
            autoencoder = _from_spec(STABLE_DIFFUSION_CONFIG)
            autoencoder.load_state_dict(state)
            return autoencoder
        path = path.parent
    elif not path.is_dir():
        logger.info("Looking for the codec %s on the hub.", source)
    try:
        return AutoModel.from_pretrained(str(path) if path.exists() else source, use_safetensors=True)
    except (OSError, ConnectionError) as error:
        msg = (
            f"codec={source!r} is neither a local folder or file nor in the local cache, and could not be fetched. "
            f"Where there is a network, run `hf download {source} --local-dir DIR` and give codec=DIR; "
            "codec='bundled' needs no download."
        )
        raise OSError(msg) from error
