"""Datamodules of this package."""

from decodiff_anomalib.data.demo import DemoTextures

__all__ = ["DemoTextures"]
