"""The depthwise difference convolution for any geometry: a program loads the whole window of each position."""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton_ops import narrow, widen
from .stencil import (
    combine,
    combine_transposed,
    correlate,
    load_gradient_window,
    load_window,
    plain_weights,
    reach,
    window_corner,
)
from .tiles import (
    Launch,
    channel_starts,
    over_channels,
    over_positions,
    store_sums,
    tile_bias,
    tile_weights,
)


@triton.jit
def gather_forward(
    x,
    weight,
    bias,
    y,
    geometry,
    BIAS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y = sum_k w_k (x_plus_k - theta x_minus_k) + bias.

    Grid: (images * blocks of positions of y, blocks of channels).
    """
    channels = geometry.channels
    pixels = geometry.rows * geometry.columns
    blocks = tl.cdiv(pixels, POSITIONS)
    image = tl.program_id(0) // blocks
    index = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = over_channels(index, CHANNELS_FIRST)
    position = tl.program_id(0) % blocks * POSITIONS + tl.arange(0, POSITIONS)
    position = over_positions(position, CHANNELS_FIRST)
    mask = (channel < channels) & (position < pixels)
    image_x = channel_starts(x, image, channel, channels, geometry.height * geometry.width, CHANNELS_FIRST)
    top, left = window_corner(position, geometry)
    window = load_window(image_x, top, left, geometry, mask, CHANNELS_FIRST, KIND)
    weights = tile_weights(weight, index, channels, CHANNELS_FIRST)
    total = combine(window, weights, tile_bias(bias, index, channels, CHANNELS_FIRST, BIAS), KIND, THETA)
    image_y = channel_starts(y, image, channel, channels, pixels, CHANNELS_FIRST)
    to = image_y + position * (1 if CHANNELS_FIRST else channels)
    tl.store(to, narrow(total, y.dtype.element_ty), mask=mask)


def launch_forward(
    launch: Launch, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor
) -> None:
    """Writes y."""
    tile = launch.tile(launch.rows * launch.columns, launch.vector)
    blocks = tile.blocks(launch.rows * launch.columns)
    gather_forward[(launch.batch * blocks, triton.cdiv(launch.channels, tile.channels))](
        x,
        weight,
        weight if bias is None else bias,
        y,
        launch.geometry,
        BIAS=bias is not None,
        **launch.constants,
        **tile.options(),
    )


@triton.jit
def gather_backward(
    grad,
    x,
    weight,
    dx,
    partial,  # [images * runs, 10, C]
    geometry,
    runs,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dx(p) = sum_k w_k (dy(p - plus_k) - theta dy(p - minus_k)), and the sums over a run of the positions of an image
    dw_k = sum_p dy (x_plus_k - theta x_minus_k), db = sum_p dy.

    Grid: (images * runs, blocks of channels).
    """
    channels = geometry.channels
    x_pixels = geometry.height * geometry.width
    y_pixels = geometry.rows * geometry.columns
    image = tl.program_id(0) // runs
    run = tl.program_id(0) % runs
    index = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel = over_channels(index, CHANNELS_FIRST)
    lanes = over_positions(tl.arange(0, POSITIONS), CHANNELS_FIRST)
    step = 1 if CHANNELS_FIRST else channels
    image_x = channel_starts(x, image, channel, channels, x_pixels, CHANNELS_FIRST)
    image_grad = channel_starts(grad, image, channel, channels, y_pixels, CHANNELS_FIRST)
    weights = tile_weights(weight, index, channels, CHANNELS_FIRST)
    if NEED_DW:
        zero = tl.zeros((lanes + channel).shape, weights[0].dtype)
        sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
        bias_sums = zero
        per_run = tl.cdiv(tl.cdiv(y_pixels, POSITIONS), runs) * POSITIONS
        for first in range(run * per_run, tl.minimum((run + 1) * per_run, y_pixels), POSITIONS):
            position = first + lanes
            mask = (channel < channels) & (position < y_pixels)
            g = widen(tl.load(image_grad + position * step, mask=mask, other=0.0))
            top, left = window_corner(position, geometry)
            window = load_window(image_x, top, left, geometry, mask, CHANNELS_FIRST, KIND)
            sums = correlate(sums, window, g, KIND, THETA)
            bias_sums += g
        store_sums(partial, sums, bias_sums, index, channels, CHANNELS_FIRST)
    if NEED_DX:
        if KIND != 3:
            weights = plain_weights(weights, KIND, THETA)
        image_dx = channel_starts(dx, image, channel, channels, x_pixels, CHANNELS_FIRST)
        span_y = 2 * reach(KIND) * geometry.dilation_y
        span_x = 2 * reach(KIND) * geometry.dilation_x
        per_run = tl.cdiv(tl.cdiv(x_pixels, POSITIONS), runs) * POSITIONS
        for first in range(run * per_run, tl.minimum((run + 1) * per_run, x_pixels), POSITIONS):
            position = first + lanes
            mask = (channel < channels) & (position < x_pixels)
            top = position // geometry.width + geometry.pad_y - span_y
            left = position % geometry.width + geometry.pad_x - span_x
            window = load_gradient_window(image_grad, top, left, geometry, mask, CHANNELS_FIRST, KIND)
            total = combine_transposed(window, weights, KIND, THETA)
            tl.store(image_dx + position * step, narrow(total, dx.dtype.element_ty), mask=mask)


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
    pixels = max(launch.rows * launch.columns, launch.height * launch.width)
    tile = launch.tile(pixels, launch.backward_vector)
    runs, _ = launch.runs(tile, tile.blocks(pixels), 1)
    partial = launch.partial_sums(x, launch.batch * runs if need_dw else 0)
    gather_backward[(launch.batch * runs, triton.cdiv(launch.channels, tile.channels))](
        grad,
        x,
        weight,
        dx,
        partial,
        launch.geometry,
        runs,
        NEED_DX=need_dx,
        NEED_DW=need_dw,
        **launch.constants,
        **tile.options(),
    )
    return partial
