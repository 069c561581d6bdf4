"""The depthwise PDC block on Triton kernels: `frd_triton::pdc_block`, and what its kernels share.

Signatures and semantics are those of `csrc/register.cpp`; arguments are checked by the caller. The stencil is the
prologue of the matrix product: a tile of it meets the 1x1 weight without passing through memory. Tiles are
[positions, channels], or the other way round where CHANNELS_FIRST, and so is then the product.
"""

# Triton functions take no annotations.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..pdc.triton import Launch
from ..pdc.triton_kernels import channel_starts, over_channels, over_positions
from ..pdc.triton_stencil import INTERPRETED, WEIGHTS, combine, load_weights, load_window, narrow, widen

OptionalTensor = torch.Tensor | None

SMALL_IMAGE = 1024  # output pixels
_ENOUGH_PROGRAMS = 128


@triton.jit
def matmul_add(a, b, acc, PRECISION: tl.constexpr):
    """acc [M, N] + a [M, K] b [K, N] in the dtype of acc."""
    if INTERPRETED:  # numpy has no bfloat16
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def fixed(value):
    """`value`, computed by one thread: the compiler would pull an operand's layout through the whole stencil, and
    have every warp that shares the operand compute it again."""
    if INTERPRETED or value.dtype == tl.float64:
        return value
    if value.dtype == tl.float32:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], tl.float32, False, 1)
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], value.dtype, False, 2)


@triton.jit
def relu(value):
    """As torch's: NaN stays NaN."""
    if value.dtype == tl.float64:  # has no such instruction
        return tl.where(value <= 0, 0.0, value)
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def window_corner(position, rows, columns, geometry, CHANNELS_FIRST: tl.constexpr):
    """Row and column of the first tap of output positions, and which of them exist. To be computed once: the
    compiler moves no division out of a loop.

    geometry: stride, lead (padding of the whole window), dilation, each vertical, horizontal.
    """
    step_y, step_x, lead_y, lead_x, _, _ = geometry
    spot = over_positions(position, CHANNELS_FIRST)
    return spot // columns * step_y - lead_y, spot % columns * step_x - lead_x, spot < rows * columns


@triton.jit
def hidden_window(
    x,
    image,
    corner,
    index,
    channels,
    height,
    width,
    geometry,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
):
    """What the difference convolution reads at the positions of `corner` (`window_corner`) and channels `index`."""
    top, left, inside = corner
    _, _, _, _, dilation_y, dilation_x = geometry
    channel = over_channels(index, CHANNELS_FIRST)
    step = 1 if CHANNELS_FIRST else channels
    return load_window(
        channel_starts(x, image, channel, channels, height * width, CHANNELS_FIRST),
        top,
        left,
        height,
        width,
        width * step,
        step,
        dilation_y,
        dilation_x,
        (channel < channels) & inside,
        KIND,
    )


@triton.jit
def hidden_tile(
    window,
    weight,
    bias,
    index,
    channels,
    weight_steps,
    BIAS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
):
    """The difference convolution of a window, plus bias, in the compute type; the bias alone outside the image and
    0 beyond the last channel. weight_steps: from weight to weight, from channel to channel."""
    channel = over_channels(index, CHANNELS_FIRST)
    real = channel < channels
    weights = load_weights(weight + channel * weight_steps[1], weight_steps[0], real)
    start = 0.0
    if BIAS:
        start = widen(tl.load(bias + channel, mask=real, other=0.0))
    return combine(window, weights, start, KIND, THETA)


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
    """total plus the product of a slab of hidden channels `index` with its part of point [filters, channels]."""
    source = over_positions(index, CHANNELS_FIRST)
    held = (filter < filters) & (source >= 0) & (source < channels)
    factors = tl.load(point + (filter * channels + source), mask=held, other=0.0)
    if CHANNELS_FIRST:
        total = matmul_add(factors, hidden, total, PRECISION)
    else:
        total = matmul_add(hidden, factors, total, PRECISION)
    return total


