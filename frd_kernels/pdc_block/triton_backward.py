"""The gradients of the depthwise PDC block on Triton kernels: `frd_triton::pdc_block_backward`.

Nothing is kept from the forward pass: each kernel computes the hidden tile again, in front of or behind its matrix
product. Sums over pixels are split by the shapes alone and added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton_ops import INTERPRETED, compute_type, matmul_add, narrow, on_device, widen
from ..pdc.triton import Launch, pdc2d_depthwise_backward
from ..pdc.triton_gather import channel_starts, over_channels, over_positions
from .triton_hidden import (
    MIN_PROGRAMS,
    SMALL_IMAGE,
    Tile,
    dot_precision,
    fixed,
    hidden_tile,
    hidden_window,
    relu,
    shapes,
    stencil_weight,
    window_corner,
)

OptionalTensor = torch.Tensor | None

_MAX_SPLITS = 64
_PARTIAL_ELEMENTS = 1 << 20  # 4 MB of float32: they stay in the second cache


@triton.jit
def load_gradient(grad, image, position, index, filters, pixels, CHANNELS_FIRST: tl.constexpr):
    """The tile of grad [filters, pixels] of an image; 0 where it does not exist."""
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
    """total plus the product of a tile of gradients of the filters `index` and the channels `slab` of point."""
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
    weight,
    bias,
    point,  # [filters, channels]
    hidden_grad,
    filters,
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
    weight_step,
    channel_step,
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
    """hidden_grad [channels, rows x columns] of each image: point' grad where the hidden value is not <= 0. WHOLE:
    FILTERS holds all filters. Grid: (images * tiles, shares)."""
    image = tl.program_id(0) // tiles
    position = tl.program_id(0) % tiles * POSITIONS + tl.arange(0, POSITIONS)
    geometry = (step_y, step_x, lead_y, lead_x, dilation_y, dilation_x)
    corner = window_corner(position, rows, columns, geometry, CHANNELS_FIRST)
    pixel = over_positions(position, CHANNELS_FIRST)
    index = tl.arange(0, FILTERS)
    pixels = rows * columns
    compute: tl.constexpr = compute_type(x.dtype.element_ty)
    shape: tl.constexpr = (CHANNELS, POSITIONS) if CHANNELS_FIRST else (POSITIONS, CHANNELS)
    if WHOLE:
        gradient = load_gradient(grad, image, position, index, filters, pixels, CHANNELS_FIRST)
    begin = tl.program_id(1) * per_program
    for first in range(begin, tl.minimum(begin + per_program, channels), CHANNELS):
        slab = first + tl.arange(0, CHANNELS)
        # On its way during the product.
        # fmt: off
        window = hidden_window(x, image, corner, slab, channels, height, width, geometry, CHANNELS_FIRST, KIND)
        total = tl.zeros(shape, compute)
        if WHOLE:
            total = multiply_gradient(
                total, gradient, point, slab, index, channels, filters, CHANNELS_FIRST, PRECISION
            )
        else:
            for behind in range(0, filters, FILTERS):
                behind_index = behind + index
                gradient = load_gradient(grad, image, position, behind_index, filters, pixels, CHANNELS_FIRST)
                total = multiply_gradient(
                    total, gradient, point, slab, behind_index, channels, filters, CHANNELS_FIRST, PRECISION
                )
        hidden = hidden_tile(
            window, weight, bias, slab, channels, (weight_step, channel_step), BIAS, CHANNELS_FIRST, KIND, THETA
        )
        # fmt: on
        total = narrow(tl.where(fixed(hidden) <= 0, 0.0, total), x.dtype.element_ty)
        channel = over_channels(slab, CHANNELS_FIRST)
        start = channel_starts(hidden_grad, image, channel, channels, pixels, CHANNELS_FIRST)
        to = start + pixel * (1 if CHANNELS_FIRST else channels)
        tl.store(to, total, mask=(channel < channels) & (pixel < pixels))


@triton.jit
def _point_gradient(
    grad,
    x,
    weight,
    bias,
    partial,  # [splits, filters * channels + filters]
    filters,
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
    weight_step,
    channel_step,
    tiles,  # of an image
    work,  # tiles of all images
    BIAS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    POSITIONS: tl.constexpr,
    FILTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums over a split of the tiles: of grad relu(hidden)' [filters, channels], then of grad [filters].
    Grid: (splits, blocks of filters, blocks of channels)."""
    filter = tl.program_id(1) * FILTERS + tl.arange(0, FILTERS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    geometry = (step_y, step_x, lead_y, lead_x, dilation_y, dilation_x)
    compute: tl.constexpr = compute_type(x.dtype.element_ty)
    total = tl.zeros((FILTERS, CHANNELS), compute)
    sums = tl.zeros((FILTERS,), compute)
    per_program = tl.cdiv(work, tl.num_programs(0))
    begin = tl.program_id(0) * per_program
    for tile in range(begin, tl.minimum(begin + per_program, work)):
        image = tile // tiles
        position = tile % tiles * POSITIONS + tl.arange(0, POSITIONS)
        corner = window_corner(position, rows, columns, geometry, CHANNELS_FIRST)
        # fmt: off
        window = hidden_window(x, image, corner, channel, channels, height, width, geometry, CHANNELS_FIRST, KIND)
        gradient = load_gradient(grad, image, position, filter, filters, rows * columns, CHANNELS_FIRST)
        hidden = hidden_tile(
            window, weight, bias, channel, channels, (weight_step, channel_step), BIAS, CHANNELS_FIRST, KIND, THETA
        )
        # fmt: on
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


@triton.jit
def _add_splits(
    partial, d_point, d_bias, splits, weights, filters, SPLITS: tl.constexpr, COLUMNS: tl.constexpr
):
    """d_point [weights] and d_bias [filters] from partial [splits, weights + filters], in a fixed order."""
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad [B, Co, Ho, Wo] -> dx [B, C, H, W], d_pdc [C, 1, 3, 3], d_pdc_bias [C], d_point [Co, C, 1, 1],
    d_point_bias [Co]."""
    launch = Launch(x, kind, theta, stride, dilation, dilation)
    filters = point_weight.shape[0]
    x = launch.dense(x)
    hidden_grad = launch.empty(x, launch.rows, launch.columns)
    d_point = x.new_zeros((filters, launch.channels, 1, 1))
    d_point_bias = x.new_zeros(filters)
    if launch.batch:
        grad, point_weight = launch.dense(grad), point_weight.contiguous()
        weight, weight_steps = stencil_weight(launch, pdc_weight)
        bias = weight if pdc_bias is None else pdc_bias.contiguous()
        sizes = (filters, *shapes(launch), *weight_steps)
        constants = launch.constants | {"BIAS": pdc_bias is not None, "PRECISION": dot_precision(x.dtype)}
        with on_device(x):
            _launch_hidden(launch, (grad, x, weight, bias, point_weight, hidden_grad), sizes, constants)
            _launch_point(launch, (grad, x, weight, bias), sizes, constants, d_point, d_point_bias)
    geometry = (kind, theta, stride, dilation, dilation)
    dx, d_pdc, d_pdc_bias = pdc2d_depthwise_backward(hidden_grad, x, pdc_weight, *geometry, True, True)
    return dx, d_pdc, d_pdc_bias, d_point, d_point_bias


def _launch_hidden(
    launch: Launch, operands: tuple[torch.Tensor, ...], sizes: tuple[int, ...], constants: dict[str, object]
) -> None:
    """Writes the last of the operands, the gradient of the hidden values."""
    filters = sizes[0]
    tile = _hidden_tile_size(launch, operands[0].dtype, filters)
    tiles = triton.cdiv(launch.rows * launch.columns, tile.positions)
    slabs = triton.cdiv(launch.channels, tile.channels)
    per_program = triton.cdiv(slabs, min(slabs, triton.cdiv(MIN_PROGRAMS, launch.batch * tiles)))
    _hidden_gradient[(launch.batch * tiles, triton.cdiv(slabs, per_program))](
        *operands,
        *sizes,
        tiles,
        per_program * tile.channels,
        WHOLE=filters <= tile.filters,
        **constants,
        **tile.options(),
    )


def _hidden_tile_size(launch: Launch, dtype: torch.dtype, filters: int) -> Tile:
    """The batch decides nothing that changes a sum: it is not asked."""
    max_filters = max(16, triton.next_power_of_2(filters))
    pixels = launch.rows * launch.columns
    if INTERPRETED.value:  # which pays for programs, not for elements
        return Tile(max(16, min(512, triton.next_power_of_2(pixels))), min(max_filters, 128), 32, 4)
    if dtype == torch.float64:
        return Tile(16, 16, 16, 8, 255)
    if dtype == torch.float32:
        return Tile(32, 32, 32, 8)
    if pixels <= SMALL_IMAGE:
        return Tile(16, min(max_filters, 256), 32, 4)
    # Planes need a load for each pixel: with twice the positions, registers run out.
    return Tile(32 if launch.channels_first else 64, min(max_filters, 256), 32, 8)


def _launch_point(
    launch: Launch,
    operands: tuple[torch.Tensor, ...],
    sizes: tuple[int, ...],
    constants: dict[str, object],
    d_point: torch.Tensor,
    d_point_bias: torch.Tensor,
) -> None:
    """Writes d_point and d_point_bias."""
    x = operands[1]
    filters, weights = sizes[0], d_point.numel()
    tile = _point_tile_size(launch, x.dtype, filters)
    tiles = triton.cdiv(launch.rows * launch.columns, tile.positions)
    blocks = (triton.cdiv(filters, tile.filters), triton.cdiv(launch.channels, tile.channels))
    wanted = triton.cdiv(MIN_PROGRAMS, blocks[0] * blocks[1])
    splits = min(launch.batch * tiles, wanted, _MAX_SPLITS, max(1, _PARTIAL_ELEMENTS // weights))
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty((splits, weights + filters), dtype=compute, device=x.device)
    grid = (splits, *blocks)
    _point_gradient[grid](
        *operands, partial, *sizes, tiles, launch.batch * tiles, **constants, **tile.options()
    )
    columns = 4096 if INTERPRETED.value else 128
    _add_splits[(triton.cdiv(weights + filters, columns),)](
        partial,
        d_point,
        d_point_bias,
        splits,
        weights,
        filters,
        SPLITS=min(16, triton.next_power_of_2(splits)),
        COLUMNS=columns,
        num_warps=4,
    )


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
