"""The gradients of the depthwise PDC block on Triton: `frd_triton::pdc_block_backward`.

Nothing is saved by the forward pass: each kernel computes the hidden tile again. Sums over pixels are split by the
shapes alone and added in a fixed order.
"""

# Triton functions take no annotations.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, compute_type, matmul_add, narrow, on_device, widen
from ...pdc.triton.depthwise import pdc2d_depthwise_backward
from ...pdc.triton.tiles import Launch, channel_starts, over_channels, over_positions
from .hidden import (
    MIN_PROGRAMS,
    SMALL_IMAGE,
    Stencil,
    Tile,
    dot_precision,
    fixed,
    hidden_tile,
    hidden_window,
    relu,
    stencil_of,
    tile_corner,
)

OptionalTensor = torch.Tensor | None

_MAX_SPLITS = 64
_PARTIAL_ELEMENTS = 1 << 20  # 4 MB of float32, which stay in the L2 cache


@triton.jit
def load_gradient(grad, image, position, index, filters, pixels, CHANNELS_FIRST: tl.constexpr):
    """The tile of grad [filters, pixels] of an image; 0 beyond it."""
    pixel = over_positions(position, CHANNELS_FIRST)
    filter = over_channels(index, CHANNELS_FIRST)
    start = channel_starts(grad, image, filter, filters, pixels, CHANNELS_FIRST)
    mask = (filter < filters) & (pixel < pixels)
    return tl.load(start + pixel * (1 if CHANNELS_FIRST else filters), mask=mask, other=0.0)


