"""Device functions that the clustering's Triton kernels share: loads and stores of tiles, bins, norms, weights.

Tokens [B, N, C] lie in memory by any strides: a `View`. Tiles are [rows, channels], in the compute type once they are
widened. B counts samples, N tokens, O centres, C channels, J the centres of the last round.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, narrow, widen

MIN_NORM = tl.constexpr(1e-12)  # a norm up to this counts as zero
MAX_INV_NORM = tl.constexpr(1e12)


class View(NamedTuple):
    """Tokens or rows [B, rows, C]: the first element, strides of a sample, of a row, of a channel. Inside a kernel
    a tensor is a pointer."""

    start: Any
    sample: int
    row: int
    channel: int


class Vector(NamedTuple):
    """[B, ...], contiguous in each sample: the first element, stride of a sample."""

    start: Any
    sample: int


class Gate(NamedTuple):
    """Of a token's weight sigmoid(alpha * cosine + beta): alpha, beta [1] or, of variant released, [T]."""

    alpha: torch.Tensor
    beta: torch.Tensor


def view_of(t: torch.Tensor) -> View:
    """t [B, N, C]"""
    return View(t, *t.stride())


def rows_of(t: torch.Tensor) -> View:
    """t [B, rows, C], contiguous"""
    return View(t, t.shape[1] * t.shape[2], t.shape[2], 1)


def vector_of(t: torch.Tensor) -> Vector:
    """t [B, ...], contiguous"""
    return Vector(t, t[0].numel() if t.shape[0] else 0)


@triton.jit
def pointers(view, sample, row, channel):
    """[rows, channels] pointers into a sample of a view."""
    base = view.start + sample.to(tl.int64) * view.sample
    return base + row.to(tl.int64)[:, None] * view.row + channel.to(tl.int64)[None, :] * view.channel


@triton.jit
def load_rows(view, sample, row, channel, mask, channels):
    """The rows `row` of a sample as stored; 0 where `mask` [rows] is not, and beyond the channels."""
    inside = mask[:, None] & (channel < channels)[None, :]
    return tl.load(pointers(view, sample, row, channel), mask=inside, other=0.0)


