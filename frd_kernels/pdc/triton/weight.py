"""The weight transform on Triton: `frd_triton::pdc_weight` and its backward.

Semantics are those of `csrc/pdc/weight.h`, including the zero-sum rounding to 16 bit. A pair is an output and an input
channel.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, compute_type, narrow, widen
from ..kinds import Kind, plain_size
from ..taps import Offset, pairs
from .stencil import WEIGHTS, load_weights

_MAX_MOVES = tl.constexpr(9)
_TILE = 2**18 if INTERPRETED.value else 512  # taps of a program; the interpreter's cost is per program


def _table(kind: Kind) -> list[tuple[int, int]]:
    """The taps of the plain kernel that weight k adds to and subtracts from; -1: none."""
    side = plain_size(kind)

    def index(offset: Offset | None) -> int:
        return -1 if offset is None else (offset[0] + side // 2) * side + offset[1] + side // 2

    return [(index(plus), index(minus)) for _, plus, minus in pairs(kind)]


_TABLES = [_table(kind) for kind in Kind]


@triton.constexpr_function
def plus_tap(kind: int, k: int) -> int:
    return _TABLES[kind][k][0]


@triton.constexpr_function
def minus_tap(kind: int, k: int) -> int:
    return _TABLES[kind][k][1]


@triton.jit
def _spacing(value):
    """Distance of a 16-bit float to the next one away from zero: the bits order like sign and magnitude."""
    following = (value.to(tl.uint16, bitcast=True).to(tl.uint32) + 1).to(tl.uint16)
    following = following.to(value.dtype, bitcast=True)
    return tl.abs(widen(following).to(tl.float64) - widen(value).to(tl.float64))


@triton.jit
def _nearest(value):
    return tl.where(value < 0, tl.ceil(value - 0.5), tl.floor(value + 0.5))


@triton.jit
def _round_to_sum(exact, target, tap, mask, DTYPE: tl.constexpr):
    """Rounds exact [pairs, taps] (float32) to 16 bit so that the taps of a pair sum to `target` [pairs, 1].

    One tap at a time changes by whole ulps, the one that leaves the smallest residue first, and none by more than one
    and a half ulps of the largest tap.
    """
    rounded = narrow(exact, DTYPE)
    residue = tl.sum(tl.where(mask, widen(rounded).to(tl.float64), 0.0), axis=1)[:, None] - target
    limit = tl.max(tl.where(mask, _spacing(rounded), 0.0), axis=1)[:, None]
    mask = mask & (residue - residue == 0)  # infinite or NaN taps have no sum to keep
    lowest = exact.to(tl.float64) - limit
    highest = exact.to(tl.float64) + limit
    for _ in range(_MAX_MOVES):
        now = widen(rounded).to(tl.float64)
        ulp = _spacing(rounded)
        wanted = now - residue
        wanted = tl.where(wanted > highest, highest, wanted)
        wanted = tl.where(wanted < lowest, lowest, wanted)
        adjusted = narrow((now + ulp * _nearest((wanted - now) / ulp)).to(tl.float32), DTYPE)
        left = residue + (widen(adjusted).to(tl.float64) - now)
        size = tl.where(mask & (tl.abs(left) < tl.abs(residue)), tl.abs(left), float("inf"))
        smallest = tl.min(size, axis=1)[:, None]
        first = tl.min(tl.where((size == smallest) & (size < float("inf")), tap, tap.shape[1]), axis=1)[
            :, None
        ]
        rounded = tl.where(tap == first, adjusted, rounded)
        residue = tl.where(
            smallest < float("inf"), tl.sum(tl.where(tap == first, left, 0.0), axis=1)[:, None], residue
        )
    return rounded


def _options(kind: int, theta: float, count: int, taps: int) -> dict[str, Any]:
    """Constants of a kernel with tiles [pairs, taps]."""
    taps = triton.next_power_of_2(taps)
    return {
        "KIND": int(kind),
        "THETA": 1.0 if kind == Kind.VANILLA else theta,
        "SIDE": plain_size(kind),
        "PAIRS": min(_TILE // taps, triton.next_power_of_2(count)),
        "TAPS": taps,
        "num_warps": 4,
    }


@triton.jit
def transform(
    weight,
    plain,
    count,
    BALANCED: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    SIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """plain_t = sum_{k: plus_k = t} w_k - theta sum_{k: minus_k = t} w_k for each tap t of a pair.

    weight [count, 9] -> plain [count, SIDE * SIDE], in the compute type of the weight. BALANCED: rounded so that the
    sum over the taps is kept. Grid: (blocks of pairs,).
    """
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)[:, None]
    tap = tl.arange(0, TAPS)[None, :]
    dtype: tl.constexpr = plain.dtype.element_ty
    compute: tl.constexpr = compute_type(weight.dtype.element_ty)
    mask = (pair < count) & (tap < SIDE * SIDE)
    weights = load_weights(weight + pair.to(tl.int64) * WEIGHTS, 1, pair < count)
    total = tl.zeros((PAIRS, TAPS), compute)
    for k in tl.static_range(WEIGHTS):
        total += tl.where(tap == plus_tap(KIND, k), weights[k], 0.0)
    for k in tl.static_range(WEIGHTS):
        total -= tl.where(tap == minus_tap(KIND, k), THETA * weights[k], 0.0)
    to = plain + pair.to(tl.int64) * (SIDE * SIDE) + tap
    if BALANCED:
        exact = total.to(tl.float32)
        target = tl.zeros((PAIRS, 1), tl.float64)  # exactly, for a pure difference: not the rounded sum
        if THETA != 1.0:
            target = tl.sum(exact.to(tl.float64), axis=1)[:, None]
        tl.store(to, _round_to_sum(exact, target, tap, mask, dtype), mask=mask)
    elif dtype == tl.float64:
        tl.store(to, total.to(tl.float64), mask=mask)
    else:
        tl.store(to, narrow(total.to(tl.float32), dtype), mask=mask)


def pdc_weight(weight: torch.Tensor, kind: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    """weight [O, I, 3, 3] -> [O, I, 3, 3], radial [O, I, 5, 5], in `dtype`; 16 bit is rounded zero-sum."""
    weight = weight.contiguous()
    side = plain_size(kind)
    plain = weight.new_empty((*weight.shape[:2], side, side), dtype=dtype)
    count = weight.shape[0] * weight.shape[1]
    if count == 0:
        return plain
    options = _options(kind, theta, count, side * side)
    # The taps of a pure radial difference are opposite pairs, whose sum stays 0.
    keeps_sum = kind == Kind.VANILLA or (kind == Kind.RADIAL and theta == 1)
    transform[(triton.cdiv(count, options["PAIRS"]),)](
        weight,
        plain,
        count,
        BALANCED=plain.element_size() == 2 and not keeps_sum,
        **options,
    )
    return plain


@triton.jit
def transform_transposed(
    grad,
    dweight,
    count,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    SIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """dw_k = dplain(plus_k) - theta dplain(minus_k) for each weight k of a pair.

    grad [count, SIDE * SIDE] -> dweight [count, 9], in the compute type of dweight. Grid: (blocks of pairs,).
    """
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)[:, None]
    index = tl.arange(0, TAPS)[None, :]
    dtype: tl.constexpr = dweight.dtype.element_ty
    compute: tl.constexpr = compute_type(dtype)
    plus = index * 0
    minus = index * 0 - 1
    for k in tl.static_range(WEIGHTS):
        plus = tl.where(index == k, plus_tap(KIND, k), plus)
        minus = tl.where(index == k, minus_tap(KIND, k), minus)
    mask = (pair < count) & (index < WEIGHTS)
    start = grad + pair.to(tl.int64) * (SIDE * SIDE)
    total = widen(tl.load(start + plus, mask=mask, other=0.0)).to(compute)
    subtracted = widen(tl.load(start + minus, mask=mask & (minus >= 0), other=0.0)).to(compute)
    total = total - THETA * subtracted
    tl.store(dweight + pair.to(tl.int64) * WEIGHTS + index, narrow(total, dtype), mask=mask)


def pdc_weight_backward(grad: torch.Tensor, kind: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    """grad [O, I, 3, 3], radial [O, I, 5, 5] -> [O, I, 3, 3] in `dtype`: the transpose of the transform."""
    grad = grad.contiguous()
    dweight = grad.new_empty((*grad.shape[:2], 3, 3), dtype=dtype)
    count = grad.shape[0] * grad.shape[1]
    if count == 0:
        return dweight
    options = _options(kind, theta, count, WEIGHTS.value)
    transform_transposed[(triton.cdiv(count, options["PAIRS"]),)](grad, dweight, count, **options)
    return dweight
