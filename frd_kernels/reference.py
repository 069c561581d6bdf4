"""Every function in plain PyTorch: the oracle of the kernels. Same names and arguments as the public ones."""

from .cluster.reference import cluster, dispatch, icm
from .pdc.reference import pdc2d, pdc_weight
from .pdc_block.reference import pdc_block

__all__ = ["cluster", "dispatch", "icm", "pdc2d", "pdc_block", "pdc_weight"]
