"""What the Triton kernels of every family share: dtypes, matrix products, block sizes, the current device.

Sums are in the compute type: float64 for float64, else float32.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from . import _triton

INTERPRETED = tl.constexpr(_triton.INTERPRETED)


def device_function(function: Any) -> Any:
    """Decorates what kernels call. The interpreter calls plain functions, as a decorated one takes milliseconds."""
    return function if INTERPRETED.value else triton.jit(function)


@triton.constexpr_function
def compute_type(dtype):
    """float64 for float64, else float32."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@device_function
def widen_all(values, COUNT: tl.constexpr):
    """A tuple of COUNT tiles of one dtype, in the compute type."""
    wide = ()
    for i in tl.static_range(COUNT):
        if INTERPRETED and values[0].dtype == tl.bfloat16:  # the interpreter has no bfloat16 arithmetic
            bits = values[i].to(tl.uint16, bitcast=True).to(tl.uint32) << 16
            wide += (bits.to(tl.float32, bitcast=True),)
        elif values[0].dtype == tl.float64:
            wide += (values[i],)
        else:
            wide += (values[i].to(tl.float32),)
    return wide


@device_function
def widen(value):
    """To the compute type."""
    return widen_all((value,), 1)[0]


@device_function
def narrow(value, dtype: tl.constexpr):
    """From the compute type to the storage type, round to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1)).to(tl.uint32)) >> 16
        result = tl.where(value == value, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@device_function
def matmul_add(a, b, acc, PRECISION: tl.constexpr):
    """acc [M, N] + a [M, K] b [K, N] in the dtype of acc."""
    if INTERPRETED:  # numpy has no bfloat16
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


def block_of(size: int, max_block: int, min_block: int = 16) -> int:
    """The power of two from `min_block` to `max_block` that covers `size` with the fewest elements; the largest of
    those."""
    block = best = min_block
    while block <= max_block:
        if -(-size // block) * block <= -(-size // best) * best:
            best = block
        block *= 2
    return best


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of x current: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
