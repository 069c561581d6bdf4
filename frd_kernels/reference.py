"""The public functions in plain PyTorch, under the same names: the oracle that the kernels are tested against."""

from .cluster.reference import cluster, dispatch, icm
from .pdc.reference import pdc2d, pdc_weight
from .pdc_block.reference import pdc_block

__all__ = ["cluster", "dispatch", "icm", "pdc2d", "pdc_block", "pdc_weight"]
