"""Declares the Triton kernels as operators of the namespace `frd_triton`, without importing triton yet.

They have the schemas of `frd`'s own and live in `<family>/triton.py` under the same names.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from . import _library

NAMESPACE = "frd_triton"
# Triton itself reads the variable when a kernel is defined. Its interpreter computes on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

_FAMILIES = {
    "pdc": ("pdc_weight", "pdc_weight_backward", "pdc2d_depthwise", "pdc2d_depthwise_backward"),
    "pdc_block": ("pdc_block", "pdc_block_backward"),
}


def problem() -> str:
    """Why no Triton kernel can run here; '' if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly)"
    return ""


def _deferred(family: str, name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        module = importlib.import_module(f".{family}.triton", __package__)
        return getattr(module, name)(*arguments)

    return call


LIBRARY = _library.declare(NAMESPACE, [name for names in _FAMILIES.values() for name in names])
for _family, _names in _FAMILIES.items():
    for _name in _names:
        LIBRARY.impl(_name, _deferred(_family, _name), DEVICE.upper())
