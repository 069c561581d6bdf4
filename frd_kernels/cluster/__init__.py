"""Cosine clustering: one round (`cluster`), the dispatch of centres to tokens (`dispatch`), FRD-Net's iterated form
(`icm`), and layers built on them."""

from .api import ClusterResult, cluster, dispatch, icm
from .layers import ICM
from .layers_coc import ClusterPool, ContextCluster, FECCluster

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
