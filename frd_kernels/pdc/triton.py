"""The operators of the difference convolution on Triton kernels: `frd_triton::pdc2d_depthwise` and its backward.

Signatures and semantics are those of `csrc/register.cpp`; arguments are checked by the caller. Launches depend on
shapes, dtype and layout alone, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .._triton_ops import INTERPRETED
from .kinds import Kind
from .triton_gather import SUMS, gather_backward, gather_forward, reduce_sums
from .triton_rows import rows_backward, rows_forward
from .triton_weight import pdc_weight, pdc_weight_backward

__all__ = ["pdc2d_depthwise", "pdc2d_depthwise_backward", "pdc_weight", "pdc_weight_backward"]

_THREADS = 128
_VECTOR_BYTES = 16
# The interpreter pays for programs, not for elements.
_TILE_FACTOR = 64 if INTERPRETED.value else 1
# Twice what the 132 multiprocessors of an H100 run at a time, at two blocks of threads on each.
_MIN_PROGRAMS = 1 if INTERPRETED.value else 512
_MAX_ROWS = 64 * _TILE_FACTOR
_MAX_CHANNELS = 128
_UNROLL = 4


class Tile(NamedTuple):
    """What a program computes at a time; a position is a strip of `strip` columns."""

    positions: int
    channels: int
    strip: int
    warps: int

    def blocks(self, columns: int) -> int:
        return triton.cdiv(columns, self.positions * self.strip)

    def options(self) -> dict[str, int]:
        return {"POSITIONS": self.positions, "CHANNELS": self.channels, "num_warps": self.warps}


class Launch:
    """The geometry of a convolution of x [B, C, H, W]: what all its kernels are told."""

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
        self.size = x.shape[1:]
        extra = 1 if kind == Kind.RADIAL else 0
        self.stride, self.dilation = stride, dilation
        self.lead = [p + extra * d for p, d in zip(padding, dilation, strict=True)]
        self.span = [(2 + 2 * extra) * d for d in dilation]
        self.rows, self.columns = (
            (size + 2 * lead - span - 1) // s + 1
            for size, lead, span, s in zip(x.shape[2:], self.lead, self.span, stride, strict=True)
        )
        self.layout = torch.contiguous_format
        if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            self.layout = torch.channels_last
        self.channels_first = self.layout == torch.contiguous_format
        self.vector = _VECTOR_BYTES // x.element_size()
        # Of vanilla any theta is the same: one compilation.
        self.constants = {
            "KIND": int(kind),
            "THETA": 1.0 if kind == Kind.VANILLA else theta,
            "CHANNELS_FIRST": self.channels_first,
        }
        self.walks = kind != Kind.RADIAL and list(stride) == [1, 1] and list(dilation) == [1, 1]

    def tile(self, columns: int, per_thread: int, strip: int = 1) -> Tile:
        """A tile that is long along the contiguous axis; a thread has `per_thread` elements of it."""
        if self.channels_first and strip == 1:
            per_thread = min(4, per_thread)  # they are loaded one by one: neighbours lie at odd addresses
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
        """The tile of a walk: of strips that are a vector, where each row begins with an aligned one."""
        if self.channels_first and self.lead[1] == 1 and self.width % 16 == 0:
            return self.tile(columns, self.vector, self.vector)
        return self.tile(columns, per_thread)

    def dense(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=self.layout)

    def empty(self, like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        size = (self.batch, self.channels, rows, columns)
        return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=self.layout)

    def runs(self, tile: Tile, steps: int, programs: int) -> tuple[int, int]:
        """(runs, steps of a run): `steps` are divided into as many runs as make enough programs, where one run of all
        of them makes `programs`."""
        programs *= self.batch * triton.cdiv(self.channels, tile.channels)
        per_run = triton.cdiv(steps, max(1, min(steps, _MIN_PROGRAMS // max(1, programs))))
        return triton.cdiv(steps, per_run), per_run

    def walk(self, tile: Tile, rows: int, blocks: int, min_rows: int) -> tuple[int, dict[str, int]]:
        """(programs over the images, the options of a walk down `rows` rows); a run has at least `min_rows` of them,
        where there are so many."""
        per_run = min(max(self.runs(tile, rows, blocks)[1], min(min_rows, rows)), _MAX_ROWS)
        unroll = _UNROLL if per_run >= _UNROLL and rows % _UNROLL == 0 else 1
        per_run = triton.cdiv(per_run, unroll) * unroll
        options = {"run_rows": per_run, "STRIP": tile.strip, "UNROLL": unroll}
        return self.batch * triton.cdiv(rows, per_run) * blocks, options | tile.options()


def pdc2d_depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: int,
    theta: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """x [B, C, H, W], weight [C, 1, 3, 3], bias [C] -> y [B, C, H', W'], channels_last where x is dense in it."""
    launch = Launch(x, kind, theta, stride, padding, dilation)
    y = launch.empty(x, launch.rows, launch.columns)
    if y.numel() == 0:
        return y
    operands = (launch.dense(x), weight.contiguous(), weight if bias is None else bias.contiguous(), y)
    sizes = (*launch.size, launch.rows, launch.columns)
    constants = launch.constants | {"BIAS": bias is not None}
    if launch.walks:
        tile = launch.strip_tile(launch.columns, launch.vector)
        programs, options = launch.walk(tile, launch.rows, tile.blocks(launch.columns), 1)
        grid = (programs, triton.cdiv(launch.channels, tile.channels))
        rows_forward[grid](*operands, *sizes, *launch.lead, **constants, **options)
        return y
    tile = launch.tile(launch.rows * launch.columns, launch.vector)
    blocks = tile.blocks(launch.rows * launch.columns)
    grid = (launch.batch * blocks, triton.cdiv(launch.channels, tile.channels))
    geometry = (*launch.stride, *launch.lead, *launch.dilation)
    gather_forward[grid](*operands, *sizes, *geometry, **constants, **tile.options())
    return y


def pdc2d_depthwise_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    kind: int,
    theta: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_dx: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad [B, C, H', W'] -> dx [B, C, H, W], dw [C, 1, 3, 3], db [C]; what is not needed comes back as [0]."""
    launch = Launch(x, kind, theta, stride, padding, dilation)
    dx = launch.empty(x, launch.height, launch.width) if need_dx else x.new_empty(0)
    dw = weight.new_zeros((launch.channels, 1, 3, 3) if need_dw else 0)
    db = weight.new_zeros(launch.channels if need_dw else 0)
    if grad.numel() == 0 or not (need_dx or need_dw):
        return dx, dw, db
    partial = _backward(
        launch, launch.dense(grad), launch.dense(x), weight.contiguous(), dx, need_dx, need_dw
    )
    if need_dw:
        parts = partial.shape[0]
        columns = 32 * _TILE_FACTOR
        reduce_sums[(triton.cdiv(SUMS.value * launch.channels, columns),)](
            partial,
            dw,
            db,
            parts,
            launch.channels,
            PARTS=min(32, triton.next_power_of_2(parts)),
            COLUMNS=columns,
            num_warps=4,
        )
    return dx, dw, db


