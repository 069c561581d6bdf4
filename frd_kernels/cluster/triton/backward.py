"""Gradients of the clustering and of the ICM on Triton kernels: `frd_triton::cluster_backward`, `icm_backward`.

A round's backward: gradients of its means, of the own cosines or of the product of the cosines, of its pooled keys,
then of its tokens. Sums over tokens are split by the shapes alone and added in a fixed order; of products of tokens
and centres only those of variant paper's later rounds with the last centres are stored, as in the forward pass.
"""

from __future__ import annotations

import torch

from ..._triton_ops import on_device
from ..ops import like_tokens
from ..saved import round_layouts
from .backward_dense import launch_chain_gradients, launch_dense_sums, launch_query_gradients
from .backward_labels import (
    gate_tile_count,
    launch_chains,
    launch_cosine_gradients,
    sum_by_label,
    sum_gate_grads,
)
from .backward_operands import CentreKeys, FirstProduct, LaterProduct, OwnCosine, Round
from .backward_round import (
    Source,
    launch_dense_centres,
    launch_key_gradients,
    launch_means,
    launch_token_gradients,
)
from .tiles import Gate, Vector, rows_of, vector_of, view_of

Tensor = torch.Tensor


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
    grad_k, grad_v = like_tokens(k), like_tokens(v)
    if not k.shape[0]:
        return grad_k, grad_v, torch.zeros_like(alpha), torch.zeros_like(beta)
    layouts, _, _ = round_layouts(hw, grid, k.shape[2], 1)
    r = Round(layouts[0], saved.contiguous(), labels.contiguous(), k)
    dcos: Vector = vector_of(grad_similarity.to(r.compute).contiguous())
    scale: Vector | None = r.vector(r.layout.inv_norm)
    weighted, gate, mean_grad = aggregate == 1, Gate(alpha, beta), view_of(grad_centres)
    with on_device(k):
        if weighted:
            gate_grads = r.empty(gate_tile_count(r), 2)
            dcos = launch_cosine_gradients(r, v, dcos, mean_grad, gate, gate_grads, True)
            scale = None
        unit = r.rows(r.layout.unit)
        unit_grad, pooled_grad = rows_of(r.empty_rows()), rows_of(r.empty_rows())
        unit_inv_norm = r.vector(r.layout.unit_inv_norm)
        # Without a projection neither mean_grad nor centre_grad is read, nor weight and bias.
        centre_keys = CentreKeys(
            unit, unit_inv_norm, unit_grad, unit_grad, unit_grad, pooled_grad, alpha, alpha
        )
        sizes = r.batch, r.tokens, r.centres, r.channels
        sum_by_label(view_of(k), r.labels, dcos, scale, unit_grad, sizes, centre_keys)
        launch_token_gradients(
            r,
            keys=view_of(k),
            out=(view_of(grad_k), view_of(grad_v)),
            source=OwnCosine(dcos, unit),
            mean_grad=mean_grad,
            pooled_grad=pooled_grad,
            gate=gate,
            SHARED=False,
            WEIGHTED=weighted,
            SCALED=not weighted,
        )
    if not weighted:
        return grad_k, grad_v, torch.zeros_like(alpha), torch.zeros_like(beta)
    return grad_k, grad_v, *sum_gate_grads(gate_grads[None])


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
    return _IcmBackward(grad, x, projections, alpha, beta, labels, saved, grids, hw, variant).run()