@triton.jit
def multiply_gradient(
    total,
    gradient,
    point,
    slab,
    index,
    channels,
    filters,
    CHANNELS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + point^T gradient over the filters `index`, for the channels `slab`."""
    channel = over_channels(slab, CHANNELS_FIRST)
    source = over_positions(index, CHANNELS_FIRST)
    mask = (channel < channels) & (source < filters)
    factors = tl.load(point + (source * channels + channel), mask=mask, other=0.0)
    if CHANNELS_FIRST:
        total = matmul_add(factors, gradient, total, PRECISION)
    else:
        total = matmul_add(gradient, factors, total, PRECISION)
    return total


@triton.jit
def _hidden_gradient(
    grad,
    x,
    stencil,
    point,  # [filters, channels]
    hidden_grad,
    geometry,
    filters,
    tiles,  # of an image
    per_program,  # channels of a program, whole slabs
    BIAS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    POSITIONS: tl.constexpr,
    FILTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden_grad = point^T grad, 0 where the hidden value is <= 0: [channels, pixels] of each image.

    WHOLE: FILTERS covers all filters. Grid: (images * tiles, blocks of per_program channels).
    """
    image = tl.program_id(0) // tiles
    position = tl.program_id(0) % tiles * POSITIONS + tl.arange(0, POSITIONS)
    corner = tile_corner(position, geometry, CHANNELS_FIRST)
    pixel = over_positions(position, CHANNELS_FIRST)
    index = tl.arange(0, FILTERS)
    channels = geometry.channels
    pixels = geometry.rows * geometry.columns
    compute: tl.constexpr = compute_type(x.dtype.element_ty)
    shape: tl.constexpr = (CHANNELS, POSITIONS) if CHANNELS_FIRST else (POSITIONS, CHANNELS)
    if WHOLE:
        gradient = load_gradient(grad, image, position, index, filters, pixels, CHANNELS_FIRST)
    begin = tl.program_id(1) * per_program
    for first in range(begin, tl.minimum(begin + per_program, channels), CHANNELS):
        slab = first + tl.arange(0, CHANNELS)
        # Loaded during the product.
        window = hidden_window(x, image, corner, slab, geometry, CHANNELS_FIRST, KIND)
        total = tl.zeros(shape, compute)
        # fmt: off
        if WHOLE:
            total = multiply_gradient(
                total, gradient, point, slab, index, channels, filters, CHANNELS_FIRST, PRECISION
            )
        else:
            for first_filter in range(0, filters, FILTERS):
                filter = first_filter + index
                gradient = load_gradient(grad, image, position, filter, filters, pixels, CHANNELS_FIRST)
                total = multiply_gradient(
                    total, gradient, point, slab, filter, channels, filters, CHANNELS_FIRST, PRECISION
                )
        # fmt: on
        hidden = hidden_tile(window, stencil, slab, channels, BIAS, CHANNELS_FIRST, KIND, THETA)
        total = narrow(tl.where(fixed(hidden) <= 0, 0.0, total), x.dtype.element_ty)
        channel = over_channels(slab, CHANNELS_FIRST)
        start = channel_starts(hidden_grad, image, channel, channels, pixels, CHANNELS_FIRST)
        to = start + pixel * (1 if CHANNELS_FIRST else channels)
        tl.store(to, total, mask=(channel < channels) & (pixel < pixels))


def _launch_hidden(
    launch: Launch,
    grad: torch.Tensor,
    x: torch.Tensor,
    stencil: Stencil,
    point: torch.Tensor,
    hidden_grad: torch.Tensor,
    constants: dict[str, object],
) -> None:
    """Writes hidden_grad."""
    filters = grad.shape[1]
    tile = _hidden_tile_size(launch, x.dtype, filters)
    tiles = triton.cdiv(launch.rows * launch.columns, tile.positions)
    slabs = triton.cdiv(launch.channels, tile.channels)
    per_program = triton.cdiv(slabs, min(slabs, triton.cdiv(MIN_PROGRAMS, launch.batch * tiles)))
    _hidden_gradient[(launch.batch * tiles, triton.cdiv(slabs, per_program))](
        grad,
        x,
        stencil,
        point,
        hidden_grad,
        launch.geometry,
        filters,
        tiles,
        per_program * tile.channels,
        WHOLE=filters <= tile.filters,
        **constants,
        **tile.options(),
    )


def _hidden_tile_size(launch: Launch, dtype: torch.dtype, filters: int) -> Tile:
    """Does not depend on the batch, so that a sample's sums do not."""
    max_filters = max(16, triton.next_power_of_2(filters))
    pixels = launch.rows * launch.columns
    if INTERPRETED.value:  # whose cost is per program, not per element
        return Tile(max(16, min(512, triton.next_power_of_2(pixels))), min(max_filters, 128), 32, 4)
    if dtype == torch.float64:
        return Tile(16, 16, 16, 8, 255)
    if dtype == torch.float32:
        return Tile(32, 32, 32, 8)
    if pixels <= SMALL_IMAGE:
        return Tile(16, min(max_filters, 256), 32, 4)
    # Where channels come first each pixel is a load of its own: twice the positions would fill the registers.
    return Tile(32 if launch.channels_first else 64, min(max_filters, 256), 32, 8)


@triton.jit
def _point_gradient(
    grad,
    x,
    stencil,
    partial,  # [splits, filters * channels + filters]
    geometry,
    filters,
    tiles,  # of an image
    all_tiles,  # of all images
    BIAS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    POSITIONS: tl.constexpr,
    FILTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_point = sum_p grad relu(hidden)^T [filters, channels] and d_point_bias = sum_p grad [filters], over a split of
    the tiles. Grid: (splits, blocks of filters, blocks of channels)."""
    filter = tl.program_id(1) * FILTERS + tl.arange(0, FILTERS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    channels = geometry.channels
    pixels = geometry.rows * geometry.columns
    compute: tl.constexpr = compute_type(x.dtype.element_ty)
    total = tl.zeros((FILTERS, CHANNELS), compute)
    sums = tl.zeros((FILTERS,), compute)
    per_program = tl.cdiv(all_tiles, tl.num_programs(0))
    begin = tl.program_id(0) * per_program
    for tile in range(begin, tl.minimum(begin + per_program, all_tiles)):
        image = tile // tiles
        position = tile % tiles * POSITIONS + tl.arange(0, POSITIONS)
        corner = tile_corner(position, geometry, CHANNELS_FIRST)
        window = hidden_window(x, image, corner, channel, geometry, CHANNELS_FIRST, KIND)
        gradient = load_gradient(grad, image, position, filter, filters, pixels, CHANNELS_FIRST)
        hidden = hidden_tile(window, stencil, channel, channels, BIAS, CHANNELS_FIRST, KIND, THETA)
        # Outside the image it is the bias, which may be infinite.
        hidden = tl.where(corner[2], relu(hidden), 0.0)
        hidden = fixed(narrow(hidden, x.dtype.element_ty))
        sums += tl.sum(widen(gradient), axis=1 if CHANNELS_FIRST else 0)
        if CHANNELS_FIRST:
            total = matmul_add(gradient, tl.trans(hidden), total, PRECISION)
        else:
            total = matmul_add(tl.trans(gradient), hidden, total, PRECISION)
    start = partial + tl.program_id(0).to(tl.int64) * (filters * channels + filters)
    mask = (filter < filters)[:, None] & (channel < channels)[None, :]
    tl.store(start + ((filter * channels)[:, None] + channel[None, :]), total, mask=mask)
    if tl.program_id(2) == 0:
        tl.store(start + (filters * channels + filter), sums, mask=filter < filters)


def _launch_point(
    launch: Launch, grad: torch.Tensor, x: torch.Tensor, stencil: Stencil, constants: dict[str, object]
) -> torch.Tensor:
    """The partial sums [splits, filters * channels + filters] of d_point and d_point_bias."""
    filters = grad.shape[1]
    weights = filters * launch.channels
    tile = _point_tile_size(launch, x.dtype, filters)
    tiles = triton.cdiv(launch.rows * launch.columns, tile.positions)
    blocks = (triton.cdiv(filters, tile.filters), triton.cdiv(launch.channels, tile.channels))
    wanted = triton.cdiv(MIN_PROGRAMS, blocks[0] * blocks[1])
    splits = min(launch.batch * tiles, wanted, _MAX_SPLITS, max(1, _PARTIAL_ELEMENTS // weights))
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty((splits, weights + filters), dtype=compute, device=x.device)
    grid = (splits, *blocks)
    _point_gradient[grid](
        grad,
        x,
        stencil,
        partial,
        launch.geometry,
        filters,
        tiles,
        launch.batch * tiles,
        **constants,
        **tile.options(),
    )
    return partial


def _point_tile_size(launch: Launch, dtype: torch.dtype, filters: int) -> Tile:
    max_filters = max(16, triton.next_power_of_2(filters))
    width = max(16, triton.next_power_of_2(launch.channels))
    if INTERPRETED.value:
        pixels = triton.next_power_of_2(launch.rows * launch.columns)
        return Tile(max(16, min(512, pixels)), min(max_filters, 128), min(width, 128), 4)
    if dtype == torch.float64:
        return Tile(16, 16, 16, 8, 255)
    if dtype == torch.float32:
        return Tile(32, min(max_filters, 64), min(width, 32), 4)
    return Tile(32, min(max_filters, 128), min(width, 64), 8)


@triton.jit
def _add_splits(
    partial, d_point, d_bias, splits, weights, filters, SPLITS: tl.constexpr, COLUMNS: tl.constexpr
):
    """d_point [weights] and d_bias [filters] = sum_splits partial [splits, weights + filters], in a fixed order.

    Grid: (blocks of COLUMNS,).
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    width = weights + filters
    total = tl.zeros((SPLITS, COLUMNS), partial.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)[:, None]
        mask = (split < splits) & (column < width)[None, :]
        total += tl.load(partial + split.to(tl.int64) * width + column[None, :], mask=mask, other=0.0)
    value = narrow(tl.sum(total, axis=0), d_point.dtype.element_ty)
    tl.store(d_point + column, value, mask=column < weights)
    tl.store(d_bias + (column - weights), value, mask=(column >= weights) & (column < width))


def _launch_add(partial: torch.Tensor, d_point: torch.Tensor, d_bias: torch.Tensor) -> None:
    """Writes d_point and d_bias."""
    splits, width = partial.shape
    columns = 4096 if INTERPRETED.value else 128
    _add_splits[(triton.cdiv(width, columns),)](
        partial,
        d_point,
        d_bias,
        splits,
        d_point.numel(),
        d_bias.numel(),
        SPLITS=min(16, triton.next_power_of_2(splits)),
        COLUMNS=columns,
        num_warps=4,
    )


def pdc_block_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    pdc_bias: OptionalTensor,
    point_weight: torch.Tensor,
    kind: int,
    theta: float,
    stride: list[int],
    dilation: list[int],
    need_point_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad [B, Co, Ho, Wo] -> dx [B, C, H, W], d_pdc [C, 1, 3, 3], d_pdc_bias [C], d_point [Co, C, 1, 1],
    d_point_bias [Co] or, if not needed, [0]."""
    launch = Launch(x, kind, theta, stride, dilation, dilation)
    filters = point_weight.shape[0]
    x = launch.dense(x)
    hidden_grad = launch.empty(x, launch.rows, launch.columns)
    d_point = x.new_zeros((filters, launch.channels, 1, 1))
    d_point_bias = x.new_zeros(filters)
    if launch.batch:
        grad, point_weight = launch.dense(grad), point_weight.contiguous()
        stencil = stencil_of(launch, pdc_weight, pdc_bias)
        constants = launch.constants | {"BIAS": pdc_bias is not None, "PRECISION": dot_precision(x.dtype)}
        with on_device(x):
            _launch_hidden(launch, grad, x, stencil, point_weight, hidden_grad, constants)
            partial = _launch_point(launch, grad, x, stencil, constants)
            _launch_add(partial, d_point, d_point_bias)
    geometry = (kind, theta, stride, dilation, dilation)
    dx, d_pdc, d_pdc_bias = pdc2d_depthwise_backward(hidden_grad, x, pdc_weight, *geometry, True, True)
    return dx, d_pdc, d_pdc_bias, d_point, d_point_bias if need_point_bias else d_point_bias.new_empty(0)
