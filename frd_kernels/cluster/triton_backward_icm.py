"""The backward of the ICM's rounds and of its dispatch, from the last round to the first."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .._triton_ops import on_device
from .ops import like_tokens
from .triton_backward_dense import chain_gradients, dense_sums, query_gradients
from .triton_backward_launch import (
    WALKED,
    Round,
    Tensor,
    Vector,
    View,
    chunks_of,
    dense_kind,
    gate_places,
    launch_pulls,
    launch_tokens,
    rows_of,
    sum_by_label,
    sum_gates,
    vector_of,
    view_of,
)
from .triton_backward_own import chain_scalars, chains
from .triton_backward_round import dense_centres, key_gradients, means
from .triton_tiles import round_layouts


class IcmBackward:
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
        self.grad, self.x = grad, x
        self.alpha, self.beta = alpha.contiguous(), beta.contiguous()  # one number may stand for all rounds
        self.paper = variant == 0
        self.layouts, _, _ = round_layouts(hw, grids, x.shape[2], variant)
        self.saved, self.labels = saved.contiguous(), labels.contiguous()
        self.count, self.columns = len(self.layouts), self.layouts[-1].centres
        self.maps = [self._map(projections[4 * t : 4 * t + 4]) for t in range(self.count)]
        self.rounds: list[Round] = []
        for layout in self.layouts:
            tokens = self.rounds[-1].matrix(self.rounds[-1].result) if self.rounds else x
            self.rounds.append(Round(layout, self.saved, self.labels, tokens))
        self.dx = like_tokens(x)
        self.result_grads = [r.rows() for r in self.rounds]
        self.unit_grads = [r.rows() for r in self.rounds]
        self.projections = projections

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
            grads = [p.new_zeros(p.shape) for p in self.projections]
            return self.dx, grads, torch.zeros_like(self.alpha), torch.zeros_like(self.beta)
        with on_device(self.x):
            gates = self._dense_dispatch() if self.paper else self._chain_dispatch()
            grads = []
            for t in reversed(range(self.count)):
                grads = self._round(t) + grads
        return self.dx, grads, *sum_gates(gates)

    # ---- dispatch ----

    def _dense_dispatch(self) -> Tensor:
        """The gradients of the last centres, of all unit keys and of all products; gates [1, B, places, 2]."""
        r, columns = self.rounds[0], self.columns
        tile = r.tiles(128, columns).at_most(tokens=32)
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
            **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER", stages=1),
        )
        self.product_grads = [
            self.rounds[t].empty(self.rounds[t].tokens, columns) for t in range(1, self.count)
        ]
        for t in range(self.count):
            self._query(t, partial, pulls, chunks)
        return gates[None]

    def _query(self, t: int, partial: Tensor, pulls: Tensor, chunks: int) -> None:
        """The gradients of a round's query and unit keys, and of the next round's product."""
        r, columns = self.rounds[t], self.columns
        last = t == self.count - 1
        query_grad = self.unit_grads[t] if last else r.empty(columns, r.channels)
        sums, product_grad = r.empty(columns, r.channels), self.product_grads[t - 1] if t else pulls
        tile = r.tiles(128, columns)
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
            **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER", stages=1),
        )
        if last:
            return
        tile = r.tiles(64, columns).at_most(centres=WALKED)
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
        places = max(gate_places(q) for q in self.rounds)
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
        tile = r.tiles().at_most(centres=WALKED)
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
                **tile.options("CENTRES", "CHANNELS", "INNER", stages=1),
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
                **tile.options("CENTRES", "CHANNELS", "INNER", stages=1),
            )
            similarity_grad = vector_of(self.similarity_grads[t])
            pull = launch_pulls(r, tokens, similarity_grad, rows_of(mean_grad), *gate, self.gates[t], False)
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
        launch_tokens(
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
            return [p.new_empty(p.shape) for p in self.projections[4 * t : 4 * t + 4]]
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
        tile, kind = r.tiles(64, self.columns), dense_kind(dense)
        crowded = (
            kind == 1 and r.dtype != torch.bfloat16
        )  # its products are of float32, and need more registers
        if crowded:
            tile = tile.at_most(tokens=32)
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
            DENSE=kind,
            **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER", stages=1 if crowded else 2),
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
