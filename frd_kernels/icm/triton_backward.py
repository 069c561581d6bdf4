"""Gradients of the clustering and of the ICM on Triton kernels: `frd_triton::cluster_backward`, `icm_backward`.

A round's backward: gradients of its means, of the own cosines or of the product of the cosines, of its pooled keys,
then of its tokens. Sums over tokens are split by the shapes alone and added in a fixed order; of products of tokens
and centres only those of variant paper's later rounds with the last centres are stored, as in the forward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .ops import _like_tokens
from .triton_backward_dense import chain_gradients, dense_sums, query_gradients
from .triton_backward_own import chain_scalars, chains, label_sums, own_pulls
from .triton_backward_round import dense_centres, key_gradients, means, token_gradients
from .triton_tiles import INTERPRETED, RoundLayout, block_of, on_device, round_layouts

Tensor = torch.Tensor
View = tuple[Tensor, int, int, int]  # (first element, strides of an item, of a row, of a channel)
Vector = tuple[Tensor, int]

_MOST_CHUNKS = 16


class Tiles(NamedTuple):
    """Blocks of a program: of tokens, of centres, of last centres, of channels to write and to sum over."""

    tokens: int
    centres: int
    columns: int
    channels: int
    inner: int
    warps: int

    def options(self, *names: str) -> dict[str, int]:
        chosen = {name: getattr(self, name.lower()) for name in names}
        return chosen | {"num_warps": self.warps, "num_stages": 2}


def tiles(dtype: torch.dtype, tokens: int, centres: int, columns: int, channels: int, wide: int = 64) -> Tiles:
    """wide: most channels of a block. The batch decides nothing that changes a sum: it is not asked."""
    if INTERPRETED.value:  # which pays for programs, not for elements
        most = [max(16, triton.next_power_of_2(size)) for size in (tokens, centres, columns, channels)]
        block = min(256, most[3])
        return Tiles(min(512, most[0]), min(1024, most[1]), min(256, most[2]), block, block, 4)
    if dtype == torch.float64:
        return Tiles(16, 16, 16, block_of(channels, 32), 16, 4)
    narrow = 32 if dtype == torch.float32 else 64
    return Tiles(
        narrow,
        block_of(centres, 64),
        block_of(columns, 16),
        block_of(channels, wide),
        block_of(channels, narrow),
        4 if wide <= 64 else 8,
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


def _pulls(
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


def _gate_places(r: Round) -> int:
    return triton.cdiv(r.tokens, r.tiles().tokens)


def cluster_backward(
    grad_centres: Tensor,
    grad_similarity: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    labels: Tensor,
    saved: Tensor,
    grid: list[int],
    hw: list[int],
    aggregate: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_centres [B, O, C], grad_similarity [B, N] -> gradients of k, v [B, N, C], of alpha, beta [1]."""
    grad_k, grad_v = _like_tokens(k), _like_tokens(v)
    if not k.shape[0]:
        return grad_k, grad_v, torch.zeros_like(alpha), torch.zeros_like(beta)
    layouts, _, _ = round_layouts(hw, grid, k.shape[2], 1)
    r = Round(layouts[0], saved.contiguous(), labels.contiguous(), k)
    pull: Vector = vector_of(grad_similarity.to(r.compute).contiguous())
    scale: Vector | None = r.scale
    weighted = aggregate == 1
    with on_device(k):
        if weighted:
            gates = r.empty(_gate_places(r), 2)
            pull, scale = _pulls(r, v, pull, view_of(grad_centres), alpha, beta, gates, True), None
        unit_grad, pooled_grad = rows_of(r.rows()), rows_of(r.rows())
        sizes = r.batch, r.tokens, r.centres, r.channels
        sources = (r.unit, r.unit_scale, unit_grad, unit_grad, unit_grad, pooled_grad, alpha, alpha)
        sum_by_label(view_of(k), r.labels, pull, scale, unit_grad, sizes, sources)
        _launch_tokens(
            r,
            keys=view_of(k),
            out=(view_of(grad_k), view_of(grad_v)),
            own=(pull, r.unit),
            mean_grad=view_of(grad_centres),
            pooled_grad=pooled_grad,
            gate=(alpha, beta),
            SHARED=False,
            WEIGHTED=weighted,
            SCALED=not weighted,
        )
    if not weighted:
        return grad_k, grad_v, torch.zeros_like(alpha), torch.zeros_like(beta)
    total = gates.sum((0, 1), dtype=torch.float64).to(r.compute)
    return grad_k, grad_v, total[:1].clone(), total[1:].clone()


