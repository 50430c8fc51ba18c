"""Weights of the denoiser: the authors' checkpoints, pretrained folders, and transfer between networks."""

from decodiff_anomalib.weights.denoiser_config import DenoiserConfig
from decodiff_anomalib.weights.official import CATEGORY_TABLE, load_official, official_key, to_official_state
from decodiff_anomalib.weights.pretrained import convert, load_pretrained, save_pretrained
from decodiff_anomalib.weights.transfer import transfer

__all__ = [
    "CATEGORY_TABLE",
    "DenoiserConfig",
    "convert",
    "load_official",
    "load_pretrained",
    "official_key",
    "save_pretrained",
    "to_official_state",
    "transfer",
]
