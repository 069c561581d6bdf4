"""What the kernels of the depthwise difference convolution share: tile sizes, loads and sums of a tile.

Images are dense [B, H, W, C], or [B, C, H, W] where CHANNELS_FIRST. A tile is [positions, channels], or [channels,
positions] where CHANNELS_FIRST: its last axis is the contiguous one.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, widen, widen_all
from ..kinds import Kind
from .stencil import WEIGHTS, Geometry, load_weights

_THREADS = 128
_VECTOR_BYTES = 16
# The interpreter's cost is per program, not per element.
_TILE_FACTOR = 64 if INTERPRETED.value else 1
# Twice what the 132 multiprocessors of an H100 run at a time with two programs on each.
_MIN_PROGRAMS = 1 if INTERPRETED.value else 512
_MAX_ROWS = 64 * _TILE_FACTOR
_MAX_CHANNELS = 128
UNROLL_ROWS = 4
SUMS = tl.constexpr(10)  # of a channel: the 9 of dw, then db


class Tile(NamedTuple):
    """What a program computes at a time; a position is `strip` neighbouring columns."""

    positions: int
    channels: int
    strip: int
    warps: int

    def blocks(self, columns: int) -> int:
        return triton.cdiv(columns, self.positions * self.strip)

    def options(self) -> dict[str, int]:
        return {"POSITIONS": self.positions, "CHANNELS": self.channels, "num_warps": self.warps}


class Launch:
    """Geometry, layout and constants of a convolution of x [B, C, H, W], for all its kernels."""

    def __init__(
        self,
        x: torch.Tensor,
        kind: int,
        theta: float,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> None:
        self.batch, self.channels, self.height, self.width = x.shape
        reach = 2 if kind == Kind.RADIAL else 1
        self.pad = [p + (reach - 1) * d for p, d in zip(padding, dilation, strict=True)]
        self.rows, self.columns = (
            (size + 2 * pad - 2 * reach * d - 1) // s + 1
            for size, pad, d, s in zip(x.shape[2:], self.pad, dilation, stride, strict=True)
        )
        sizes = self.channels, self.height, self.width, self.rows, self.columns
        self.geometry = Geometry(*sizes, *stride, *self.pad, *dilation)
        self.layout = torch.contiguous_format
        if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            self.layout = torch.channels_last
        self.channels_first = self.layout == torch.contiguous_format
        self.vector = _VECTOR_BYTES // x.element_size()
        # Ten sums, the weights and two windows for each channel: more than 4 elements in a thread fill the registers.
        self.backward_vector = min(4, self.vector)
        # One compilation for vanilla, which has no theta.
        self.constants = {
            "KIND": int(kind),
            "THETA": 1.0 if kind == Kind.VANILLA else theta,
            "CHANNELS_FIRST": self.channels_first,
        }
        # Whether the kernels of `rows` can run.
        self.by_rows = kind != Kind.RADIAL and list(stride) == [1, 1] and list(dilation) == [1, 1]

    def tile(self, columns: int, per_thread: int, strip: int = 1) -> Tile:
        """A tile that is long along the contiguous axis, with `per_thread` elements in a thread."""
        if self.channels_first and strip == 1:
            per_thread = min(4, per_thread)  # loaded one by one, as their addresses are not aligned
        budget = _THREADS * _TILE_FACTOR * per_thread // strip
        strips = triton.next_power_of_2(triton.cdiv(columns, strip))
        channels = triton.next_power_of_2(self.channels)
        if self.channels_first:
            strips = min(strips, budget)
            channels = min(channels, budget // strips)
        else:
            channels = min(channels, _MAX_CHANNELS)
            strips = min(strips, budget // channels)
        threads = strips * channels * strip // per_thread
        return Tile(strips, channels, strip, max(1, min(4, threads // 32)))

    def strip_tile(self, columns: int, per_thread: int) -> Tile:
        """The tile of the kernels of `rows`: strips are vectors where every row of x begins with an aligned one."""
        if self.channels_first and self.pad[1] == 1 and self.width % 16 == 0:
            return self.tile(columns, self.vector, self.vector)
        return self.tile(columns, per_thread)

    def dense(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=self.layout)

    def empty(self, like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        size = (self.batch, self.channels, rows, columns)
        return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=self.layout)

    def runs(self, tile: Tile, steps: int, programs: int) -> tuple[int, int]:
        """(runs, steps of a run): divides `steps` into as many runs as give enough programs. programs: of a single
        run, for one image and one block of channels."""
        programs *= self.batch * triton.cdiv(self.channels, tile.channels)
        per_run = triton.cdiv(steps, max(1, min(steps, _MIN_PROGRAMS // max(1, programs))))
        return triton.cdiv(steps, per_run), per_run

    def walk(self, tile: Tile, rows: int, blocks: int, min_rows: int) -> tuple[int, dict[str, int]]:
        """(programs over all images, options) of a kernel of `rows` on `rows` rows; a run has at least `min_rows` of
        them, if there are as many."""
        per_run = min(max(self.runs(tile, rows, blocks)[1], min(min_rows, rows)), _MAX_ROWS)
        unroll = UNROLL_ROWS if per_run >= UNROLL_ROWS and rows % UNROLL_ROWS == 0 else 1
        per_run = triton.cdiv(per_run, unroll) * unroll
        options = {"run_rows": per_run, "STRIP": tile.strip, "UNROLL": unroll}
        return self.batch * triton.cdiv(rows, per_run) * blocks, options | tile.options()

    def partial_sums(self, x: torch.Tensor, parts: int) -> torch.Tensor:
        """[parts, 10, C] of dw and db, in the compute type."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_empty((parts, SUMS.value, self.channels), dtype=dtype)


@triton.jit
def over_positions(index, CHANNELS_FIRST: tl.constexpr):
    return index[None, :] if CHANNELS_FIRST else index[:, None]


@triton.jit
def over_channels(index, CHANNELS_FIRST: tl.constexpr):
    return index[:, None] if CHANNELS_FIRST else index[None, :]


@triton.jit
def channel_starts(tensor, image, channel, channels, pixels, CHANNELS_FIRST: tl.constexpr):
    """Pointers to the first pixel of each channel of an image; offsets where `tensor` is one."""
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
        # A thread has several channels, whose weights are 9 apart: it loads 16 neighbours of each and splits them.
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
    """Stores the sums over the positions of each tile to partial [parts, 10, C], part = program_id(0)."""
    start = partial + tl.program_id(0).to(tl.int64) * (channels * SUMS) + index
    for k in tl.static_range(WEIGHTS):
        total = tl.sum(sums[k], axis=1 if CHANNELS_FIRST else 0)
        tl.store(start + k * channels, total, mask=index < channels)
    total = tl.sum(bias_sums, axis=1 if CHANNELS_FIRST else 0)
    tl.store(start + channels * WEIGHTS, total, mask=index < channels)
