"""Corrupting normal images for training: patches of the latents (the paper) or defects drawn on the images."""

from decodiff_anomalib.corruption.defects import draw_defects
from decodiff_anomalib.corruption.patches import (
    MAX_MASK_RATIO,
    MAX_NOISE_RATIO,
    corrupt_latents,
    patch_size_probabilities,
    random_patch_mask,
    shuffle_patches,
)
from decodiff_anomalib.corruption.replay import ReplayBuffer

__all__ = [
    "MAX_MASK_RATIO",
    "MAX_NOISE_RATIO",
    "ReplayBuffer",
    "corrupt_latents",
    "draw_defects",
    "patch_size_probabilities",
    "random_patch_mask",
    "shuffle_patches",
]
