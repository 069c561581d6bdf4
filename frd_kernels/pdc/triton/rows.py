"""The depthwise 3x3 differences with stride 1 and dilation 1: a program goes down the rows of an image and keeps the
last three in registers, so that it reads each pixel once.

Where channels come first, a thread holds a strip of STRIP neighbouring columns, one vector of memory, as STRIP tiles
[channels, strips]; the window of the next column consists of the next tiles. Else STRIP is 1 and vectors run over the
channels. UNROLL 4 is the number of rows that are in registers or being loaded: after 4 rows each is in its first
registers again, and none had to be copied.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton_ops import narrow, widen_all
from .stencil import combine, combine_transposed, correlate, plain_weights
from .tiles import (
    UNROLL_ROWS,
    Launch,
    channel_starts,
    log2,
    over_channels,
    over_positions,
    split_vectors,
    store_sums,
    tile_bias,
    tile_weights,
)


@triton.jit
def _join(tiles, STRIP: tl.constexpr):
    """STRIP tiles [m, n] -> [m, n, STRIP]."""
    parts = tiles
    for level in tl.static_range(log2(STRIP)):
        joined = ()
        for i in tl.static_range(STRIP // 2 ** (level + 1)):
            pairs = tl.join(parts[i], parts[i + STRIP // 2 ** (level + 1)])
            joined += (pairs.reshape(tiles[0].shape[0], tiles[0].shape[1], 2 ** (level + 1)),)
        parts = joined
    return parts[0]


@triton.jit
def _row_masks(mask, column, width, STRIP: tl.constexpr):
    """Of the columns before, in and after the strips that begin at `column`: whether they are in the image."""
    last = column + STRIP
    before = mask & ((column > 0) & (column <= width))
    inside = mask & ((column >= 0) & (column < width))
    return before, inside, mask & ((last >= 0) & (last < width))


@triton.jit
def _load_row(at, masks, exists, step, STRIP: tl.constexpr):
    """The STRIP + 2 columns from before to after the strips at `at`, in the compute type. exists: whether the row is
    in the image."""
    tiles = (tl.load(at - step, mask=masks[0] & exists, other=0.0),)
    inside = masks[1] & exists
    if STRIP == 1:
        tiles += (tl.load(at, mask=inside, other=0.0),)
    else:
        lanes = tl.arange(0, STRIP)[None, None, :]
        tiles += split_vectors(tl.load(at[:, :, None] + lanes, mask=inside[:, :, None], other=0.0), STRIP)
    tiles += (tl.load(at + STRIP * step, mask=masks[2] & exists, other=0.0),)
    return widen_all(tiles, STRIP + 2)


@triton.jit
def _store_row(at, tiles, mask, STRIP: tl.constexpr):
    rounded = ()
    for i in tl.static_range(STRIP):
        rounded += (narrow(tiles[i], at.dtype.element_ty),)
    if STRIP == 1:
        tl.store(at, rounded[0], mask=mask)
    else:
        lanes = tl.arange(0, STRIP)[None, None, :]
        tl.store(at[:, :, None] + lanes, _join(rounded, STRIP), mask=mask[:, :, None])


@triton.jit
def _window(above, centre, below, i: tl.constexpr):
    """The window of column i of the strips."""
    return (
        above[i],
        above[i + 1],
        above[i + 2],
        centre[i],
        centre[i + 1],
        centre[i + 2],
        below[i],
        below[i + 1],
        below[i + 2],
    )


@triton.jit
def rows_forward(
    x,
    weight,
    bias,
    y,
    geometry,
    run_rows,
    BIAS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    STRIP: tl.constexpr,
    UNROLL: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y = sum_k w_k (x_plus_k - theta x_minus_k) + bias.

    STRIP > 1 needs pad_x 1 and a width of whole strips; UNROLL divides rows and run_rows.
    Grid: (images * runs of run_rows rows * blocks of POSITIONS strips, blocks of channels).
    """
    channels = geometry.channels
    height = geometry.height
    width = geometry.width
    rows = geometry.rows
    columns = geometry.columns
    blocks = tl.cdiv(columns, POSITIONS * STRIP)
    runs = tl.cdiv(rows, run_rows)
    block = tl.program_id(0) % blocks
    run = tl.program_id(0) // blocks % runs
    image = tl.program_id(0) // (blocks * runs)
    index = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = over_channels(index, CHANNELS_FIRST)
    start = (block * POSITIONS + over_positions(tl.arange(0, POSITIONS), CHANNELS_FIRST)) * STRIP
    column = start + (1 - geometry.pad_x)
    mask = (channel < channels) & (start < columns)
    step = 1 if CHANNELS_FIRST else channels
    weights = tile_weights(weight, index, channels, CHANNELS_FIRST)
    shift = tile_bias(bias, index, channels, CHANNELS_FIRST, BIAS)
    masks = _row_masks(mask, column, width, STRIP)
    first = run * run_rows
    last = tl.minimum(first + run_rows, rows) - 1
    top = first - geometry.pad_y
    pitch = width * step
    at = channel_starts(x, image, channel, channels, height * width, CHANNELS_FIRST) + (
        top * pitch + column * step
    )
    to = channel_starts(y, image, channel, channels, rows * columns, CHANNELS_FIRST) + (
        first * (columns * step) + start * step
    )
    above = _load_row(at, masks, (top >= 0) & (top < height), step, STRIP)
    at += pitch
    centre = _load_row(at, masks, (top >= -1) & (top + 1 < height), step, STRIP)
    at += pitch
    below = _load_row(at, masks, (top >= -2) & (top + 2 < height), step, STRIP)
    for group in range(first, last + 1, UNROLL):
        for inner in tl.static_range(UNROLL):
            row = group + inner
            ahead = row - geometry.pad_y + 3
            at += pitch
            # Loaded while this row is computed.
            following = _load_row(at, masks, (row < last) & ((ahead >= 0) & (ahead < height)), step, STRIP)
            totals = ()
            for i in tl.static_range(STRIP):
                totals += (combine(_window(above, centre, below, i), weights, shift, KIND, THETA),)
            _store_row(to, totals, mask, STRIP)
            to += columns * step
            above = centre
            centre = below
            below = following


