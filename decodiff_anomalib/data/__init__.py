"""Datamodules: several categories in one, and a demo data set; checks of image files."""

from decodiff_anomalib.data.demo import DemoTextures
from decodiff_anomalib.data.multi_category import MultiCategory

__all__ = ["DemoTextures", "MultiCategory"]
