"""Fused pixel difference convolution and cosine clustering for PyTorch."""

import pathlib
from typing import Any

__version__ = "0.1.0"

try:
    from . import _compile_cache, _library, convert, reference  # noqa: F401  _library loads the operators
    from .backend import backends, use_backend
    from .cluster import ICM, ClusterPool, ClusterResult, ContextCluster, FECCluster, cluster, dispatch, icm
    from .pdc import PDC2d, pdc2d, pdc_weight
    from .pdc_block import DPM, PDCBlock2d, pdc_block

    _compile_cache.add_to_keys(_compile_cache.fingerprint(pathlib.Path(__file__).parent))
except ImportError as _error:
    # The import goes on without the native library so that `python -m frd_kernels.info` can say why.
    _problem = str(_error)

    def __getattr__(name: str) -> Any:
        raise ImportError(_problem)


__all__ = [
    "DPM",
    "ICM",
    "ClusterPool",
    "ClusterResult",
    "ContextCluster",
    "FECCluster",
    "PDC2d",
    "PDCBlock2d",
    "backends",
    "cluster",
    "convert",
    "dispatch",
    "icm",
    "pdc2d",
    "pdc_block",
    "pdc_weight",
    "reference",
    "use_backend",
]
