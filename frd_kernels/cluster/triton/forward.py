"""The clustering on Triton kernels: `frd_triton::cluster` and `frd_triton::icm`.

Signatures and semantics are those of `csrc/register.cpp`; arguments are checked by the caller.
"""

from __future__ import annotations

import torch

from ..._triton_ops import on_device
from ..ops import like_tokens
from ..saved import RoundLayout, compute_dtype, round_layouts, saved_round
from .assign import launch_assign
from .icm_dispatch import launch_chains, launch_dense, launch_queries
from .operands import Results, Round, counter_count
from .pool import launch_pool
from .tiles import Gate

Tensor = torch.Tensor
PAPER = 0


def run_round(r: Round) -> None:
    launch_pool(r)
    launch_assign(r)


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
    layout = saved_round(0, tokens, centres, channels)
    out = v.new_empty((batch, centres, channels))
    labels = k.new_empty((batch, tokens), dtype=torch.int32)
    similarity = k.new_empty((batch, tokens), dtype=dtype)
    counts = k.new_empty((batch, centres), dtype=torch.int32)
    saved = k.new_empty((batch, layout.end), dtype=dtype)
    if batch > 0:
        with on_device(k):
            run_round(
                Round(
                    keys=k,
                    values=v,
                    mask=None if mask is None else _mask_of(mask, dtype),
                    hw=hw,
                    grid=grid,
                    gate=Gate(alpha.contiguous(), beta.contiguous()),
                    weighted=aggregate == 1,
                    projection=None,
                    labels=labels,
                    saved=saved,
                    layout=layout,
                    counters=labels.new_zeros(batch * counter_count(centres)),
                    results=Results(similarity, out, counts),
                )
            )
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
    out = like_tokens(x)
    labels = x.new_empty((batch, label_count), dtype=torch.int32)
    saved = x.new_empty((batch, length), dtype=compute_dtype(x.dtype))
    if batch == 0:
        return out, labels, saved
    gate = Gate(alpha.contiguous(), beta.contiguous())
    given = [projections[i : i + 4] for i in range(0, len(projections), 4)]
    maps = [None if p[0].numel() == 0 else [part.contiguous() for part in p] for p in given]
    with on_device(x):
        _run_rounds(x, maps, gate, layouts, variant, labels, saved)
        if variant == PAPER:
            launch_queries(maps, layouts, channels, saved)
            launch_dense(x, gate, layouts, saved, out)
        else:
            launch_chains(gate, layouts, labels, saved, out)
    return out, labels, saved


def _run_rounds(
    x: Tensor,
    maps: list[list[Tensor] | None],
    gate: Gate,
    layouts: list[RoundLayout],
    variant: int,
    labels: Tensor,
    saved: Tensor,
) -> None:
    batch, _, channels = x.shape
    counters = labels.new_zeros(batch * sum(counter_count(layout.centres) for layout in layouts))
    tokens, last = x, layouts[-1]
    for t, layout in enumerate(layouts):
        own = slice(0 if variant == PAPER else t, None)
        run_round(
            Round(
                keys=tokens,
                values=tokens,
                mask=None,
                hw=layout.hw,
                grid=layout.grid,
                gate=Gate(gate.alpha[own], gate.beta[own]),
                weighted=variant != PAPER,
                projection=maps[t],
                labels=labels,
                saved=saved,
                layout=layout.saved,
                counters=counters,
                label_at=layout.labels,
                queried=variant == PAPER and layout is last,
            )
        )
        counters = counters[batch * counter_count(layout.centres) :]
        begin = layout.saved.result
        tokens = saved[:, begin : begin + layout.centres * channels].unflatten(1, (layout.centres, channels))
