"""Triton kernels of the depthwise pixel difference convolution for any geometry; `triton.py` launches them.

Images are dense [B, H, W, C], or [B, C, H, W] where CHANNELS_FIRST. A tile is [positions, channels], or the other
way round where CHANNELS_FIRST: its last axis is the contiguous one.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from .._triton_ops import narrow, widen, widen_all
from .triton_stencil import (
    WEIGHTS,
    combine,
    combine_transposed,
    correlate,
    load_spread_window,
    load_weights,
    load_window,
    plain_weights,
)

SUMS = tl.constexpr(10)  # of a channel: the 9 of dw, then db


@triton.jit
def over_positions(index, CHANNELS_FIRST: tl.constexpr):
    return index[None, :] if CHANNELS_FIRST else index[:, None]


@triton.jit
def over_channels(index, CHANNELS_FIRST: tl.constexpr):
    return index[:, None] if CHANNELS_FIRST else index[None, :]


@triton.jit
def channel_starts(tensor, image, channel, channels, pixels, CHANNELS_FIRST: tl.constexpr):
    """Pointers to the first pixel of each channel of an image; of an offset as `tensor`, offsets."""
    start = tensor + image.to(tl.int64) * (channels * pixels)
    return start + channel * (pixels if CHANNELS_FIRST else 1)


@triton.constexpr_function
def log2(n: int) -> int:
    return n.bit_length() - 1


@triton.jit
def split_vectors(vectors, STRIP: tl.constexpr):
    """[m, n, STRIP] -> STRIP tiles [m, n]."""
    parts = (vectors,)
    for level in tl.static_range(log2(STRIP)):
        even = ()
        odd = ()
        for i in tl.static_range(2**level):
            pairs = parts[i].reshape(vectors.shape[0], vectors.shape[1], STRIP // 2 ** (level + 1), 2)
            first, second = tl.split(pairs)
            even += (first,)
            odd += (second,)
        parts = even + odd
    tiles = ()
    for i in tl.static_range(STRIP):
        tiles += (parts[i].reshape(vectors.shape[0], vectors.shape[1]),)
    return tiles


@triton.jit
def tile_weights(weight, index, channels, CHANNELS_FIRST: tl.constexpr):
    """The 9 weights of the channels `index` of a parameter [C, 1, 3, 3], shaped as the channels of a tile."""
    if CHANNELS_FIRST:
        channel = index[:, None]
        weights = load_weights(weight + channel * WEIGHTS, 1, channel < channels)
    else:
        # A thread holds several channels of a pixel: loaded one by one they would lie 9 apart.
        k = tl.arange(0, 16)[None, None, :]
        channel = index[None, :, None]
        packed = tl.load(
            weight + (channel * WEIGHTS + k), mask=(channel < channels) & (k < WEIGHTS), other=0.0
        )
        weights = widen_all(split_vectors(packed, 16), WEIGHTS)
    return weights


@triton.jit
def tile_bias(bias, index, channels, CHANNELS_FIRST: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        value = over_channels(widen(tl.load(bias + index, mask=index < channels, other=0.0)), CHANNELS_FIRST)
    else:
        value = 0.0
    return value


@triton.jit
def store_sums(partial, sums, bias_sums, index, channels, CHANNELS_FIRST: tl.constexpr):
    """Adds the positions of each tile of sums up: partial [parts, 10, C], part = program_id(0)."""
    start = partial + tl.program_id(0).to(tl.int64) * (channels * SUMS) + index
    for k in tl.static_range(WEIGHTS):
        total = tl.sum(sums[k], axis=1 if CHANNELS_FIRST else 0)
        tl.store(start + k * channels, total, mask=index < channels)
    total = tl.sum(bias_sums, axis=1 if CHANNELS_FIRST else 0)
    tl.store(start + channels * WEIGHTS, total, mask=index < channels)


@triton.jit
def gather_forward(
    x,
    weight,
    bias,
    y,
    channels,
    height,
    width,
    rows,
    columns,
    step_y,
    step_x,
    lead_y,
    lead_x,
    dilation_y,
    dilation_x,
    BIAS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y = sum_k w_k (x_plus_k - theta * x_minus_k) + bias: y [rows x columns] of x [height x width].

    Grid: (images * blocks of positions, blocks of channels)."""
    blocks = tl.cdiv(rows * columns, POSITIONS)
    image = tl.program_id(0) // blocks
    index = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = over_channels(index, CHANNELS_FIRST)
    position = tl.program_id(0) % blocks * POSITIONS + tl.arange(0, POSITIONS)
    position = over_positions(position, CHANNELS_FIRST)
    mask = (channel < channels) & (position < rows * columns)
    step = 1 if CHANNELS_FIRST else channels
    window = load_window(
        channel_starts(x, image, channel, channels, height * width, CHANNELS_FIRST),
        position // columns * step_y - lead_y,
        position % columns * step_x - lead_x,
        height,
        width,
        width * step,
        step,
        dilation_y,
        dilation_x,
        mask,
        KIND,
    )
    weights = tile_weights(weight, index, channels, CHANNELS_FIRST)
    total = combine(window, weights, tile_bias(bias, index, channels, CHANNELS_FIRST, BIAS), KIND, THETA)
    to = channel_starts(y, image, channel, channels, rows * columns, CHANNELS_FIRST) + position * step
    tl.store(to, narrow(total, y.dtype.element_ty), mask=mask)


