"""Gradients of the clustering and of the ICM on Triton kernels: `frd_triton::cluster_backward`, `icm_backward`.

A round's backward: gradients of its means, of the own cosines or of the product of the cosines, of its pooled keys,
then of its tokens. Sums over tokens are split by the shapes alone and added in a fixed order; of products of tokens
and centres only those of variant paper's later rounds with the last centres are stored, as in the forward pass.
"""

from __future__ import annotations

import torch

from .._triton_ops import on_device
from .ops import like_tokens
from .triton_backward_icm import IcmBackward
from .triton_backward_launch import (
    Round,
    Tensor,
    Vector,
    gate_places,
    launch_pulls,
    launch_tokens,
    rows_of,
    sum_by_label,
    sum_gates,
    vector_of,
    view_of,
)
from .triton_tiles import round_layouts


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
    pull: Vector = vector_of(grad_similarity.to(r.compute).contiguous())
    scale: Vector | None = r.scale
    weighted = aggregate == 1
    with on_device(k):
        if weighted:
            gates = r.empty(gate_places(r), 2)
            pull, scale = launch_pulls(r, v, pull, view_of(grad_centres), alpha, beta, gates, True), None
        unit_grad, pooled_grad = rows_of(r.rows()), rows_of(r.rows())
        sizes = r.batch, r.tokens, r.centres, r.channels
        sources = (r.unit, r.unit_scale, unit_grad, unit_grad, unit_grad, pooled_grad, alpha, alpha)
        sum_by_label(view_of(k), r.labels, pull, scale, unit_grad, sizes, sources)
        launch_tokens(
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
    return grad_k, grad_v, *sum_gates(gates[None])


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
    return IcmBackward(grad, x, projections, alpha, beta, labels, saved, grids, hw, variant).run()
