"""How the Triton kernels of the clustering's backward are launched: blocks, a round's parts, sums by label."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .._triton_ops import INTERPRETED, block_of
from .triton_backward_own import label_sums, own_pulls
from .triton_backward_round import token_gradients
from .triton_tiles import RoundLayout

Tensor = torch.Tensor
View = tuple[Tensor, int, int, int]  # (first element, strides of an item, of a row, of a channel)
Vector = tuple[Tensor, int]  # (first element, stride of an item)

_MOST_CHUNKS = 16
WALKED = 16  # centres of a program that walks over all channels: there are few of them
FIRST = 8  # entries of `dense` in the first round, as in `triton_backward_dense`


class Tiles(NamedTuple):
    """Blocks of a program: of tokens, of centres, of last centres, of channels to write and to sum over."""

    tokens: int
    centres: int
    columns: int
    channels: int
    inner: int
    warps: int
    registers: int | None = None  # of a thread at most: left to itself the assembler may spill to save some

    def at_most(self, **sizes: int) -> Tiles:
        """With smaller blocks; the interpreter pays for programs, not for elements."""
        if INTERPRETED.value:
            return self
        return self._replace(**{name: min(size, getattr(self, name)) for name, size in sizes.items()})

    def options(self, *names: str, stages: int = 2) -> dict[str, int]:
        """stages: of the loops' loads; a second one takes registers."""
        chosen = {name: getattr(self, name.lower()) for name in names}
        chosen |= {"num_warps": self.warps, "num_stages": stages}
        return chosen if self.registers is None else chosen | {"maxnreg": self.registers}


def tiles(
    dtype: torch.dtype, tokens: int, centres: int, columns: int, channels: int, wide: int = 64
) -> Tiles:
    """wide: most channels of a block. The batch decides nothing that changes a sum: it is not asked."""
    if INTERPRETED.value:  # which pays for programs, not for elements
        most = [max(16, triton.next_power_of_2(size)) for size in (tokens, centres, columns, channels)]
        block = min(256, most[3])
        return Tiles(min(512, most[0]), min(1024, most[1]), min(256, most[2]), block, block, 4)
    if dtype == torch.float64:
        return Tiles(16, 16, 16, block_of(channels, 32), 16, 4, 255)
    narrow = 32 if dtype == torch.float32 else 64
    return Tiles(
        narrow,
        block_of(centres, 64),
        block_of(columns, 16),
        block_of(channels, wide),
        block_of(channels, narrow),
        4 if narrow == 32 and wide <= 64 else 8,
    )


def view_of(t: Tensor) -> View:
    """t [B, N, C]"""
    item, row, channel = t.stride()
    return t, item, row, channel


def rows_of(t: Tensor) -> View:
    """t [B, rows, C], contiguous"""
    return t, t.shape[1] * t.shape[2], t.shape[2], 1


def vector_of(t: Tensor) -> Vector:
    """t [B, ...], contiguous"""
    return t, t[0].numel() if t.shape[0] else 0


