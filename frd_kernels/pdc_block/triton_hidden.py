"""What the Triton kernels of the PDC block share: the hidden tile, relu's input, in front of a matrix product.

Tiles are [positions, channels], or the other way round where CHANNELS_FIRST, and so are then the products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._triton_ops import INTERPRETED, widen
from ..pdc.triton import Launch
from ..pdc.triton_gather import channel_starts, over_channels, over_positions
from ..pdc.triton_stencil import WEIGHTS, combine, load_weights, load_window

SMALL_IMAGE = 1024  # output pixels
MIN_PROGRAMS = 128


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
    pixel = over_positions(position, CHANNELS_FIRST)
    return pixel // columns * step_y - lead_y, pixel % columns * step_x - lead_x, pixel < rows * columns


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
    mask = channel < channels
    weights = load_weights(weight + channel * weight_steps[1], weight_steps[0], mask)
    start = 0.0
    if BIAS:
        start = widen(tl.load(bias + channel, mask=mask, other=0.0))
    return combine(window, weights, start, KIND, THETA)


class Tile(NamedTuple):
    """The blocks of a program. registers: of a thread at most; left to its own choice the assembler spills a value or
    two of some kernels to fit one more block of threads."""

    positions: int
    filters: int
    channels: int
    warps: int
    registers: int | None = None

    def programs(self, launch: Launch, filters: int) -> int:
        pixels = launch.rows * launch.columns
        return launch.batch * triton.cdiv(pixels, self.positions) * triton.cdiv(filters, self.filters)

    def options(self) -> dict[str, int]:
        # One stage: the taps of a pipelined loop would all go through shared memory, past the first cache.
        options = {
            "POSITIONS": self.positions,
            "FILTERS": self.filters,
            "CHANNELS": self.channels,
            "num_warps": self.warps,
            "num_stages": 1,
        }
        return options if self.registers is None else options | {"maxnreg": self.registers}


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


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are as exact as float32 unless the user lets matrix products be TF32."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return "ieee"


def shared_memory(x: torch.Tensor) -> int:
    """Bytes of shared memory that one block can have on the device of x."""
    if x.device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(x.device)
    return int(properties.shared_memory_per_block_optin)
