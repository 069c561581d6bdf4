"""Pixel difference convolution."""

from .api import pdc2d, pdc_weight
from .layers import PDC2d

__all__ = ["PDC2d", "pdc2d", "pdc_weight"]
