"""Datamodules of this package."""

from decodiff_anomalib.data.demo import DemoTextures
from decodiff_anomalib.data.multi_category import MultiCategory

__all__ = ["DemoTextures", "MultiCategory"]