def launch_forward(
    launch: Launch, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """Writes y."""
    tile = launch.strip_tile(launch.columns, launch.vector)
    programs, options = launch.walk(tile, launch.rows, tile.blocks(launch.columns), 1)
    rows_forward[(programs, triton.cdiv(launch.channels, tile.channels))](
        x,
        weight,
        weight if bias is None else bias,
        y,
        launch.geometry,
        BIAS=bias is not None,
        **launch.constants,
        **options,
    )


@triton.jit
def rows_backward(
    grad,
    x,
    weight,
    dx,
    partial,  # [parts, 10, C]
    geometry,
    run_rows,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    STRIP: tl.constexpr,
    UNROLL: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dx(p) = sum_k w_k (dy(p - plus_k) - theta dy(p - minus_k)), and the sums over a part of the positions
    dw_k = sum_p dy (x_plus_k - theta x_minus_k), db = sum_p dy.

    For padding 1, where dy is as large as x. STRIP and UNROLL as for `rows_forward`.
    Grid: (parts = images * runs of run_rows rows * blocks of POSITIONS strips, blocks of channels).
    """
    channels = geometry.channels
    height = geometry.height
    width = geometry.width
    blocks = tl.cdiv(width, POSITIONS * STRIP)
    runs = tl.cdiv(height, run_rows)
    block = tl.program_id(0) % blocks
    run = tl.program_id(0) // blocks % runs
    image = tl.program_id(0) // (blocks * runs)
    index = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = over_channels(index, CHANNELS_FIRST)
    column = (block * POSITIONS + over_positions(tl.arange(0, POSITIONS), CHANNELS_FIRST)) * STRIP
    mask = (channel < channels) & (column < width)
    step = 1 if CHANNELS_FIRST else channels
    weights = plain_weights(tile_weights(weight, index, channels, CHANNELS_FIRST), KIND, THETA)
    masks = _row_masks(mask, column, width, STRIP)
    zero = tl.zeros(mask.shape, weights[0].dtype)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    bias_sums = zero
    first = run * run_rows
    pitch = width * step
    offset = channel_starts(
        first * pitch + column * step, image, channel, channels, height * width, CHANNELS_FIRST
    )
    at = x + offset
    at_grad = grad + offset
    to = dx + offset
    last = tl.minimum(first + run_rows, height) - 1
    above = _load_row(at - pitch, masks, first > 0, step, STRIP)
    centre = _load_row(at, masks, first < height, step, STRIP)
    grad_above = _load_row(at_grad - pitch, masks, first > 0, step, STRIP)
    grad_centre = _load_row(at_grad, masks, first < height, step, STRIP)
    for group in range(first, last + 1, UNROLL):
        for inner in tl.static_range(UNROLL):
            row = group + inner
            at += pitch
            at_grad += pitch
            below = _load_row(at, masks, row + 1 < height, step, STRIP)
            grad_below = _load_row(at_grad, masks, row + 1 < height, step, STRIP)
            totals = ()
            for i in tl.static_range(STRIP):
                if NEED_DW:
                    g = grad_centre[i + 1]
                    sums = correlate(sums, _window(above, centre, below, i), g, KIND, THETA)
                    bias_sums += g
                if NEED_DX:
                    window = _window(grad_above, grad_centre, grad_below, i)
                    totals += (combine_transposed(window, weights, KIND, THETA),)
            if NEED_DX:
                _store_row(to, totals, mask, STRIP)
                to += pitch
            above = centre
            centre = below
            grad_above = grad_centre
            grad_centre = grad_below
    if NEED_DW:
        store_sums(partial, sums, bias_sums, index, channels, CHANNELS_FIRST)


def launch_backward(
    launch: Launch,
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor,
    need_dx: bool,
    need_dw: bool,
) -> torch.Tensor:
    """Writes dx; returns the partial sums [parts, 10, C] of dw and db."""
    tile = launch.strip_tile(launch.width, launch.backward_vector)
    # A run stores ten sums for each channel: over a single row these could be more values than the row has.
    programs, options = launch.walk(tile, launch.height, tile.blocks(launch.width), UNROLL_ROWS)
    partial = launch.partial_sums(x, programs if need_dw else 0)
    rows_backward[(programs, triton.cdiv(launch.channels, tile.channels))](
        grad,
        x,
        weight,
        dx,
        partial,
        launch.geometry,
        NEED_DX=need_dx,
        NEED_DW=need_dw,
        **launch.constants,
        **options,
    )
    return partial