def chunks_of(tokens: int, centres: int, block: int) -> tuple[int, int]:
    """(chunks, tokens of one) of a pass over an item's tokens: their partial centres no more than the tokens."""
    count = max(1, min(_MOST_CHUNKS, triton.cdiv(tokens, 128), tokens // centres))
    span = triton.cdiv(triton.cdiv(tokens, count), block) * block
    return triton.cdiv(tokens, span), span


class Round:
    """A round as the forward pass left it, and the workspace of its backward.

    saved [B, L], labels [B, tokens of all rounds]; tokens: where its keys' and values' tokens are.
    """

    def __init__(self, layout: RoundLayout, saved: Tensor, labels: Tensor, tokens: Tensor) -> None:
        self.tokens, self.centres, self.channels = layout.tokens, layout.centres, tokens.shape[2]
        self.batch, self.stride = saved.shape
        self.compute, self.dtype = saved.dtype, tokens.dtype
        self.labels: Vector = labels[:, layout.labels :], labels.shape[1]
        sizes = [self.tokens] * 2 + [self.centres * self.channels] * 4 + [self.centres] * 3
        starts = [layout.record + sum(sizes[:i]) for i in range(len(sizes))]
        parts = [(saved[:, start:], self.stride) for start in starts]
        self.cosine, self.scale = parts[:2]
        self.pooled, self.unit, self.mean, self.result = ((*part, self.channels, 1) for part in parts[2:6])
        self.unit_scale, self.mass, self.share = parts[6:]
        (height, width), (rows, columns) = layout.hw, layout.grid
        self.geometry = (height, width, rows, columns, _most_bins(height, rows), _most_bins(width, columns))

    def matrix(self, view: View) -> Tensor:
        """A part [O, C] of `saved` as a tensor [B, O, C]."""
        return view[0].as_strided((self.batch, self.centres, self.channels), view[1:])

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.cosine[0].new_empty((self.batch, *shape), dtype=dtype or self.compute)

    def rows(self) -> Tensor:
        """Workspace [B, O, C]"""
        return self.empty(self.centres, self.channels)

    def tiles(self, wide: int = 64, columns: int = 1) -> Tiles:
        return tiles(self.dtype, self.tokens, self.centres, columns, self.channels, wide)


def _most_bins(size: int, bins: int) -> int:
    """No pixel of `size` lies in more of the `bins` than this."""
    if size % bins == 0:
        return 1
    return bins // size if bins % size == 0 else (bins - 1) // size + 2


def sum_by_label(
    rows: View,
    labels: Vector,
    factor: Vector,
    scale: Vector | None,
    out: View,
    sizes: tuple[int, int, int, int],  # B, N, O, C
    round: tuple[Any, ...] = (),
    shared: bool = False,
    projected: bool = False,
) -> None:
    """out [B, O, C]: the sum of factor (times scale) * row of each centre's tokens; then `centre_rows` of `round`."""
    batch, tokens, centres, channels = sizes
    tile = tiles(rows[0].dtype, tokens, centres, 1, channels)
    if tile.warps == 4:  # the assembler would keep to 64 and spill
        tile = tile._replace(registers=255)
    chunks, span = chunks_of(tokens, centres, tile.tokens)
    blocks, centre_blocks = triton.cdiv(channels, tile.channels), triton.cdiv(centres, tile.centres)
    partial = factor[0].new_empty((batch, chunks, centres, channels))
    pulls = factor[0].new_empty((batch, chunks, centres) if projected else (1,))
    ticket = factor[0].new_zeros((batch, centre_blocks, blocks + 1), dtype=torch.int32)
    label_sums[(batch * chunks * centre_blocks * blocks,)](
        rows,
        labels,
        factor,
        scale or factor,
        partial,
        pulls,
        ticket,
        out,
        round,
        tokens,
        channels,
        centres,
        chunks,
        span,
        SCALED=scale is not None,
        GATHER=bool(round),
        SHARED=shared,
        PROJECTED=projected,
        PARTS=3 if rows[0].dtype == torch.float32 else 2,
        CHUNKS=_MOST_CHUNKS,
        **tile.options("TOKENS", "CENTRES", "CHANNELS", "INNER"),
    )


def launch_pulls(
    r: Round,
    values: Tensor,
    similarity_grad: Vector,
    mean_grad: View,
    alpha: Tensor,
    beta: Tensor,
    gates: Tensor,
    divide: bool,
) -> Vector:
    """Gradients of the own cosines times `scale`; gates [B, places, 2], zeros: their parts of alpha's and beta's."""
    pull = r.empty(r.tokens)
    tile = r.tiles()
    own_pulls[(r.batch * triton.cdiv(r.tokens, tile.tokens),)](
        view_of(values),
        r.labels,
        r.cosine,
        r.scale,
        similarity_grad,
        r.mean,
        mean_grad,
        r.mass,
        alpha,
        beta,
        vector_of(pull),
        gates,
        gates.shape[1],
        r.tokens,
        r.channels,
        DIVIDE=divide,
        **tile.options("TOKENS", "CHANNELS"),
    )
    return vector_of(pull)


def gate_places(r: Round) -> int:
    return triton.cdiv(r.tokens, r.tiles().tokens)


def sum_gates(gates: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients [T] of alpha and beta from their parts [T, B, places, 2]."""
    alpha, beta = (part.sum((1, 2), dtype=torch.float64).to(gates.dtype) for part in gates.unbind(3))
    return alpha, beta


def dense_kind(dense: tuple[Any, ...]) -> int:
    if not dense:
        return 0
    return 1 if len(dense) == FIRST else 2


def launch_tokens(
    r: Round,
    *,
    keys: View,
    out: tuple[View, View],
    mean_grad: View,
    pooled_grad: View,
    gate: tuple[Tensor, Tensor],
    own: tuple[Any, ...] = (),
    dense: tuple[Any, ...] = (),
    key_grads: View | None = None,
    weight: Tensor | None = None,
    **constants: bool,
) -> None:
    """Writes the gradients of the tokens; key_grads: those of their projected keys, weight: of the projection."""
    if key_grads is not None:
        dense = ()
    columns = dense[-1] if dense else 1
    first = len(dense) == FIRST  # the products and the bins together take many registers
    tile = r.tiles(columns=columns)
    if first:
        tile = tile.at_most(tokens=32)
    grid = r.batch * triton.cdiv(r.tokens, tile.tokens) * triton.cdiv(r.channels, tile.channels)
    token_gradients[(grid,)](
        keys,
        key_grads or keys,
        *out,
        r.labels,
        r.cosine,
        r.scale,
        own,
        dense,
        mean_grad,
        r.mass,
        pooled_grad,
        r.share,
        gate[0] if weight is None else weight,
        *gate,
        r.geometry,
        r.tokens,
        r.channels,
        DENSE=dense_kind(dense),
        PROJECTED=key_grads is not None,
        **constants,
        **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER", stages=1 if first else 2),
    )
