"""One round of clustering on Triton: which tiles its kernels get, and their launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from .._triton_ops import INTERPRETED, block_of
from .triton_aggregate import aggregate, finish
from .triton_assign import assign
from .triton_pool import pool
from .triton_tiles import part_count, precision

Tensor = torch.Tensor

# Of a thread: left to itself the assembler spills a value or two to fit one more block of threads.
MOST_REGISTERS = 255
_MOST_CHUNKS = 4 if INTERPRETED.value else 16
# Centres whose keys, and whose means, one program makes.
ROWS = 256 if INTERPRETED.value else 16
# Centres x channels that a chunk of tokens adds up right after it has found their labels.
_SMALL_SUMS = 1 << 14
# Elements of all chunks' sums of an item that its last chunk adds up rather than a kernel of its own.
_FEW_SUMS = 1 << 16


class Tiles(NamedTuple):
    """Blocks of the kernels. Of N, O, C and the dtype alone: an item's sums do not depend on its batch."""

    tokens: int  # of a tile
    centres: int
    channels: int
    keys: int  # output channels of Wk at a time
    slice: int  # channels of a block of sums
    summed: int  # tokens of a step of the sums
    warps: int
    stages: int


def choose_tiles(tokens: int, centres: int, channels: int, dtype: torch.dtype) -> Tiles:
    side = max(16, triton.next_power_of_2(tokens))
    across = max(16, triton.next_power_of_2(centres))
    if INTERPRETED.value:  # which pays for programs and steps, not for elements
        wide = min(256, max(16, triton.next_power_of_2(channels)))
        return Tiles(min(side, 256), min(across, 256), wide, wide, wide, min(side, 256), 4, 1)
    if dtype == torch.float64:
        return Tiles(16, 16, block_of(channels, 16), 16, 16, 16, 4, 1)
    # The widest of which none spills.
    if dtype == torch.float32:
        block = block_of(channels, 16)
        return Tiles(
            min(side, 32), min(across, 64), block, block_of(channels, 64), block, min(side, 32), 4, 2
        )
    block = block_of(channels, 32)
    if tokens < 1024:
        return Tiles(
            min(side, 32), min(across, 64), block, block_of(channels, 64), block, min(side, 32), 4, 2
        )
    return Tiles(128, min(across, 64), block, block_of(channels, 128), block, 64, 8, 2)


