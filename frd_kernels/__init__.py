"""Fused pixel difference convolution and cosine clustering for PyTorch."""

from typing import Any

__version__ = "0.1.0"

try:
    from . import _library  # noqa: F401  loads the operators
    from .backend import backends, use_backend
except ImportError as _error:
    # The import goes on without the native library so that `python -m frd_kernels.info` can say why.
    _problem = str(_error)

    def __getattr__(name: str) -> Any:
        raise ImportError(_problem)


__all__ = ["backends", "use_backend"]