@triton.jit
def store_rows(view, sample, row, channel, value, mask, channels):
    """Stores what `load_rows` loads, rounded to the dtype in memory."""
    inside = mask[:, None] & (channel < channels)[None, :]
    tl.store(pointers(view, sample, row, channel), narrow(value, view.start.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(vector, sample, index, mask):
    """Elements of a sample's vector; 0 where `mask` is not."""
    return tl.load(vector.start + sample.to(tl.int64) * vector.sample + index, mask=mask, other=0)


@triton.jit
def store_vector(vector, sample, index, value, mask):
    tl.store(vector.start + sample.to(tl.int64) * vector.sample + index, value, mask=mask)


@triton.jit
def load_labels(vector, sample, index, mask):
    """Own centres of tokens; -1 of those that take no part or do not exist."""
    return tl.load(vector.start + sample.to(tl.int64) * vector.sample + index, mask=mask, other=-1)


@triton.jit
def load_matrix(matrix, row, rows, column, columns):
    """The tile [row, column] of a contiguous matrix [rows, columns], as stored; 0 beyond it."""
    at = row[:, None] * columns + column[None, :]
    return tl.load(matrix + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def load_transposed(matrix, row, rows, column, columns):
    """The tile [column, row] of a contiguous matrix [rows, columns], as stored; 0 beyond it."""
    at = row[None, :] * columns + column[:, None]
    return tl.load(matrix + at, mask=(row < rows)[None, :] & (column < columns)[:, None], other=0.0)


@triton.jit
def store_matrix(matrix, row, rows, column, columns, value):
    """Stores a tile [row, column] into a contiguous matrix [rows, columns], rounded to its dtype."""
    at = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(matrix + at, narrow(value, matrix.dtype.element_ty), mask=inside)


@triton.jit
def bin_bounds(bin, size, bins):
    """First pixel of a bin of `adaptive_avg_pool2d` along one axis, and the one behind its last."""
    return bin * size // bins, ((bin + 1) * size + bins - 1) // bins


@triton.jit
def inverse_norm(square):
    """1 / max(norm, MIN_NORM) from the sum of squares: 0 where the norm overflows; a NaN passes."""
    if square.dtype == tl.float64:
        norm = tl.sqrt(square)
    else:
        norm = tl.sqrt_rn(square)
    # The inverse as the compute type holds it: `is_live` recognises a norm that counts as zero by it.
    return tl.where(norm <= MIN_NORM, tl.full(norm.shape, MAX_INV_NORM, norm.dtype), 1.0 / norm)


@triton.jit
def is_live(inv_norm):
    """Whether a row has a direction that passes gradient: its norm does not count as zero."""
    return (inv_norm < MAX_INV_NORM) | (inv_norm != inv_norm)


@triton.jit
def live_inv_norm(inv_norm):
    """1 / norm, or 0 of a row whose norm counts as zero."""
    return tl.where(is_live(inv_norm), inv_norm, 0.0)


@triton.jit
def sigmoid(value):
    return 1.0 / (1.0 + tl.exp(-value))


@triton.jit
def token_weight(cosine, alpha, beta, WEIGHTED: tl.constexpr):
    """Weight of a token in its cluster: sigmoid(alpha * cosine + beta), else 1. alpha, beta: loaded scalars."""
    if WEIGHTED:
        weight = sigmoid(beta + alpha * cosine)
    else:
        weight = tl.full(cosine.shape, 1.0, cosine.dtype)
    return weight


@triton.jit
def gate_weight(cosine, gate, round, WEIGHTED: tl.constexpr):
    """`token_weight` with entry `round` of a `Gate`."""
    return token_weight(cosine, tl.load(gate.alpha + round), tl.load(gate.beta + round), WEIGHTED)


@triton.jit
def next_part(rest, dtype: tl.constexpr):
    """(the next part of `rest` in `dtype`, what it leaves): 3 of bfloat16 make a float32, 2 of float16 where the
    rest is within float16's range."""
    part = narrow(rest, dtype)
    return part, rest - widen(part)


@triton.jit
def is_last(counter, arrivals):
    """Whether this program is the last of `arrivals` to arrive at `counter`, a zero before. It then sees all that the
    others stored. Who is last decides nothing that changes a sum."""
    # All threads' stores have to precede the one thread that releases them.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    tl.debug_barrier()
    return last


@triton.jit
def bfloat16_parts(value):
    """Two bfloat16 whose sum is `value` to 16 bits; an infinite or NaN value is the first."""
    high = value.to(tl.bfloat16)
    rounded = high.to(tl.float32)
    low = tl.where(rounded - rounded == 0, value - rounded, 0.0)
    return high, low.to(tl.bfloat16)


@triton.jit
def multiply(a, b, acc):
    """acc [M, N] + a [M, K] b [K, N]; float32 factors of bfloat16 count to 16 bits, all others exactly."""
    if INTERPRETED or acc.dtype == tl.float64:
        acc = tl.dot(widen(a), widen(b), acc, input_precision="ieee", out_dtype=acc.dtype)
    elif a.dtype == b.dtype and a.dtype != tl.float32:
        acc = tl.dot(a, b, acc)
    elif a.dtype == tl.bfloat16:
        high, low = bfloat16_parts(b)
        acc = tl.dot(a, low, acc)
        acc = tl.dot(a, high, acc)
    elif b.dtype == tl.bfloat16:
        high, low = bfloat16_parts(a)
        acc = tl.dot(low, b, acc)
        acc = tl.dot(high, b, acc)
    else:
        acc = tl.dot(widen(a), widen(b), acc, input_precision="tf32x3")
    return acc


@triton.jit
def add_selected(acc, selected, rows, PARTS: tl.constexpr):
    """acc [M, N] + for each of M the sum of its `selected` [M, K] rows [K, N], taken to PARTS bfloat16."""
    if INTERPRETED or acc.dtype == tl.float64:
        acc = tl.dot(selected.to(acc.dtype), rows, acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        ones = selected.to(tl.bfloat16)
        for _ in tl.static_range(PARTS - 1):
            part = rows.to(tl.bfloat16)
            acc = tl.dot(ones, part, acc)
            rows -= part.to(tl.float32)
        acc = tl.dot(ones, rows.to(tl.bfloat16), acc)
    return acc


@triton.jit
def add_product(
    acc, view, sample, row, mask, channel, weight, channels, TRANSPOSED: tl.constexpr, INNER: tl.constexpr
):
    """acc [rows, channels] + rows of a view times `weight` [C, C], or its transpose."""
    for first in range(0, channels, INNER):
        inner = first + tl.arange(0, INNER)
        rows = load_rows(view, sample, row, inner, mask, channels)
        if TRANSPOSED:
            at = channel[None, :] * channels + inner[:, None]
        else:
            at = inner[:, None] * channels + channel[None, :]
        inside = (inner < channels)[:, None] & (channel < channels)[None, :]
        acc = multiply(rows, tl.load(weight + at, mask=inside, other=0.0), acc)
    return acc


def precision(dtype: torch.dtype) -> str:
    """Products of float32 are as exact as float32, whatever the user allows his own to be."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def part_count(dtype: torch.dtype) -> int:
    """Parts in `dtype` that hold what a float32 factor of such tokens needs."""
    return {torch.bfloat16: 3, torch.float16: 2}.get(dtype, 1)