@triton.jit
def gather_backward(
    grad,
    x,
    weight,
    dx,
    partial,
    channels,
    height,
    width,
    rows,
    columns,
    step_y,
    step_x,
    lead_y,
    lead_x,
    span_y,
    span_x,
    dilation_y,
    dilation_x,
    runs,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dx [height x width], and the sums of dw and db that belong to a run: a part of the positions of an image.

    span: from the first to the last tap of a window. Grid: (images * runs, blocks of channels).
    """
    image = tl.program_id(0) // runs
    run = tl.program_id(0) % runs
    index = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = over_channels(index, CHANNELS_FIRST)
    lanes = over_positions(tl.arange(0, POSITIONS), CHANNELS_FIRST)
    step = 1 if CHANNELS_FIRST else channels
    image_x = channel_starts(x, image, channel, channels, height * width, CHANNELS_FIRST)
    image_grad = channel_starts(grad, image, channel, channels, rows * columns, CHANNELS_FIRST)
    weights = tile_weights(weight, index, channels, CHANNELS_FIRST)
    if NEED_DW:
        zero = tl.zeros((lanes + channel).shape, weights[0].dtype)
        sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
        bias_sums = zero
        per_run = tl.cdiv(tl.cdiv(rows * columns, POSITIONS), runs) * POSITIONS
        for first in range(run * per_run, tl.minimum((run + 1) * per_run, rows * columns), POSITIONS):
            position = first + lanes
            mask = (channel < channels) & (position < rows * columns)
            g = widen(tl.load(image_grad + position * step, mask=mask, other=0.0))
            window = load_window(
                image_x,
                position // columns * step_y - lead_y,
                position % columns * step_x - lead_x,
                height,
                width,
                width * step,
                step,
                dilation_y,
                dilation_x,
                mask,
                KIND,
            )
            sums = correlate(sums, window, g, KIND, THETA)
            bias_sums += g
        store_sums(partial, sums, bias_sums, index, channels, CHANNELS_FIRST)
    if NEED_DX:
        if KIND != 3:
            weights = plain_weights(weights, KIND, THETA)
        image_dx = channel_starts(dx, image, channel, channels, height * width, CHANNELS_FIRST)
        per_run = tl.cdiv(tl.cdiv(height * width, POSITIONS), runs) * POSITIONS
        for first in range(run * per_run, tl.minimum((run + 1) * per_run, height * width), POSITIONS):
            position = first + lanes
            mask = (channel < channels) & (position < height * width)
            window = load_spread_window(
                image_grad,
                position // width + lead_y - span_y,
                position % width + lead_x - span_x,
                rows,
                columns,
                columns * step,
                step,
                dilation_y,
                dilation_x,
                step_y,
                step_x,
                mask,
                KIND,
            )
            total = combine_transposed(window, weights, KIND, THETA)
            tl.store(image_dx + position * step, narrow(total, dx.dtype.element_ty), mask=mask)


@triton.jit
def reduce_sums(partial, dw, db, parts, channels, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """dw [C, 9] and db [C] from partial [parts, 10, C], added in a fixed order. Grid: (blocks of 10 C columns,)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < channels * SUMS
    total = tl.zeros((PARTS, COLUMNS), partial.dtype.element_ty)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        at = partial + part.to(tl.int64) * (channels * SUMS) + column[None, :]
        total += tl.load(at, mask=(part < parts) & mask[None, :], other=0.0)
    value = narrow(tl.sum(total, axis=0), dw.dtype.element_ty)
    k = column // channels
    channel = column % channels
    tl.store(dw + (channel * WEIGHTS + k), value, mask=mask & (k < WEIGHTS))
    tl.store(db + channel, value, mask=mask & (k == WEIGHTS))
