"""The depthwise PDC block on Triton: `frd_triton::pdc_block`.

Signatures and semantics are those of `csrc/register.cpp`; arguments are checked by the caller. A tile of the hidden
layer is computed in registers and multiplied by the 1x1 weight, without passing through memory.
"""

# Triton functions take no annotations.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, compute_type, matmul_add, narrow, on_device, widen
from ...pdc.triton.tiles import Launch, channel_starts, over_channels, over_positions
from .hidden import (
    MIN_PROGRAMS,
    SMALL_IMAGE,
    Tile,
    dot_precision,
    fixed,
    has_wgmma,
    hidden_tile,
    hidden_window,
    relu,
    stencil_of,
    tile_corner,
)

OptionalTensor = torch.Tensor | None


@triton.jit
def multiply_slab(
    total,
    hidden,
    point,
    filter,
    index,
    filters,
    channels,
    CHANNELS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + point hidden over the hidden channels `index`. point: [filters, channels]."""
    source = over_positions(index, CHANNELS_FIRST)
    mask = (filter < filters) & (source >= 0) & (source < channels)
    factors = tl.load(point + (filter * channels + source), mask=mask, other=0.0)
    if CHANNELS_FIRST:
        total = matmul_add(factors, hidden, total, PRECISION)
    else:
        total = matmul_add(hidden, factors, total, PRECISION)
    return total


@triton.jit
def _forward(
    x,
    stencil,
    point,  # [filters, channels]
    point_bias,
    residual,
    out,
    geometry,
    filters,
    tiles,  # of an image
    BIAS: tl.constexpr,
    POINT_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
    POSITIONS: tl.constexpr,
    FILTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = point relu(pdc(x) + bias) + point_bias + residual: [filters, pixels] of each image.

    Grid: (images * tiles * blocks of filters,), the last fastest.
    """
    blocks = tl.cdiv(filters, FILTERS)
    tile = tl.program_id(0) // blocks
    image = tile // tiles
    position = tile % tiles * POSITIONS + tl.arange(0, POSITIONS)
    index = tl.program_id(0) % blocks * FILTERS + tl.arange(0, FILTERS)
    filter = over_channels(index, CHANNELS_FIRST)
    channels = geometry.channels
    pixels = geometry.rows * geometry.columns
    accumulator: tl.constexpr = compute_type(x.dtype.element_ty)
    shape: tl.constexpr = (FILTERS, POSITIONS) if CHANNELS_FIRST else (POSITIONS, FILTERS)
    tile_shape: tl.constexpr = (CHANNELS, POSITIONS) if CHANNELS_FIRST else (POSITIONS, CHANNELS)
    total = tl.zeros(shape, accumulator)
    corner = tile_corner(position, geometry, CHANNELS_FIRST)
    slab = tl.arange(0, CHANNELS)
    hidden = fixed(tl.zeros(tile_shape, x.dtype.element_ty))
    # The window of a slab is loaded while the slab before it is multiplied.
    for first in range(0, channels, CHANNELS):
        window = hidden_window(x, image, corner, first + slab, geometry, CHANNELS_FIRST, KIND)
        last = first - CHANNELS + slab
        total = multiply_slab(
            total, hidden, point, filter, last, filters, channels, CHANNELS_FIRST, PRECISION
        )
        hidden = hidden_tile(window, stencil, first + slab, channels, BIAS, CHANNELS_FIRST, KIND, THETA)
        hidden = fixed(narrow(relu(hidden), x.dtype.element_ty))
    last = tl.cdiv(channels, CHANNELS) * CHANNELS - CHANNELS + slab
    total = multiply_slab(total, hidden, point, filter, last, filters, channels, CHANNELS_FIRST, PRECISION)
    pixel = over_positions(position, CHANNELS_FIRST)
    mask = (filter < filters) & (pixel < pixels)
    to = pixel * (1 if CHANNELS_FIRST else filters)
    if POINT_BIAS:
        total += widen(tl.load(point_bias + filter, mask=filter < filters, other=0.0))
    if RESIDUAL:
        start = channel_starts(residual, image, filter, filters, pixels, CHANNELS_FIRST)
        total += widen(tl.load(start + to, mask=mask, other=0.0))
    start = channel_starts(out, image, filter, filters, pixels, CHANNELS_FIRST)
    tl.store(start + to, narrow(total, out.dtype.element_ty), mask=mask)


def pdc_block(
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    pdc_bias: OptionalTensor,
    point_weight: torch.Tensor,
    point_bias: OptionalTensor,
    residual: OptionalTensor,
    kind: int,
    theta: float,
    stride: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """conv1x1(relu(pdc2d(x))) + residual with padding = dilation: x [B, C, H, W], pdc_weight [C, 1, 3, 3],
    pdc_bias [C], point_weight [Co, C, 1, 1], point_bias [Co], residual [B, Co, Ho, Wo] -> [B, Co, Ho, Wo].

    The hidden values are rounded to the dtype of x before the 1x1 convolution, as in eager PyTorch; its sums are in the
    compute type.
    """
    launch = Launch(x, kind, theta, stride, dilation, dilation)
    filters = point_weight.shape[0]
    size = (launch.batch, filters, launch.rows, launch.columns)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=launch.layout)
    if out.numel() == 0:
        return out
    tile = choose_tile(launch, x.dtype, filters)
    with on_device(x):
        _forward[(tile.programs(launch, filters),)](
            launch.dense(x),
            stencil_of(launch, pdc_weight, pdc_bias),
            point_weight.contiguous(),
            out if point_bias is None else point_bias.contiguous(),
            out if residual is None else launch.dense(residual),
            out,
            launch.geometry,
            filters,
            triton.cdiv(launch.rows * launch.columns, tile.positions),
            BIAS=pdc_bias is not None,
            POINT_BIAS=point_bias is not None,
            RESIDUAL=residual is not None,
            PRECISION=dot_precision(x.dtype),
            **launch.constants,
            **tile.options(),
        )
    return out


_SLAB = {torch.float16: 32, torch.bfloat16: 32, torch.float32: 16, torch.float64: 16}


def choose_tile(launch: Launch, dtype: torch.dtype, filters: int) -> Tile:
    """The widest tile that leaves enough programs: each block of filters computes the stencil again.

    Slabs and the instruction do not depend on the batch, so that a sample's sums do not. (Hopper's wgmma needs 64 rows,
    which are positions, or filters where CHANNELS_FIRST.)
    """
    pixels, slab = launch.rows * launch.columns, _SLAB[dtype]
    max_filters = max(16, triton.next_power_of_2(filters))
    if INTERPRETED.value:  # whose cost is per program, not per element
        return Tile(max(16, min(512, triton.next_power_of_2(pixels))), min(max_filters, 128), slab, 4)
    for positions, block, warps, registers in _tile_sizes(dtype, launch.channels_first, pixels):
        tile = Tile(positions, min(block, max_filters), slab, warps, registers)
        if block <= max_filters and tile.programs(launch, filters) >= MIN_PROGRAMS:
            break
    return tile


def _tile_sizes(
    dtype: torch.dtype, channels_first: bool, pixels: int
) -> list[tuple[int, int, int, int | None]]:
    """(positions, filters, warps, registers) from the widest on; none of them spills."""
    if dtype == torch.float64:
        return [(16, 16, 8, 255)]
    if dtype == torch.float32:
        if pixels <= SMALL_IMAGE:
            return [(32, 64, 4, None), (16, 64 if channels_first else 32, 4, None)]
        return [(64, 128, 8, None), (64, 64, 8, None)]
    if channels_first:
        return [(32, 256, 8, None), (32, 128, 8, None), (32, 64, 8, 255), (16, 64, 4, None)]
    if pixels <= SMALL_IMAGE:
        return [(32, 256, 8, None), (32, 128, 8, None), (32, 64, 4, None), (16, 32, 4, None)]
    wide: list[tuple[int, int, int, int | None]] = [(64, 128, 8, None), (64, 64, 8, None)]
    return [(64, 256, 16, None), *wide] if has_wgmma() else wide
