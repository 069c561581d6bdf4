"""Declares the Triton kernels as operators of the namespace `frd_triton`, without importing triton yet.

They have the names and schemas of the operators of `frd` and are in `<family>/triton/`; `pdc_block_dense` exists in
Triton alone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from . import _library

NAMESPACE = "frd_triton"
# As Triton reads the variable when a kernel is defined. Its interpreter computes on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
DEVICE = "cpu" if INTERPRETED else "cuda"

_MODULES = {
    "pdc.triton.weight": ("pdc_weight", "pdc_weight_backward"),
    "pdc.triton.depthwise": ("pdc2d_depthwise", "pdc2d_depthwise_backward"),
    "pdc_block.triton.forward": ("pdc_block",),
    "pdc_block.triton.backward": ("pdc_block_backward",),
    "cluster.triton.forward": ("cluster", "icm", "cluster_dispatch"),
    "cluster.triton.backward": ("cluster_backward", "icm_backward", "cluster_dispatch_backward"),
}


def problem() -> str:
    """Why no Triton kernel can run here; '' if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly)"
    return ""


def _deferred(module: str, name: str) -> Callable[..., Any]:
    @functools.cache
    def function() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(f".{module}", __package__), name)
        return found

    def call(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
            return function()(*arguments)

    return call


# plain [Ch, C, s, s]: the plain kernel equal to the difference convolution. For inference only.
_DENSE = (
    "pdc_block_dense(Tensor x, Tensor plain, Tensor? pdc_bias, Tensor point_weight, Tensor? point_bias, "
    "Tensor? residual, int kind, float theta, SymInt[] stride, SymInt[] dilation) -> Tensor"
)

LIBRARY = _library.declare(NAMESPACE, [name for names in _MODULES.values() for name in names])
LIBRARY.define(_DENSE)
for _module, _names in (*_MODULES.items(), ("pdc_block.triton.dense", ("pdc_block_dense",))):
    for _name in _names:
        LIBRARY.impl(_name, _deferred(_module, _name), DEVICE.upper())
