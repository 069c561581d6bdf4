"""What the Triton kernels of the clustering's backward share: views of tokens, matrix products, bins, weights.

A view of tokens or of rows [items, rows, C] is a tuple (pointer, strides of an item, of a row, of a channel); a vector
of each item is (pointer, stride of an item). Tiles are [rows, channels] in the compute type once they are widened.

A kernel makes a tuple of tuples that it is given anew, by a slice: Triton 3.6 forgets the inner strides of 1 otherwise.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from .._triton_ops import INTERPRETED, widen
from .triton_tiles import is_live, token_weight


@triton.jit
def pointers(view, item, row, channel):
    """[rows, channels] pointers into an item of a view."""
    start, of_item, of_row, of_channel = view
    base = start + item.to(tl.int64) * of_item
    return base + row.to(tl.int64)[:, None] * of_row + channel.to(tl.int64)[None, :] * of_channel


@triton.jit
def load_rows(view, item, row, channel, real, channels):
    """The rows `row` of an item as stored; 0 where `real` [rows] is not, and beyond the channels."""
    mask = real[:, None] & (channel < channels)[None, :]
    return tl.load(pointers(view, item, row, channel), mask=mask, other=0.0)


@triton.jit
def store_rows(view, item, row, channel, value, real, channels):
    mask = real[:, None] & (channel < channels)[None, :]
    tl.store(pointers(view, item, row, channel), value, mask=mask)


@triton.jit
def load_vector(vector, item, index, real):
    """Elements of an item's vector; 0 where `real` is not."""
    start, of_item = vector
    return tl.load(start + item.to(tl.int64) * of_item + index, mask=real, other=0)


@triton.jit
def store_vector(vector, item, index, value, real):
    start, of_item = vector
    tl.store(start + item.to(tl.int64) * of_item + index, value, mask=real)


@triton.jit
def load_labels(vector, item, index, real):
    """Own centres of tokens; -1 of those that take no part or do not exist."""
    start, of_item = vector
    return tl.load(start + item.to(tl.int64) * of_item + index, mask=real, other=-1)


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
    acc, view, item, row, real, channel, weight, channels, TRANSPOSED: tl.constexpr, INNER: tl.constexpr
):
    """acc [rows, channels] + rows of a view times `weight` [C, C], or its transpose."""
    for first in range(0, channels, INNER):
        inner = first + tl.arange(0, INNER)
        rows = load_rows(view, item, row, inner, real, channels)
        if TRANSPOSED:
            at = channel[None, :] * channels + inner[:, None]
        else:
            at = inner[:, None] * channels + channel[None, :]
        held = (inner < channels)[:, None] & (channel < channels)[None, :]
        acc = multiply(rows, tl.load(weight + at, mask=held, other=0.0), acc)
    return acc


@triton.jit
def weight_of(cosine, alpha, beta, WEIGHTED: tl.constexpr):
    """`token_weight` by pointers to alpha and beta."""
    return token_weight(cosine, tl.load(alpha), tl.load(beta), WEIGHTED)


@triton.jit
def live_scale(scale):
    """1 / norm, or 0 of a row whose norm counts as zero: its direction passes no gradient."""
    return tl.where(is_live(scale), scale, 0.0)


@triton.jit
def add_bins(acc, view, share, mass, item, token, channel, real, channels, geometry, DIVIDE: tl.constexpr):
    """acc [tokens, channels] + share of each bin over a token times the bin's row; DIVIDE: divided by its mass.

    geometry: (height, width, rows, columns, most bins over a pixel vertically, horizontally)."""
    height, width, rows, columns, most_y, most_x = geometry
    y = token // width
    x = token % width
    top = y * rows // height
    bottom = ((y + 1) * rows - 1) // height
    left = x * columns // width
    right = ((x + 1) * columns - 1) // width
    for i in range(most_y):
        for j in range(most_x):
            covers = real & (top + i <= bottom) & (left + j <= right)
            bin = (top + i) * columns + left + j
            part = load_vector(share, item, bin, covers)
            if DIVIDE:
                part = tl.where(covers, part / load_vector(mass, item, bin, covers), 0.0)
            acc += part[:, None] * widen(load_rows(view, item, bin, channel, covers, channels))
    return acc
