"""What the kernels of a forward round are given, and which tile sizes they get."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from ..._triton_ops import INTERPRETED, block_of
from ..saved import SavedRound
from .tiles import Gate, Vector, part_count, precision, view_of

Tensor = torch.Tensor

# Of a thread: left to its own choice the assembler spills a value or two to fit one more block of threads.
MAX_REGISTERS = 255
# Centres whose keys, and whose means, one program makes.
ROWS = 256 if INTERPRETED.value else 16


class Mask(NamedTuple):
    """[B, N] of integers: the first element, strides of a sample, of a token. Any tensor where nothing is masked."""

    start: Any
    sample: int
    token: int


class Image(NamedTuple):
    """Tokens [height, width], bins [rows, columns]."""

    height: int
    width: int
    rows: int
    columns: int


class Projection(NamedTuple):
    """Keys are x Wk^T + bk, values x Wv^T + bv: Wk, Wv [C, C], bk, bv [C]."""

    key_weight: Any
    key_bias: Any
    value_weight: Any
    value_bias: Any


class ScoreMatrix(NamedTuple):
    """With keys Wk x + bk the score of token x and centre o is x . (unit_o Wk) + unit_o . bk: no key of a token is
    needed. `matrix` [B, PARTS, O, C] is unit Wk (unit without projection), for 16-bit tokens in PARTS of their dtype
    that add up to it; row_scale [B, O] scales its products back; offset [B, O] is unit . bk."""

    matrix: Any
    row_scale: Any
    offset: Any
    offset_sample: int  # stride of a sample


class Sums(NamedTuple):
    """Of each chunk of tokens and each centre: weighted values [B, chunks, O, C], weights and tokens [B, chunks, O]."""

    totals: Any  # `values` is taken: Triton keeps a tuple's elements there
    weights: Any
    counts: Any


class Results(NamedTuple):
    """What only the operator `cluster` returns: similarity [B, N], centres [B, O, C], counts [B, O]."""

    similarity: Any
    centres: Any
    counts: Any


class Sizes(NamedTuple):
    tokens: int
    centres: int
    channels: int
    chunks: int
    chunk: int  # tokens of one


class Tile(NamedTuple):
    """Blocks of the kernels. Of N, O, C and the dtype alone: a sample's sums do not depend on its batch."""

    tokens: int
    centres: int
    channels: int
    keys: int  # output channels of Wk at a time
    slice: int  # channels of a block of sums
    summed: int  # tokens of a step of the sums
    rows: int  # centres whose means are made at a time
    warps: int
    stages: int


def choose_tile(tokens: int, centres: int, channels: int, dtype: torch.dtype) -> Tile:
    token_block = max(16, triton.next_power_of_2(tokens))
    centre_block = max(16, triton.next_power_of_2(centres))
    if INTERPRETED.value:  # which pays for programs and steps, not for elements
        wide = min(256, max(16, triton.next_power_of_2(channels)))
        token_block = min(token_block, 256)
        return Tile(token_block, min(centre_block, 256), wide, wide, wide, token_block, ROWS, 4, 1)
    if dtype == torch.float64:
        return Tile(16, 16, block_of(channels, 16), 16, 16, 16, ROWS, 4, 1)
    # The widest of which none spills.
    centre_block = min(centre_block, 64)
    block = block_of(channels, 16 if dtype == torch.float32 else 32)
    if dtype == torch.float32 or tokens < 1024:
        token_block = min(token_block, 32)
        return Tile(token_block, centre_block, block, block_of(channels, 64), block, token_block, ROWS, 4, 2)
    return Tile(128, centre_block, block, block_of(channels, 128), block, 64, ROWS, 8, 2)


def counter_count(centres: int) -> int:
    """Arrival counters of a round for each sample: of the groups of bins, and of the chunks."""
    return triton.cdiv(centres, ROWS) + 1


@dataclasses.dataclass
class Round:
    """keys, values [B, N, C] (one tensor: pooled once), mask [B, N] of integers or None, labels [B, *] with the
    round's own at `label_at`, saved [B, *] with its parts at `layout`. projection: Wk, bk, Wv, bv or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    hw: Sequence[int]
    grid: Sequence[int]
    gate: Gate  # each [1]
    weighted: bool
    projection: Sequence[Tensor] | None
    labels: Tensor
    saved: Tensor
    layout: SavedRound
    counters: Tensor  # [B, counter_count]: zeros
    label_at: int = 0
    queried: bool = False  # last round of variant paper: writes query, projected and offset of its layout
    results: Results | None = None  # of the operator `cluster`

    def __post_init__(self) -> None:
        self.batch, self.tokens, self.channels = self.keys.shape
        self.centres = self.grid[0] * self.grid[1]
        self.tile = choose_tile(self.tokens, self.centres, self.channels, self.keys.dtype)
        self.parts = part_count(self.keys.dtype)
        self.precision = precision(self.saved.dtype)
        # Channels of a step of the products of float32 centres.
        block = 256 if INTERPRETED.value else 32 if self.saved.dtype == torch.float32 else 16
        self.centre_channels = block_of(self.channels, block)
        self.masked, self.projected = self.mask is not None, self.projection is not None
        mask = self.labels if self.mask is None else self.mask
        self.mask_view = Mask(mask, *mask.stride())
        self.key_view, self.value_view = view_of(self.keys), view_of(self.values)
        self.label_vector = Vector(self.labels[:, self.label_at :], self.labels.shape[1])
        self.saved_vector = Vector(self.saved, self.saved.shape[1])
        self.weights = Projection(*(self.projection or [self.keys] * 4))
        matrix = self.keys.new_empty((self.batch, self.parts, self.centres, self.channels))
        row_scale = self.saved.new_empty((self.batch, self.centres))
        offset = self.saved[:, self.layout.offset :] if self.queried else torch.empty_like(row_scale)
        self.scores = ScoreMatrix(matrix, row_scale, offset, offset.stride(0))

    @property
    def outputs(self) -> Results:
        """Of any tensors where the operator returns none."""
        return self.results or Results(self.saved, self.saved, self.labels)