def _launch_tokens(
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
    columns = dense[-1] if dense else 1
    tile = r.tiles(256 if len(dense) == _FIRST else 64, columns)
    grid = r.batch * triton.cdiv(r.tokens, tile.tokens) * triton.cdiv(r.channels, tile.channels)
    token_gradients[(grid,)](
        keys,
        key_grads or keys,
        *out,
        r.labels,
        r.cosine,
        r.scale,
        own,
        dense if key_grads is None else (),
        mean_grad,
        r.mass,
        pooled_grad,
        r.share,
        gate[0] if weight is None else weight,
        *gate,
        r.geometry,
        r.tokens,
        r.channels,
        DENSE=_dense_kind(dense),
        PROJECTED=key_grads is not None,
        **constants,
        **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER"),
    )


_FIRST = 8  # entries of `dense` in the first round


def _dense_kind(dense: tuple[Any, ...]) -> int:
    if not dense:
        return 0
    return 1 if len(dense) == _FIRST else 2


class _Backward:
    """The backward of `icm` from the last round to the first."""

    def __init__(
        self,
        grad: Tensor,
        x: Tensor,
        projections: list[Tensor],
        alpha: Tensor,
        beta: Tensor,
        labels: Tensor,
        saved: Tensor,
        grids: list[int],
        hw: list[int],
        variant: int,
    ) -> None:
        self.grad, self.x, self.alpha, self.beta = grad, x, alpha, beta
        self.paper = variant == 0
        self.layouts, _, _ = round_layouts(hw, grids, x.shape[2], variant)
        self.saved, self.labels = saved.contiguous(), labels.contiguous()
        self.count, self.columns = len(self.layouts), self.layouts[-1].centres
        self.maps = [self._map(projections[4 * t : 4 * t + 4]) for t in range(self.count)]
        self.rounds: list[Round] = []
        for layout in self.layouts:
            tokens = self.rounds[-1].matrix(self.rounds[-1].result) if self.rounds else x
            self.rounds.append(Round(layout, self.saved, self.labels, tokens))
        self.dx = _like_tokens(x)
        self.result_grads = [r.rows() for r in self.rounds]
        self.unit_grads = [r.rows() for r in self.rounds]
        self.grads = [torch.zeros_like(p) for p in projections] if not x.shape[0] else []

    @staticmethod
    def _map(parts: list[Tensor]) -> list[Tensor] | None:
        return [part.contiguous() for part in parts] if parts[0].numel() else None

    def tokens(self, t: int) -> Tensor:
        """[B, N, C] of round t"""
        return self.x if t == 0 else self.rounds[t - 1].matrix(self.rounds[t - 1].result)

    def saved_rows(self, start: int) -> View:
        """[J, C] in `saved`"""
        return self.saved[:, start:], self.saved.shape[1], self.x.shape[2], 1

    def saved_vector(self, start: int) -> Vector:
        return self.saved[:, start:], self.saved.shape[1]

    def run(self) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        if not self.x.shape[0]:
            return self.dx, self.grads, torch.zeros_like(self.alpha), torch.zeros_like(self.beta)
        with on_device(self.x):
            gates = self._dense_dispatch() if self.paper else self._chain_dispatch()
            grads: list[list[Tensor]] = []
            for t in reversed(range(self.count)):
                grads.insert(0, self._round(t))
        total = gates.sum((1, 2), dtype=torch.float64).to(self.saved.dtype)
        flat = [part for parts in grads for part in parts]
        return self.dx, flat, total[:, 0].contiguous(), total[:, 1].contiguous()

    # ---- dispatch ----

    def _dense_dispatch(self) -> Tensor:
        """The gradients of the last centres, of all unit keys and of all products; gates [1, B, places, 2]."""
        r, columns = self.rounds[0], self.columns
        tile = r.tiles(128, columns)
        chunks, span = chunks_of(r.tokens, columns, tile.tokens)
        blocks = triton.cdiv(columns, tile.columns), triton.cdiv(r.channels, tile.channels)
        partial, pulls = r.empty(chunks, 2, columns, r.channels), r.empty(chunks, columns)
        gates = r.empty(chunks * blocks[0], 2)
        dense_sums[(r.batch * chunks * blocks[0] * blocks[1],)](
            view_of(self.x),
            self._dense(0),
            r.scale,
            partial,
            pulls,
            gates,
            r.tokens,
            r.channels,
            chunks,
            span,
            **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER"),
        )
        self.product_grads = [self.rounds[t].empty(self.rounds[t].tokens, columns) for t in range(1, self.count)]
        for t in range(self.count):
            self._query(t, partial, pulls, chunks)
        return gates[None]

    def _query(self, t: int, partial: Tensor, pulls: Tensor, chunks: int) -> None:
        """The gradients of a round's query and unit keys, and of the next round's product."""
        r, columns = self.rounds[t], self.columns
        last = t == self.count - 1
        query_grad = self.unit_grads[t] if last else r.empty(columns, r.channels)
        sums, product_grad = r.empty(columns, r.channels), self.product_grads[t - 1] if t else pulls
        tile = r.tiles(256, columns)
        projection = self.maps[t] or [self.alpha] * 4
        query_gradients[(r.batch * triton.cdiv(columns, tile.columns),)](
            partial,
            pulls,
            chunks,
            rows_of(self.result_grads[-1]),
            view_of(self.tokens(t)),
            r.scale,
            vector_of(product_grad),
            rows_of(sums),
            rows_of(query_grad),
            *projection[:2],
            r.tokens,
            r.channels,
            columns,
            FIRST=t == 0,
            PROJECTED=self.maps[t] is not None,
            **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER"),
        )
        if last:
            return
        tile = r.tiles(64, columns)
        chain_gradients[(r.batch * triton.cdiv(r.centres, tile.centres),)](
            self.saved_vector(self.layouts[t + 1].product),
            rows_of(query_grad),
            r.unit,
            rows_of(self.unit_grads[t]),
            vector_of(self.product_grads[t]),
            r.channels,
            r.centres,
            columns,
            **tile.options("CENTRES", "CHANNELS", "COLUMNS"),
        )

    def _dense(self, t: int) -> tuple[Any, ...]:
        """What `triton_backward_dense` calls so."""
        layout, columns = self.layouts[t], self.columns
        query = self.saved_rows(layout.query)
        if t > 0:
            product = self.saved_vector(layout.product)
            return query, product, vector_of(self.product_grads[t - 1]), columns
        return (
            view_of(self.grad),
            self.saved_rows(layout.projected),
            self.rounds[-1].result,
            query,
            self.saved_vector(layout.offset),
            self.alpha,
            self.beta,
            columns,
        )

    def _chain_dispatch(self) -> Tensor:
        """The gradients of the last centres and of the own similarities of all rounds; gates [T, B, places, 2]."""
        r = self.rounds[0]
        base, first = self.layouts[0].record, self.layouts[0].labels
        saved, labels = self.saved_vector(base), (self.labels[:, first:], self.labels.shape[1])
        steps = tuple((layout.record - base, layout.labels - first) for layout in self.layouts[1:])
        factor, ends = r.empty(r.tokens), r.empty(r.tokens, dtype=torch.int32)
        self.similarity_grads = [q.empty(q.tokens) for q in self.rounds]
        dots = [q.empty(q.tokens) for q in self.rounds]
        tile = r.tiles()
        chains[(r.batch * triton.cdiv(r.tokens, tile.tokens),)](
            view_of(self.grad),
            self.rounds[-1].result,
            saved,
            labels,
            self.alpha,
            self.beta,
            steps,
            vector_of(factor),
            vector_of(ends),
            vector_of(self.similarity_grads[0]),
            vector_of(dots[0]),
            r.tokens,
            r.channels,
            **tile.options("TOKENS", "CHANNELS"),
        )
        sizes = r.batch, r.tokens, self.columns, r.channels
        last_grad = rows_of(self.result_grads[-1])
        sum_by_label(view_of(self.grad), vector_of(ends), vector_of(factor), None, last_grad, sizes)
        for t in range(1, self.count):
            before, q = self.rounds[t - 1], self.rounds[t]
            chain_scalars[(q.batch * triton.cdiv(q.tokens, 16),)](
                before.labels,
                vector_of(dots[t - 1]),
                q.cosine,
                q.labels,
                saved,
                labels,
                self.alpha[t:],
                self.beta[t:],
                steps[t:],
                vector_of(self.similarity_grads[t]),
                vector_of(dots[t]),
                before.tokens,
                q.tokens,
                BEFORE=min(256, triton.next_power_of_2(before.tokens)),
                TOKENS=16,
                num_warps=4,
            )
        places = max(_gate_places(q) for q in self.rounds)
        self.gates = self.saved.new_zeros((self.count, r.batch, places, 2))
        return self.gates

    # ---- rounds ----

    def _round(self, t: int) -> list[Tensor]:
        """Gradients of the tokens of round t, which are the centres of the one before; returns those of its
        projections."""
        r, projection = self.rounds[t], self.maps[t]
        projected = projection is not None
        parts = projection or [self.alpha] * 4
        tokens, result_grad = self.tokens(t), self.result_grads[t]
        mean_grad, centre_grad, pooled_grad = r.rows(), r.rows(), r.rows()
        gate = (self.alpha[t:], self.beta[t:]) if not self.paper else (self.alpha, self.beta)
        own: tuple[Any, ...] = ()
        sources = (
            r.unit,
            r.unit_scale,
            rows_of(mean_grad),
            rows_of(self.unit_grads[t]),
            rows_of(centre_grad),
            rows_of(pooled_grad),
            *parts[:2],
        )
        tile = r.tiles()
        blocks = triton.cdiv(r.centres, tile.centres)
        if self.paper:
            dense_centres[(r.batch * blocks,)](
                rows_of(result_grad),
                r.mass,
                parts[2],
                *sources,
                r.channels,
                r.centres,
                PROJECTED=projected,
                **tile.options("CENTRES", "CHANNELS", "INNER"),
            )
        else:
            means[(r.batch * blocks,)](
                rows_of(result_grad),
                rows_of(mean_grad),
                r.mass,
                parts[2],
                r.channels,
                r.centres,
                PROJECTED=projected,
                **tile.options("CENTRES", "CHANNELS", "INNER"),
            )
            similarity_grad = vector_of(self.similarity_grads[t])
            pull = _pulls(r, tokens, similarity_grad, rows_of(mean_grad), *gate, self.gates[t], False)
            sizes = r.batch, r.tokens, r.centres, r.channels
            target = rows_of(centre_grad if projected else self.unit_grads[t])
            sum_by_label(view_of(tokens), r.labels, pull, None, target, sizes, sources, True, projected)
            own = pull, r.unit
        dense = self._dense(t) if self.paper else ()
        key_grads = None
        if projected:
            key_grads = torch.empty((r.batch, r.tokens, r.channels), dtype=r.dtype, device=tokens.device)
            self._launch_keys(r, tokens, key_grads, own, dense, parts)
        out = view_of(self.dx if t == 0 else self.result_grads[t - 1])
        _launch_tokens(
            r,
            keys=view_of(tokens),
            out=(out, out),
            own=own,
            dense=dense,
            mean_grad=rows_of(mean_grad),
            pooled_grad=rows_of(pooled_grad),
            gate=gate,
            key_grads=None if key_grads is None else rows_of(key_grads),
            weight=parts[0] if projected else None,
            SHARED=True,
            WEIGHTED=not self.paper,
            SCALED=False,
        )
        if projection is None or key_grads is None:
            return [torch.empty_like(self.x, memory_format=torch.contiguous_format)[:0, 0, 0]] * 4
        return self._weight_grads(r, tokens, key_grads, centre_grad, result_grad, projection)

    def _launch_keys(
        self,
        r: Round,
        tokens: Tensor,
        key_grads: Tensor,
        own: tuple[Any, ...],
        dense: tuple[Any, ...],
        projection: list[Tensor],
    ) -> None:
        """Writes key_grads [B, N, C]."""
        tile = r.tiles(64, self.columns)
        grid = r.batch * triton.cdiv(r.tokens, tile.tokens) * triton.cdiv(r.channels, tile.channels)
        key_gradients[(grid,)](
            view_of(tokens),
            rows_of(key_grads),
            r.labels,
            r.cosine,
            r.scale,
            own,
            dense,
            *projection[:2],
            r.tokens,
            r.channels,
            DENSE=_dense_kind(dense),
            **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER"),
        )

    def _weight_grads(
        self,
        r: Round,
        tokens: Tensor,
        key_grads: Tensor,
        centre_grad: Tensor,
        result_grad: Tensor,
        projection: list[Tensor],
    ) -> list[Tensor]:
        """Of Wk, bk, Wv, bv: sums over the batch, by the library's matrix products."""
        by_tokens = key_grads.flatten(0, 1).t() @ tokens.flatten(0, 1)
        by_centres = centre_grad.flatten(0, 1).t() @ r.matrix(r.pooled).flatten(0, 1)
        key = (
            by_tokens.to(r.compute) + by_centres,
            key_grads.sum((0, 1), dtype=r.compute) + centre_grad.sum((0, 1)),
        )
        value = (
            result_grad.flatten(0, 1).t() @ r.matrix(r.mean).flatten(0, 1),
            result_grad.sum((0, 1)),
        )
        return [grad.to(projection[0].dtype) for grad in (*key, *value)]


def icm_backward(
    grad: Tensor,
    x: Tensor,
    projections: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    labels: Tensor,
    saved: Tensor,
    grids: list[int],
    hw: list[int],
    variant: int,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """grad [B, N, C] -> gradients of x [B, N, C], of the projections, of alpha and beta [1], released [T]."""
    return _Backward(grad, x, projections, alpha, beta, labels, saved, grids, hw, variant).run()
