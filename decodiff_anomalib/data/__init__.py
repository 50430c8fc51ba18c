"""Datamodules: several categories in one, and a demo data set; checks and reading of image files."""

from decodiff_anomalib.data.demo import DemoTextures
from decodiff_anomalib.data.multi_category import MultiCategory
from decodiff_anomalib.image_io import read_image

__all__ = ["DemoTextures", "MultiCategory", "read_image"]
