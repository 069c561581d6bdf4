"""What the Triton kernels of the depthwise PDC block share: a tile of the hidden layer, relu's input.

Tiles and matrix products are [positions, channels], or [channels, positions] where CHANNELS_FIRST.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, widen
from ...pdc.triton.stencil import WEIGHTS, combine, load_weights, load_window, window_corner
from ...pdc.triton.tiles import Launch, channel_starts, over_channels, over_positions

SMALL_IMAGE = 1024  # output pixels
MIN_PROGRAMS = 128


class Stencil(NamedTuple):
    """Parameters of the difference convolution: the first weight, its strides from weight to weight and from channel
    to channel; bias [C], read where BIAS is set."""

    weight: Any
    weight_stride: int
    channel_stride: int
    bias: Any


def stencil_of(launch: Launch, weight: torch.Tensor, bias: torch.Tensor | None) -> Stencil:
    """weight [C, 1, 3, 3], bias [C]. Where the lanes of a kernel run along the channels, the weights of neighbouring
    channels are neighbours in memory, in the compute type."""
    bias = weight if bias is None else bias.contiguous()
    if launch.channels_first:
        return Stencil(weight.contiguous(), 1, WEIGHTS.value, bias)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    packed = torch.empty((WEIGHTS.value, launch.channels), dtype=compute, device=weight.device)
    return Stencil(packed.copy_(weight.flatten(1).t()), launch.channels, 1, bias)


@triton.jit
def fixed(value):
    """`value`, each element computed by one thread: else the compiler computes the whole stencil in the layout of the
    product's operand, again in every warp that shares it."""
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
def tile_corner(position, geometry, CHANNELS_FIRST: tl.constexpr):
    """Row and column of the first tap of output positions, and which of these exist. To be computed once: the
    compiler moves no division out of a loop."""
    pixel = over_positions(position, CHANNELS_FIRST)
    top, left = window_corner(pixel, geometry)
    return top, left, pixel < geometry.rows * geometry.columns


@triton.jit
def hidden_window(x, image, corner, index, geometry, CHANNELS_FIRST: tl.constexpr, KIND: tl.constexpr):
    """What the difference convolution reads at the positions of `corner` (`tile_corner`) and channels `index`."""
    top, left, inside = corner
    channels = geometry.channels
    channel = over_channels(index, CHANNELS_FIRST)
    pixels = geometry.height * geometry.width
    starts = channel_starts(x, image, channel, channels, pixels, CHANNELS_FIRST)
    return load_window(starts, top, left, geometry, (channel < channels) & inside, CHANNELS_FIRST, KIND)


@triton.jit
def hidden_tile(
    window,
    stencil,
    index,
    channels,
    BIAS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    THETA: tl.constexpr,
):
    """sum_k w_k (x_plus_k - theta x_minus_k) + bias of a window, in the compute type; the bias alone outside the image
    and 0 beyond the last channel."""
    channel = over_channels(index, CHANNELS_FIRST)
    mask = channel < channels
    weights = load_weights(stencil.weight + channel * stencil.channel_stride, stencil.weight_stride, mask)
    start = 0.0
    if BIAS:
        start = widen(tl.load(stencil.bias + channel, mask=mask, other=0.0))
    return combine(window, weights, start, KIND, THETA)


class Tile(NamedTuple):
    """Block sizes of a program. registers: the most of a thread; without a limit the assembler spills one or two values
    of some kernels to fit one more block of threads."""

    positions: int
    filters: int
    channels: int
    warps: int
    registers: int | None = None

    def programs(self, launch: Launch, filters: int) -> int:
        pixels = launch.rows * launch.columns
        return launch.batch * triton.cdiv(pixels, self.positions) * triton.cdiv(filters, self.filters)

    def options(self) -> dict[str, int]:
        # One stage: in a pipelined loop every tap would go through shared memory, past the L1 cache.
        options = {
            "POSITIONS": self.positions,
            "FILTERS": self.filters,
            "CHANNELS": self.channels,
            "num_warps": self.warps,
            "num_stages": 1,
        }
        return options if self.registers is None else options | {"maxnreg": self.registers}


def has_wgmma() -> bool:
    """Whether the GPU is a Hopper, whose products of wide tiles take fewer registers."""
    return triton.runtime.driver.active.get_current_target().arch // 10 == 9


def dot_precision(dtype: torch.dtype) -> str:
    """Products of float32 are as exact as float32 unless the user allows TF32."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return "ieee"


def shared_memory(x: torch.Tensor) -> int:
    """Bytes of shared memory that one block can have on the device of x."""
    if x.device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(x.device)
    return int(properties.shared_memory_per_block_optin)
