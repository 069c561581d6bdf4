"""The PDC block (difference convolution -> ReLU -> 1x1 -> + residual) and FRD-Net's DPM."""

from .api import pdc_block
from .layers import DPM, PDCBlock2d

__all__ = ["DPM", "PDCBlock2d", "pdc_block"]