def chunk_count(tokens: int, centres: int) -> int:
    """Chunks of an item's tokens: of 64 at least, and their partial centres no more than the tokens."""
    return max(1, min(_MOST_CHUNKS, triton.cdiv(tokens, 64), tokens // centres))


@dataclasses.dataclass
class Round:
    """keys, values [B, N, C] (one tensor: pooled once), mask [B, N] of integers or None, labels [B, *] and saved [B, *]
    with the round's parts at `label_at` and `record_at`. alpha, beta [1]. projection: Wk, bk, Wv, bv or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    hw: Sequence[int]
    grid: Sequence[int]
    alpha: Tensor
    beta: Tensor
    weighted: bool
    projection: Sequence[Tensor] | None
    labels: Tensor
    saved: Tensor
    tickets: Tensor  # [B, ticket_count]: zeros
    label_at: int = 0
    record_at: int = 0
    # Of the last round of variant paper: views of `saved` that begin at them.
    query: Tensor | None = None
    projected: Tensor | None = None
    offset: Tensor | None = None
    # Of the operator `cluster`: similarity [B, N], centres [B, O, C], counts [B, O].
    results: tuple[Tensor, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.batch, self.tokens, self.channels = self.keys.shape
        self.centres = self.grid[0] * self.grid[1]
        self.tiles = choose_tiles(self.tokens, self.centres, self.channels, self.keys.dtype)
        self.parts = part_count(self.keys.dtype)
        self.precision = precision(self.saved.dtype)
        # Of a step of the products of float32 centres.
        self.small = block_of(
            self.channels, 256 if INTERPRETED.value else 32 if self.saved.dtype == torch.float32 else 16
        )
        empty = self.saved
        self.matrix = self.keys.new_empty((self.batch, self.parts, self.centres, self.channels))
        self.row_scale = empty.new_empty((self.batch, self.centres))
        if self.offset is None:
            self.offset = empty.new_empty((self.batch, self.centres))
        self.weights = (
            [self.keys] * 4 if self.projection is None else [p.contiguous() for p in self.projection]
        )

    def run(self) -> None:
        self._pool()
        fused = self.centres * self.channels <= _SMALL_SUMS
        chunks = chunk_count(self.tokens, self.centres) if fused else 1
        shape = (self.batch, chunks, self.centres)
        sums = self.saved.new_empty((*shape, self.channels))
        masses, numbers = self.saved.new_empty(shape), self.labels.new_empty(shape)
        together = fused and chunks * self.centres * self.channels <= _FEW_SUMS
        self._assign(chunks, fused, together, (sums, masses, numbers))
        if not fused:
            self._aggregate(sums, masses, numbers)
        if not together:
            self._finish(chunks, sums, masses, numbers)

    def _pool(self) -> None:
        shared = self.keys is self.values
        pooled = self.saved if shared else self.saved.new_empty((self.batch, self.centres, self.channels))
        mask = self.labels if self.mask is None else self.mask
        assert self.offset is not None
        span = block_of(self.channels, 256 if INTERPRETED.value else 128)
        pixels = triton.cdiv(self.hw[0], self.grid[0]) * triton.cdiv(self.hw[1], self.grid[1])
        side = max(1, min(256 if INTERPRETED.value else 4096 // span, triton.next_power_of_2(pixels)))
        bins = max(
            1, min(ROWS, triton.next_power_of_2(self.centres), (4096 if INTERPRETED.value else 32) // side)
        )
        blocks = triton.cdiv(self.centres, bins) * triton.cdiv(self.channels, span)
        pool[(self.batch * blocks,)](
            self.keys,
            self.values,
            mask,
            self.saved,
            pooled,
            self.matrix,
            self.row_scale,
            self.offset,
            self.saved if self.query is None else self.query,
            self.saved if self.projected is None else self.projected,
            *self.weights[:2],
            self.tickets,
            *self.keys.stride(),
            *self.values.stride(),
            *mask.stride(),
            self.saved.shape[1],
            self.record_at,
            self.offset.stride(0),
            *self.hw,
            *self.grid,
            self.channels,
            SHARED=shared,
            MASKED=self.mask is not None,
            PROJECTED=self.projection is not None,
            QUERY=self.query is not None,
            PARTS=self.parts,
            BINS=bins,
            GROUP=ROWS,
            TOKENS=side,
            SLICE=span,
            CHANNELS=self.small,
            PRECISION=self.precision,
            num_warps=4,
            num_stages=2,
            maxnreg=MOST_REGISTERS,
        )

    def _assign(self, chunks: int, fused: bool, together: bool, sums: tuple[Tensor, Tensor, Tensor]) -> None:
        tiles = self.tiles
        # Without sums of its own each tile is a chunk.
        pieces = chunks if fused else triton.cdiv(self.tokens, tiles.tokens)
        chunk = triton.cdiv(triton.cdiv(self.tokens, pieces), tiles.tokens) * tiles.tokens
        mask = self.labels if self.mask is None else self.mask
        similarity, centres, counts = self.results or (self.saved, self.saved, self.labels)
        assert self.offset is not None
        assign[(self.batch * pieces,)](
            self.keys,
            self.values,
            mask,
            self.saved,
            self.labels,
            similarity,
            centres,
            counts,
            self.matrix,
            self.row_scale,
            self.offset,
            *self.weights,
            self.alpha,
            self.beta,
            *sums,
            self.tickets[self.batch * triton.cdiv(self.centres, ROWS) :],
            *self.keys.stride(),
            *self.values.stride(),
            *mask.stride(),
            self.saved.shape[1],
            self.record_at,
            self.labels.shape[1],
            self.label_at,
            self.offset.stride(0),
            self.tokens,
            self.centres,
            self.channels,
            pieces,
            chunk,
            MASKED=self.mask is not None,
            WEIGHTED=self.weighted,
            PROJECTED=self.projection is not None,
            RESULTS=self.results is not None,
            AGGREGATE=fused,
            FINISH=together,
            PARTS=self.parts,
            TOKENS=tiles.tokens,
            CENTRES=tiles.centres,
            CHANNELS=tiles.channels,
            KEYS=tiles.keys,
            SLICE_TOKENS=tiles.summed,
            SLICE=tiles.slice,
            ROWS=ROWS,
            PRECISION=self.precision,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            maxnreg=MOST_REGISTERS,
        )

    def _aggregate(self, sums: Tensor, masses: Tensor, numbers: Tensor) -> None:
        tiles = self.tiles
        blocks = triton.cdiv(self.centres, tiles.centres) * triton.cdiv(self.channels, tiles.slice)
        aggregate[(self.batch * blocks,)](
            self.values,
            self.saved,
            self.labels,
            self.alpha,
            self.beta,
            sums,
            masses,
            numbers,
            *self.values.stride(),
            self.saved.shape[1],
            self.record_at,
            self.labels.shape[1],
            self.label_at,
            self.tokens,
            self.centres,
            self.channels,
            WEIGHTED=self.weighted,
            PARTS=self.parts,
            CENTRES=tiles.centres,
            TOKENS=tiles.summed,
            SLICE=tiles.slice,
            PRECISION=self.precision,
            num_warps=4,
            num_stages=tiles.stages,
        )

    def _finish(self, chunks: int, sums: Tensor, masses: Tensor, numbers: Tensor) -> None:
        _, centres, counts = self.results or (self.saved, self.saved, self.labels)
        finish[(self.batch * triton.cdiv(self.centres, ROWS),)](
            self.saved,
            sums,
            masses,
            numbers,
            *self.weights[2:],
            centres,
            counts,
            self.saved.shape[1],
            self.record_at,
            self.tokens,
            self.centres,
            self.channels,
            chunks,
            PROJECTED=self.projection is not None,
            RESULTS=self.results is not None,
            ROWS=ROWS,
            CHANNELS=self.small,
            PRECISION=self.precision,
            num_warps=4,
            num_stages=self.tiles.stages,
        )


def ticket_count(centres: int) -> int:
    """Tickets of a round for each item: of the groups of bins, and of the chunks."""
    return triton.cdiv(centres, ROWS) + 1