def _backward(
    launch: Launch,
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor,
    need_dx: bool,
    need_dw: bool,
) -> torch.Tensor:
    """Writes dx; returns the partial sums [parts, 10, C] of dw and db (no parts unless they are needed)."""
    constants = launch.constants | {"NEED_DX": need_dx, "NEED_DW": need_dw}
    # Ten sums, the weights and two windows for each channel: more than 4 elements of a tile fill the registers.
    per_thread = min(4, launch.vector)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32

    def partial_sums(parts: int) -> torch.Tensor:
        return x.new_empty((parts if need_dw else 0, SUMS.value, launch.channels), dtype=compute)

    if launch.walks and launch.lead == [1, 1]:
        tile = launch.strip_tile(launch.width, per_thread)
        # A run leaves ten sums for each channel: a single row would be less than that.
        programs, options = launch.walk(tile, launch.height, tile.blocks(launch.width), _UNROLL)
        partial = partial_sums(programs)
        grid = (programs, triton.cdiv(launch.channels, tile.channels))
        rows_backward[grid](grad, x, weight, dx, partial, *launch.size, **constants, **options)
        return partial
    pixels = max(launch.rows * launch.columns, launch.height * launch.width)
    tile = launch.tile(pixels, per_thread)
    runs, _ = launch.runs(tile, tile.blocks(pixels), 1)
    partial = partial_sums(launch.batch * runs)
    grid = (launch.batch * runs, triton.cdiv(launch.channels, tile.channels))
    sizes = (*launch.size, launch.rows, launch.columns)
    geometry = (*launch.stride, *launch.lead, *launch.span, *launch.dilation)
    gather_backward[grid](
        grad, x, weight, dx, partial, *sizes, *geometry, runs, **constants, **tile.options()
    )
    return partial
