"""What the kernels of the clustering's backward are given, and which tile sizes they get.

A kernel builds a tuple of tuples that it is given once more, by its name or by a slice, before a function takes it:
Triton 3.6 forgets the inner strides of 1 otherwise.
"""

# Triton functions take no annotations.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, block_of
from ..saved import RoundLayout
from .tiles import Vector, View

Tensor = torch.Tensor

MAX_CHUNKS = 16
# Centres of a program that walks over all channels: there are few of them.
WALK_CENTRES = 16

# What the gradient of a key comes from: its own cosine, or the product of the rounds' cosines (Eq. 4), which the first
# round computes again and a later one reads. The type of the operand `source` goes with it.
OWN_COSINE = tl.constexpr(0)
FIRST_PRODUCT = tl.constexpr(1)
LATER_PRODUCT = tl.constexpr(2)


class OwnCosine(NamedTuple):
    dcos: Vector  # [N], gradient of the cosine with the own centre, times the token's inverse norm
    unit: View  # [O, C]


class FirstProduct(NamedTuple):
    grad: View  # [N, C], of the output
    projected: View  # [J, C]
    last: View  # [J, C], the last centres
    query: View  # [J, C]
    offset: Vector  # [J]
    alpha: Any
    beta: Any
    columns: int  # J


class LaterProduct(NamedTuple):
    query: View  # [J, C]
    product: Vector  # [N, J]
    product_grad: Vector  # [N, J]
    columns: int  # J


class CentreKeys(NamedTuple):
    """Of the centres [O, C] of a round: unit keys with their inverse norms [O]; gradients of the means, of the unit
    keys, of the keys and of the pooled tokens; Wk and bk."""

    unit: View
    unit_inv_norm: Vector
    mean_grad: View
    unit_grad: View
    centre_grad: View
    pooled_grad: View
    weight: Any
    bias: Any


class Coverage(NamedTuple):
    """Tokens [height, width], bins [rows, columns]; the most bins that cover a token, vertically and horizontally."""

    height: int
    width: int
    rows: int
    columns: int
    max_y: int
    max_x: int


class Tile(NamedTuple):
    """Blocks of a program: of tokens, of centres, of last centres, of channels to write and to sum over."""

    tokens: int
    centres: int
    columns: int
    channels: int
    inner: int
    warps: int
    registers: int | None = None  # of a thread; left to its own choice the assembler may spill to save some

    def at_most(self, **sizes: int) -> Tile:
        """With smaller blocks; the interpreter pays for programs, not for elements."""
        if INTERPRETED.value:
            return self
        return self._replace(**{name: min(size, getattr(self, name)) for name, size in sizes.items()})

    def options(self, *names: str, stages: int = 2) -> dict[str, int]:
        """stages: of the loops' loads; a second one takes registers."""
        chosen = {name: getattr(self, name.lower()) for name in names}
        chosen |= {"num_warps": self.warps, "num_stages": stages}
        return chosen if self.registers is None else chosen | {"maxnreg": self.registers}


def choose_tile(
    dtype: torch.dtype, tokens: int, centres: int, columns: int, channels: int, wide: int = 64
) -> Tile:
    """wide: most channels of a block. The batch decides nothing that changes a sum: it is not asked."""
    if INTERPRETED.value:  # which pays for programs, not for elements
        sizes = [max(16, triton.next_power_of_2(size)) for size in (tokens, centres, columns, channels)]
        block = min(256, sizes[3])
        return Tile(min(512, sizes[0]), min(1024, sizes[1]), min(256, sizes[2]), block, block, 4)
    if dtype == torch.float64:
        return Tile(16, 16, 16, block_of(channels, 32), 16, 4, 255)
    narrow = 32 if dtype == torch.float32 else 64
    return Tile(
        narrow,
        block_of(centres, 64),
        block_of(columns, 16),
        block_of(channels, wide),
        block_of(channels, narrow),
        4 if narrow == 32 and wide <= 64 else 8,
    )


def chunks_of(tokens: int, centres: int, block: int) -> tuple[int, int]:
    """(chunks, tokens of one) of a pass over a sample's tokens: their partial centres no more than the tokens."""
    count = max(1, min(MAX_CHUNKS, triton.cdiv(tokens, 128), tokens // centres))
    span = triton.cdiv(triton.cdiv(tokens, count), block) * block
    return triton.cdiv(tokens, span), span


def _max_bins(size: int, bins: int) -> int:
    """The most of the `bins` that cover one of `size` pixels."""
    if size % bins == 0:
        return 1
    return bins // size if bins % size == 0 else (bins - 1) // size + 2


@triton.jit
def saved_vector(saved, begin):
    """The part of `saved` that begins at `begin`, as a vector."""
    return Vector(saved.start + begin, saved.sample)


@triton.jit
def saved_rows(saved, begin, channels):
    """The part [rows, C] of `saved` that begins at `begin`, as a view."""
    return View(saved.start + begin, saved.sample, channels, 1)


class Round:
    """A round as the forward pass left it: saved [B, *], labels [B, tokens of all rounds], and its tokens [B, N, C]."""

    def __init__(self, layout: RoundLayout, saved: Tensor, labels: Tensor, tokens: Tensor) -> None:
        self.tokens, self.centres, self.channels = layout.tokens, layout.centres, tokens.shape[2]
        self.batch, self.stride = saved.shape
        self.compute, self.dtype = saved.dtype, tokens.dtype
        self.storage, self.layout = saved, layout.saved
        self.saved = Vector(saved, self.stride)
        self.labels = Vector(labels[:, layout.labels :], labels.shape[1])
        (height, width), (rows, columns) = layout.hw, layout.grid
        self.coverage = Coverage(
            height, width, rows, columns, _max_bins(height, rows), _max_bins(width, columns)
        )

    def vector(self, begin: int) -> Vector:
        """The part of `saved` that begins at `begin`."""
        return Vector(self.storage[:, begin:], self.stride)

    def rows(self, begin: int) -> View:
        """The part [O, C] or [J, C] of `saved` that begins at `begin`."""
        return View(self.storage[:, begin:], self.stride, self.channels, 1)

    def matrix(self, begin: int) -> Tensor:
        """A part [O, C] of `saved` as a tensor [B, O, C]."""
        strides = (self.stride, self.channels, 1)
        return self.storage[:, begin:].as_strided((self.batch, self.centres, self.channels), strides)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.storage.new_empty((self.batch, *shape), dtype=dtype or self.compute)

    def empty_rows(self) -> Tensor:
        """Workspace [B, O, C]"""
        return self.empty(self.centres, self.channels)

    def tile(self, wide: int = 64, columns: int = 1) -> Tile:
        return choose_tile(self.dtype, self.tokens, self.centres, columns, self.channels, wide)
