"""The clustering on Triton kernels: `frd_triton::cluster` and `frd_triton::icm`.

Signatures and semantics are those of `csrc/register.cpp`; arguments are checked by the caller. A round is two or three
launches: `triton_pool.pool`, `triton_assign.assign` and, where a chunk's sums are many, the rest of
`triton_aggregate`.
"""

from __future__ import annotations

import torch
import triton

from .._triton_ops import INTERPRETED, block_of, on_device
from . import ops
from .reference import compute_dtype
from .triton_dense import chain_dispatch, dense_dispatch, queries
from .triton_round import MOST_REGISTERS, Round, ticket_count
from .triton_tiles import RoundLayout, precision, round_layouts

Tensor = torch.Tensor
PAPER = 0


def cluster(
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    grid: list[int],
    hw: list[int],
    aggregate: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One round on keys and values [B, N, C], mask [B, N] bool: centres [B, O, C], labels [B, N], similarity [B, N],
    counts [B, O], saved [B, *]."""
    batch, tokens, channels = k.shape
    centres, dtype = grid[0] * grid[1], compute_dtype(k.dtype)
    out = v.new_empty((batch, centres, channels))
    labels = k.new_empty((batch, tokens), dtype=torch.int32)
    similarity = k.new_empty((batch, tokens), dtype=dtype)
    counts = k.new_empty((batch, centres), dtype=torch.int32)
    saved = k.new_empty((batch, ops.saved_size(tokens, centres, channels)), dtype=dtype)
    if batch > 0:
        with on_device(k):
            Round(
                keys=k,
                values=v,
                mask=None if mask is None else _mask_of(mask, dtype),
                hw=hw,
                grid=grid,
                alpha=alpha.contiguous(),
                beta=beta.contiguous(),
                weighted=aggregate == 1,
                projection=None,
                labels=labels,
                saved=saved,
                tickets=labels.new_zeros(batch * ticket_count(centres)),
                results=(similarity, out, counts),
            ).run()
    return out, labels, similarity, counts, saved


def _mask_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """As integers: bytes would lead Triton 3.6 to a matrix product that float64 does not have."""
    return mask.to(torch.int32) if dtype == torch.float64 else mask.view(torch.uint8)


def icm(
    x: Tensor,
    projections: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    grids: list[int],
    hw: list[int],
    variant: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """All rounds on tokens [B, N, C] and the dispatch: out like x, labels [B, *], saved [B, *]. projections: Wk, bk,
    Wv, bv of each round, empty where it has none."""
    batch, _, channels = x.shape
    layouts, label_count, length = round_layouts(hw, grids, channels, variant)
    out = ops.like_tokens(x)
    labels = x.new_empty((batch, label_count), dtype=torch.int32)
    saved = x.new_empty((batch, length), dtype=compute_dtype(x.dtype))
    if batch == 0:
        return out, labels, saved
    alpha, beta = alpha.contiguous(), beta.contiguous()
    given = [projections[i : i + 4] for i in range(0, len(projections), 4)]
    maps = [None if p[0].numel() == 0 else [part.contiguous() for part in p] for p in given]
    with on_device(x):
        _run_rounds(x, maps, alpha, beta, layouts, variant, labels, saved)
        if variant == PAPER:
            _query(maps, layouts, channels, saved)
            _dense(x, alpha, beta, layouts, saved, out)
        else:
            _chains(alpha, beta, layouts, labels, saved, out)
    return out, labels, saved


def _result(layout: RoundLayout, channels: int) -> int:
    """Where the centres of a round begin in an item's part of `saved`."""
    return layout.record + 2 * layout.tokens + 3 * layout.centres * channels


def _run_rounds(
    x: Tensor,
    maps: list[list[Tensor] | None],
    alpha: Tensor,
    beta: Tensor,
    layouts: list[RoundLayout],
    variant: int,
    labels: Tensor,
    saved: Tensor,
) -> None:
    batch, _, channels = x.shape
    tickets = labels.new_zeros(batch * sum(ticket_count(layout.centres) for layout in layouts))
    tokens, last = x, layouts[-1]
    for t, layout in enumerate(layouts):
        queried = variant == PAPER and layout is last
        own = slice(0 if variant == PAPER else t, None)
        Round(
            keys=tokens,
            values=tokens,
            mask=None,
            hw=layout.hw,
            grid=layout.grid,
            alpha=alpha[own],
            beta=beta[own],
            weighted=variant != PAPER,
            projection=maps[t],
            labels=labels,
            saved=saved,
            tickets=tickets,
            label_at=layout.labels,
            record_at=layout.record,
            query=saved[:, layout.query :] if queried else None,
            projected=saved[:, layout.projected :] if queried else None,
            offset=saved[:, layout.offset :] if queried else None,
        ).run()
        tickets = tickets[batch * ticket_count(layout.centres) :]
        begin = _result(layout, channels)
        tokens = saved[:, begin : begin + layout.centres * channels].unflatten(1, (layout.centres, channels))


def _query(maps: list[list[Tensor] | None], layouts: list[RoundLayout], channels: int, saved: Tensor) -> None:
    if len(layouts) == 1:
        return  # its pooling has written them
    columns = layouts[-1].centres
    block = max(16, min(triton.next_power_of_2(columns), 256 if INTERPRETED.value else 16))
    wide = 256 if INTERPRETED.value else 16 if saved.dtype == torch.float64 else 32
    queries[(saved.shape[0] * triton.cdiv(columns, block),)](
        saved,
        *(tuple(getattr(layout, name) for layout in layouts) for name in ("record", "query", "projected")),
        *(tuple(getattr(layout, name) for layout in layouts) for name in ("offset", "product", "tokens")),
        *(tuple(saved if p is None else p[i] for p in maps) for i in (0, 1)),
        saved.shape[1],
        columns,
        channels,
        ROUNDS=len(layouts),
        PROJECTED=sum(1 << t for t, p in enumerate(maps) if p is not None),
        TOKENS=64 if INTERPRETED.value else 16,
        COLUMNS=block,
        CHANNELS=block_of(channels, wide),
        PRECISION=precision(saved.dtype),
        num_warps=4,
        num_stages=2,
        maxnreg=MOST_REGISTERS,
    )


def _dense(
    x: Tensor, alpha: Tensor, beta: Tensor, layouts: list[RoundLayout], saved: Tensor, out: Tensor
) -> None:
    batch, tokens, channels = x.shape
    first, last = layouts[0], layouts[-1]
    columns = last.centres
    wide = saved.dtype == torch.float64
    most = 256 if INTERPRETED.value else 16 if wide else 64
    block = max(16, min(triton.next_power_of_2(columns), most))
    tile = max(16, min(triton.next_power_of_2(tokens), most))
    tiles = triton.cdiv(tokens, tile)
    dense_dispatch[(batch * tiles,)](
        x,
        saved,
        alpha,
        beta,
        out,
        *x.stride(),
        *out.stride(),
        saved.shape[1],
        first.projected,
        first.offset,
        _result(last, channels),
        tokens,
        columns,
        channels,
        tiles,
        WHOLE=columns <= block,
        TOKENS=tile,
        COLUMNS=block,
        CHANNELS=block_of(channels, 256 if INTERPRETED.value else 16 if wide else 32),
        PRECISION=precision(saved.dtype),
        num_warps=4,
        num_stages=2,
        maxnreg=MOST_REGISTERS,
    )


def _chains(
    alpha: Tensor, beta: Tensor, layouts: list[RoundLayout], labels: Tensor, saved: Tensor, out: Tensor
) -> None:
    batch, tokens, channels = out.shape
    tile = max(16, min(triton.next_power_of_2(tokens), 256 if INTERPRETED.value else 32))
    tiles = triton.cdiv(tokens, tile)
    chain_dispatch[(batch * tiles,)](
        saved,
        labels,
        alpha,
        beta,
        out,
        tuple(layout.record for layout in layouts),
        tuple(layout.labels for layout in layouts),
        *out.stride(),
        saved.shape[1],
        labels.shape[1],
        _result(layouts[-1], channels),
        tokens,
        channels,
        tiles,
        ROUNDS=len(layouts),
        TOKENS=tile,
        CHANNELS=block_of(channels, 256 if INTERPRETED.value else 64),
        num_warps=4,
    )
