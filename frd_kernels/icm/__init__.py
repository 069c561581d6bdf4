"""Cosine clustering: one round (`cluster`), the way back to the tokens (`dispatch`), FRD-Net's iterated form
(`icm`), and the layers built on them."""

from .api import ClusterResult, cluster, dispatch, icm
from .blocks import ClusterPool, ContextCluster, FECCluster
from .layers import ICM

__all__ = [
    "ICM",
    "ClusterPool",
    "ClusterResult",
    "ContextCluster",
    "FECCluster",
    "cluster",
    "dispatch",
    "icm",
]