@triton.jit
def _forward(
    x,
    weight,
    bias,
    point,  # [filters, channels]
    point_bias,
    residual,
    out,
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
    """out [filters, rows x columns] of each image. Grid: (images * tiles * blocks of filters,), the last fastest."""
    blocks = tl.cdiv(filters, FILTERS)
    tile = tl.program_id(0) // blocks
    image = tile // tiles
    position = tile % tiles * POSITIONS + tl.arange(0, POSITIONS)
    index = tl.program_id(0) % blocks * FILTERS + tl.arange(0, FILTERS)
    filter = over_channels(index, CHANNELS_FIRST)
    accumulator: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    shape: tl.constexpr = (FILTERS, POSITIONS) if CHANNELS_FIRST else (POSITIONS, FILTERS)
    tile_shape: tl.constexpr = (CHANNELS, POSITIONS) if CHANNELS_FIRST else (POSITIONS, CHANNELS)
    total = tl.zeros(shape, accumulator)
    geometry = (step_y, step_x, lead_y, lead_x, dilation_y, dilation_x)
    weight_steps = (weight_step, channel_step)
    corner = window_corner(position, rows, columns, geometry, CHANNELS_FIRST)
    slab = tl.arange(0, CHANNELS)
    hidden = fixed(tl.zeros(tile_shape, x.dtype.element_ty))
    # The window of a slab is on its way while the slab before it is multiplied.
    for first in range(0, channels, CHANNELS):
        # fmt: off
        window = hidden_window(
            x, image, corner, first + slab, channels, height, width, geometry, CHANNELS_FIRST, KIND
        )
        # fmt: on
        behind = first - CHANNELS + slab
        total = multiply_slab(
            total, hidden, point, filter, behind, filters, channels, CHANNELS_FIRST, PRECISION
        )
        # fmt: off
        hidden = hidden_tile(
            window, weight, bias, first + slab, channels, weight_steps, BIAS, CHANNELS_FIRST, KIND, THETA
        )
        # fmt: on
        hidden = fixed(narrow(relu(hidden), x.dtype.element_ty))
    behind = tl.cdiv(channels, CHANNELS) * CHANNELS - CHANNELS + slab
    total = multiply_slab(total, hidden, point, filter, behind, filters, channels, CHANNELS_FIRST, PRECISION)
    spot = over_positions(position, CHANNELS_FIRST)
    real = (filter < filters) & (spot < rows * columns)
    to = spot * (1 if CHANNELS_FIRST else filters)
    if POINT_BIAS:
        total += widen(tl.load(point_bias + filter, mask=filter < filters, other=0.0))
    if RESIDUAL:
        start = channel_starts(residual, image, filter, filters, rows * columns, CHANNELS_FIRST)
        total += widen(tl.load(start + to, mask=real, other=0.0))
    start = channel_starts(out, image, filter, filters, rows * columns, CHANNELS_FIRST)
    tl.store(start + to, narrow(total, out.dtype.element_ty), mask=real)


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

    The hidden values meet the 1x1 weight in the dtype of x, as in eager PyTorch; their product adds in float32.
    """
    launch = Launch(x, kind, theta, stride, dilation, dilation)
    filters = point_weight.shape[0]
    size = (launch.batch, filters, launch.rows, launch.columns)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=launch.layout)
    if out.numel() == 0:
        return out
    tile = choose_tile(launch, x.dtype, filters)
    weight, weight_steps = stencil_weight(launch, pdc_weight)
    with on_device(x):
        _forward[(tile.programs(launch, filters),)](
            launch.dense(x),
            weight,
            weight if pdc_bias is None else pdc_bias.contiguous(),
            point_weight.contiguous(),
            weight if point_bias is None else point_bias.contiguous(),
            out if residual is None else launch.dense(residual),
            out,
            filters,
            *shapes(launch),
            *weight_steps,
            triton.cdiv(launch.rows * launch.columns, tile.positions),
            BIAS=pdc_bias is not None,
            POINT_BIAS=point_bias is not None,
            RESIDUAL=residual is not None,
            PRECISION=dot_precision(x.dtype),
            **launch.constants,
            **tile.options(),
            **registers(x.dtype),
        )
    return out


class Tile(NamedTuple):
    """What a program computes, and the channels that it multiplies at a time."""

    positions: int
    filters: int
    channels: int
    warps: int

    def programs(self, launch: Launch, filters: int) -> int:
        pixels = launch.rows * launch.columns
        return launch.batch * triton.cdiv(pixels, self.positions) * triton.cdiv(filters, self.filters)

    def options(self) -> dict[str, int]:
        # One stage: the taps of a pipelined loop would all go through shared memory, past the first cache.
        return {
            "POSITIONS": self.positions,
            "FILTERS": self.filters,
            "CHANNELS": self.channels,
            "num_warps": self.warps,
            "num_stages": 1,
        }


_SLAB = {torch.float16: 32, torch.bfloat16: 32, torch.float32: 16, torch.float64: 16}


def choose_tile(launch: Launch, dtype: torch.dtype, filters: int) -> Tile:
    """The widest tile that leaves enough programs: each block of filters computes the stencil again.

    The batch decides nothing that changes a sum: neither the slabs, nor the instruction (of Hopper's, wgmma needs
    64 rows, which are positions, or filters where CHANNELS_FIRST).
    """
    pixels, slab = launch.rows * launch.columns, _SLAB[dtype]
    most = max(16, triton.next_power_of_2(filters))
    if INTERPRETED.value:  # which pays for programs, not for elements
        return Tile(max(16, min(128, triton.next_power_of_2(pixels))), min(most, 128), slab, 4)
    for positions, block, warps in _tile_sizes(dtype, launch.channels_first, pixels):
        tile = Tile(positions, min(block, most), slab, warps)
        if block <= most and tile.programs(launch, filters) >= _ENOUGH_PROGRAMS:
            break
    return tile


def _tile_sizes(dtype: torch.dtype, channels_first: bool, pixels: int) -> list[tuple[int, int, int]]:
    """(positions, filters, warps) from the widest on; none of them spills registers."""
    if dtype == torch.float64:
        return [(16, 16, 8)]
    if dtype == torch.float32:
        if pixels <= SMALL_IMAGE:
            return [(32, 64, 4), (16, 64, 4) if channels_first else (16, 32, 4)]
        return [(64, 128, 8), (64, 64, 8)]
    if channels_first:
        return [(32, 256, 8), (32, 128, 8), (32, 64, 4), (16, 64, 4)]
    if pixels <= SMALL_IMAGE:
        return [(32, 256, 8), (32, 128, 8), (32, 64, 4), (16, 32, 4)]
    return [(64, 256, 16), (64, 128, 8), (64, 64, 8)] if has_wgmma() else [(64, 128, 8), (64, 64, 8)]


def has_wgmma() -> bool:
    """Whether the GPU is a Hopper: there the sums of a wide tile take few enough registers."""
    return triton.runtime.driver.active.get_current_target().arch // 10 == 9


def shapes(launch: Launch) -> tuple[int, ...]:
    """The arguments of a kernel from `channels` to `dilation_x`."""
    return (*launch.size, launch.rows, launch.columns, *launch.stride, *launch.lead, *launch.dilation)


def stencil_weight(launch: Launch, weight: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """The parameter [C, 1, 3, 3] and its steps from weight to weight, from channel to channel. Where the lanes of
    a kernel run along the channels these stand side by side, in the compute type."""
    if launch.channels_first:
        return weight.contiguous(), (1, WEIGHTS.value)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    packed = torch.empty((WEIGHTS.value, launch.channels), dtype=compute, device=weight.device)
    return packed.copy_(weight.flatten(1).t()), (launch.channels, 1)


def registers(dtype: torch.dtype) -> dict[str, int]:
    """Left to itself the assembler spills a value or two of float64 kernels to fit one more block."""
    return {"maxnreg": 255} if dtype == torch.float64 else {}


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are as exact as float32 unless the user lets matrix products be TF32."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return "ieee"


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; this makes it that of x."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def shared_memory(x: torch.Tensor) -> int:
    """Bytes of shared memory that one block can have on the device of x."""
    if x.device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(x.device)
    return int(properties.shared_memory_per_block_optin)
