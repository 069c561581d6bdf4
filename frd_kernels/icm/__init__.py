"""Cosine clustering: one round (`cluster`), FRD-Net's iterated form (`icm`), and its layer (`ICM`)."""

from .api import ClusterResult, cluster, icm
from .layers import ICM

__all__ = ["ICM", "ClusterResult", "cluster", "icm"]
