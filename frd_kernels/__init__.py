"""Fused pixel difference convolution and cosine clustering for PyTorch."""

from . import _library  # noqa: F401  loads the operators
from .backend import backends, use_backend

__version__ = "0.1.0"
__all__ = ["backends", "use_backend"]
