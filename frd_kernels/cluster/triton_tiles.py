"""What the Triton kernels of the clustering share: tiles of tokens, bins, norms, gates, parts of a float32.

Tokens [N, C] of an item lie in memory by any strides. Sums are in float32, float64 for float64: "the compute type".
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._triton_ops import narrow, widen
from .ops import saved_size

NORM_FLOOR = tl.constexpr(1e-12)  # a norm up to this counts as zero
LIVE_BELOW = tl.constexpr(1e12)


@triton.jit
def load_tokens(item, steps, token, held, channel, channels):
    """The tile [token, channel] of the tokens that start at `item`, as stored; 0 where a token is not `held`.

    steps: elements from token to token, from channel to channel.
    """
    at = token.to(tl.int64)[:, None] * steps[0] + channel.to(tl.int64)[None, :] * steps[1]
    return tl.load(item + at, mask=held[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit
def store_tokens(item, steps, token, held, channel, channels, value):
    """Stores what `load_tokens` loads, rounded to the dtype in memory."""
    at = token.to(tl.int64)[:, None] * steps[0] + channel.to(tl.int64)[None, :] * steps[1]
    real = held[:, None] & (channel < channels)[None, :]
    tl.store(item + at, narrow(value, item.dtype.element_ty), mask=real)


@triton.jit
def load_rows(matrix, row, rows, column, columns):
    """The tile [row, column] of a dense matrix [rows, columns], as stored; 0 beyond it."""
    at = row[:, None] * columns + column[None, :]
    return tl.load(matrix + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def load_turned(matrix, row, rows, column, columns):
    """The tile [column, row] of a dense matrix [rows, columns], as stored; 0 beyond it."""
    at = row[None, :] * columns + column[:, None]
    return tl.load(matrix + at, mask=(row < rows)[None, :] & (column < columns)[:, None], other=0.0)


@triton.jit
def store_rows(matrix, row, rows, column, columns, value):
    """Stores a tile [row, column] into a dense matrix [rows, columns], rounded to its dtype."""
    at = row[:, None] * columns + column[None, :]
    real = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(matrix + at, narrow(value, matrix.dtype.element_ty), mask=real)


@triton.jit
def bin_bounds(bin, size, bins):
    """First pixel of a bin of `adaptive_avg_pool2d` along one axis, and the one behind its last."""
    return bin * size // bins, ((bin + 1) * size + bins - 1) // bins


@triton.jit
def inverse_norm(square):
    """1 / max(norm, NORM_FLOOR) from the sum of squares: 0 where the norm overflows; a NaN passes."""
    if square.dtype == tl.float64:
        norm = tl.sqrt(square)
    else:
        norm = tl.sqrt_rn(square)
    # Both as the compute type holds them, so that a norm of zero is known by its inverse.
    return tl.where(norm <= NORM_FLOOR, tl.full(norm.shape, LIVE_BELOW, norm.dtype), 1.0 / norm)


@triton.jit
def is_live(scale):
    """Whether a row of this inverse norm has a direction that passes gradient."""
    return (scale < LIVE_BELOW) | (scale != scale)


@triton.jit
def sigmoid(value):
    return 1.0 / (1.0 + tl.exp(-value))


@triton.jit
def token_weight(cosine, alpha, beta, WEIGHTED: tl.constexpr):
    """Weight of a token in its cluster. alpha, beta: loaded scalars."""
    if WEIGHTED:
        weight = sigmoid(beta + alpha * cosine)
    else:
        weight = tl.full(cosine.shape, 1.0, cosine.dtype)
    return weight


@triton.jit
def next_part(rest, dtype: tl.constexpr):
    """(the next part of `rest` in `dtype`, what it leaves): 3 of bfloat16 make a float32, 2 of float16 where the
    rest is within float16's range."""
    part = narrow(rest, dtype)
    return part, rest - widen(part)


@triton.jit
def pieces(record, tokens, centres, channels):
    """Pointers into what a round keeps for an item (`saved_size`): cosine [N], scale [N], pooled, unit, mean, result
    [O, C], unit_scale, mass, share [O]."""
    matrix = record + 2 * tokens
    size = centres * channels
    vector = matrix + 4 * size
    return (
        record,
        record + tokens,
        matrix,
        matrix + size,
        matrix + 2 * size,
        matrix + 3 * size,
        vector,
        vector + centres,
        vector + 2 * centres,
    )


@triton.jit
def is_last(ticket, arrivals):
    """Whether this program is the last of `arrivals` to come to `ticket`, a zero before. It then sees all that the
    others stored. Who is last decides nothing that changes a sum."""
    tl.debug_barrier()  # the stores of all threads stand before the one thread that releases them
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    tl.debug_barrier()
    return last


class RoundLayout(NamedTuple):
    """A round of `icm`: N tokens of an image `hw`, O centres, and where its parts of an item's labels and `saved`
    begin. query [J, C], projected [J, C], offset [J], product [N, J]: behind the record, of variant paper alone."""

    hw: tuple[int, int]
    grid: tuple[int, int]
    labels: int
    record: int
    query: int
    projected: int
    offset: int
    product: int

    @property
    def tokens(self) -> int:
        return self.hw[0] * self.hw[1]

    @property
    def centres(self) -> int:
        return self.grid[0] * self.grid[1]


def round_layouts(
    hw: Sequence[int], grids: Sequence[int], channels: int, variant: int
) -> tuple[list[RoundLayout], int, int]:
    """(rounds, labels, elements of `saved`) of an item of `icm`."""
    columns = grids[-2] * grids[-1]
    image, labels, saved = (hw[0], hw[1]), 0, 0
    rounds = []
    for t in range(len(grids) // 2):
        grid = grids[2 * t], grids[2 * t + 1]
        tokens = image[0] * image[1]
        query = saved + saved_size(tokens, grid[0] * grid[1], channels)
        projected = query + columns * channels
        offset = projected + columns * channels
        product = offset + columns
        rounds.append(RoundLayout(image, grid, labels, saved, query, projected, offset, product))
        labels += tokens
        saved = query
        if variant == 0:
            saved = product + (tokens * columns if t > 0 else 0)
        image = grid
    return rounds, labels, saved


def precision(dtype: torch.dtype) -> str:
    """Products of float32 are as exact as float32, whatever the user lets his own be."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def part_count(dtype: torch.dtype) -> int:
    """Parts in `dtype` that hold what a float32 factor of such tokens needs."""
    return {torch.bfloat16: 3, torch.float16: 2}.get(dtype, 1)
