"""Frozen visual features: extracted by a timm backbone, used as latents and compared with memory banks."""

from decodiff_anomalib.features.backbone import PACKAGED_BACKBONE, VisualFeatures, packaged_state_dict
from decodiff_anomalib.features.latents import FeatureLatents
from decodiff_anomalib.features.memory_bank import MemoryBank

__all__ = ["PACKAGED_BACKBONE", "FeatureLatents", "MemoryBank", "VisualFeatures", "packaged_state_dict"]