class _IcmBackward:
    """The backward of `icm`: of the dispatch, then of the rounds from the last to the first."""

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
        self.gate = Gate(alpha.contiguous(), beta.contiguous())  # one number may stand for all rounds
        self.paper = variant == 0
        layouts, _, _ = round_layouts(hw, grids, x.shape[2], variant)
        saved, labels = saved.contiguous(), labels.contiguous()
        self.count, self.columns = len(layouts), layouts[-1].centres
        self.maps = [self._map(projections[4 * t : 4 * t + 4]) for t in range(self.count)]
        self.rounds: list[Round] = []
        self.tokens: list[Tensor] = []  # [B, N, C] of each round
        for layout in layouts:
            self.tokens.append(self.rounds[-1].matrix(self.rounds[-1].layout.result) if self.rounds else x)
            self.rounds.append(Round(layout, saved, labels, self.tokens[-1]))
        self.dx = like_tokens(x)
        self.result_grads = [r.empty_rows() for r in self.rounds]
        self.unit_grads = [r.empty_rows() for r in self.rounds]
        self.projections = projections

    @staticmethod
    def _map(parts: list[Tensor]) -> list[Tensor] | None:
        return [part.contiguous() for part in parts] if parts[0].numel() else None

    def run(self) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        if not self.x.shape[0]:
            grads = [p.new_zeros(p.shape) for p in self.projections]
            return self.dx, grads, torch.zeros_like(self.gate.alpha), torch.zeros_like(self.gate.beta)
        with on_device(self.x):
            gate_grads = self._dense_dispatch() if self.paper else self._chain_dispatch()
            grads = []
            for t in reversed(range(self.count)):
                grads = self._round(t) + grads
        return self.dx, grads, *sum_gate_grads(gate_grads)

    def _dense_dispatch(self) -> Tensor:
        """The gradients of the last centres, of all unit keys and of all products; gate_grads [1, B, *, 2]."""
        first = self._product(0)
        assert isinstance(first, FirstProduct)
        partial, sum_dcos, gate_grads = launch_dense_sums(self.rounds[0], self.x, first)
        self.product_grads = [r.empty(r.tokens, self.columns) for r in self.rounds[1:]]
        for t, r in enumerate(self.rounds):
            last = t == self.count - 1
            query_grad = self.unit_grads[t] if last else r.empty(self.columns, r.channels)
            launch_query_gradients(
                r,
                self.tokens[t],
                partial,
                sum_dcos,
                self.product_grads[t - 1] if t else None,
                self.result_grads[-1],
                query_grad,
                self.maps[t],
            )
            if not last:
                following = self.rounds[t + 1]
                product = following.vector(following.layout.product)
                launch_chain_gradients(r, product, query_grad, self.unit_grads[t], self.product_grads[t])
        return gate_grads[None]

    def _product(self, t: int) -> FirstProduct | LaterProduct:
        """What the gradient of the keys of round t comes from, variant paper."""
        r, last = self.rounds[t], self.rounds[-1]
        query = r.rows(r.layout.query)
        if t > 0:
            product = r.vector(r.layout.product)
            return LaterProduct(query, product, vector_of(self.product_grads[t - 1]), self.columns)
        return FirstProduct(
            view_of(self.grad),
            r.rows(r.layout.projected),
            last.rows(last.layout.result),
            query,
            r.vector(r.layout.offset),
            *self.gate,
            self.columns,
        )

    def _chain_dispatch(self) -> Tensor:
        """The gradients of the last centres and of the own similarities of all rounds; gate_grads [T, B, *, 2]."""
        last_grad = rows_of(self.result_grads[-1])
        self.similarity_grads = launch_chains(self.rounds, self.grad, self.gate, last_grad)
        tiles = max(gate_tile_count(r) for r in self.rounds)
        first = self.rounds[0]
        self.gate_grads = first.storage.new_zeros((self.count, first.batch, tiles, 2))
        return self.gate_grads

    def _round(self, t: int) -> list[Tensor]:
        """Gradients of the tokens of round t, which are the centres of the one before; returns those of its
        projections."""
        r, projection = self.rounds[t], self.maps[t]
        tokens, result_grad = self.tokens[t], self.result_grads[t]
        mean_grad, centre_grad, pooled_grad = r.empty_rows(), r.empty_rows(), r.empty_rows()
        gate = self.gate if self.paper else Gate(self.gate.alpha[t:], self.gate.beta[t:])
        weight, bias, value_weight, _ = projection or (None, None, None, None)
        centre_keys = CentreKeys(
            r.rows(r.layout.unit),
            r.vector(r.layout.unit_inv_norm),
            rows_of(mean_grad),
            rows_of(self.unit_grads[t]),
            rows_of(centre_grad),
            rows_of(pooled_grad),
            gate.alpha if weight is None else weight,
            gate.alpha if bias is None else bias,
        )
        if self.paper:
            launch_dense_centres(r, result_grad, centre_keys, value_weight)
            source: Source = self._product(t)
        else:
            launch_means(r, result_grad, rows_of(mean_grad), value_weight)
            source = self._own_cosine(t, gate, centre_keys)
        key_grads = None
        if projection is not None:
            key_grads = launch_key_gradients(r, tokens, source, projection, self.columns)
        out = view_of(self.dx if t == 0 else self.result_grads[t - 1])
        launch_token_gradients(
            r,
            keys=view_of(tokens),
            out=(out, out),
            source=source,
            mean_grad=rows_of(mean_grad),
            pooled_grad=rows_of(pooled_grad),
            gate=gate,
            key_grads=None if key_grads is None else rows_of(key_grads),
            weight=weight,
            SHARED=True,
            WEIGHTED=not self.paper,
            SCALED=False,
        )
        if projection is None or key_grads is None:
            return [p.new_empty(p.shape) for p in self.projections[4 * t : 4 * t + 4]]
        return _weight_grads(r, tokens, key_grads, centre_grad, result_grad, projection)

    def _own_cosine(self, t: int, gate: Gate, centre_keys: CentreKeys) -> OwnCosine:
        """Writes what `centre_keys` names; what the gradient of the keys of round t comes from, variant released."""
        r, tokens, projected = self.rounds[t], self.tokens[t], self.maps[t] is not None
        similarity_grad = vector_of(self.similarity_grads[t])
        dcos = launch_cosine_gradients(
            r, tokens, similarity_grad, centre_keys.mean_grad, gate, self.gate_grads[t], False
        )
        target = centre_keys.centre_grad if projected else centre_keys.unit_grad
        sizes = r.batch, r.tokens, r.centres, r.channels
        sum_by_label(view_of(tokens), r.labels, dcos, None, target, sizes, centre_keys, True, projected)
        return OwnCosine(dcos, centre_keys.unit)


def _weight_grads(
    r: Round,
    tokens: Tensor,
    key_grads: Tensor,
    centre_grad: Tensor,
    result_grad: Tensor,
    projection: list[Tensor],
) -> list[Tensor]:
    """Of Wk, bk, Wv, bv: sums over the batch, by the library's matrix products."""
    by_tokens = key_grads.flatten(0, 1).t() @ tokens.flatten(0, 1)
    by_centres = centre_grad.flatten(0, 1).t() @ r.matrix(r.layout.pooled).flatten(0, 1)
    key_weight = by_tokens.to(r.compute) + by_centres
    key_bias = key_grads.sum((0, 1), dtype=r.compute) + centre_grad.sum((0, 1))
    value_weight = result_grad.flatten(0, 1).t() @ r.matrix(r.layout.mean).flatten(0, 1)
    value_bias = result_grad.sum((0, 1))
    return [grad.to(projection[0].dtype) for grad in (key_weight, key_bias, value_weight, value_bias)]
