"""Gradients of the clustering on Triton kernels: `frd_triton::cluster_backward` and `frd_triton::icm_backward`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops import like_tokens
from .forward import PAPER, Round, chains, fold, open_rounds, products_of, sigmoid, weights_of
from .kernels import dots, product, spread, sum_of_products, sums, unit_grads
from .layout import layouts, views

Tensor = torch.Tensor


def _float(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty((like.shape[0], *shape), dtype=torch.float32)


def _cosine_grads(r: Round, grad_weights: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token's own cosine [B, N] and of alpha and beta [2], from those of its weight by other ways than its
    centre and of the centres, as in `_value_grads`."""
    assert r.gate is not None
    weights = weights_of(r)
    grad_weights = grad_weights + dots(r.values, scaled, r.labels, r.saved.centres)
    slope = torch.where(r.labels < 0, 0, grad_weights * weights * (1 - weights))
    return r.gate[0] * slope, torch.stack([(slope * r.saved.cosine).sum(), slope.sum()])


def _own_key_grads(r: Round, grad_cosine: Tensor, out: Tensor) -> Tensor:
    """Of the keys, `out`, from those [B, N] of each token's own cosine."""
    s = r.saved
    units = s.pooled * s.pooled_inv_norm.unsqueeze(2)
    grads = spread(_float(out, *out.shape[1:]), r.labels, units, grad_cosine)
    grad_pooled = sums(r.keys, r.labels, grad_cosine * s.inv_norm, torch.empty_like(units))
    return _key_grads(r, unit_grads(r.keys, s.inv_norm, grads, grad_cosine * s.cosine), grad_pooled, out)


def _dense_key_grads(r: Round, left: Tensor, right: Tensor | None, out: Tensor) -> Tensor:
    """Of the keys, `out`, from that of all cosines: left [B, N, J] right^T [B, J, O], where None is the unit matrix."""
    s = r.saved
    units = s.pooled * s.pooled_inv_norm.unsqueeze(2)
    grads = product(left, units if right is None else product(right.mT, units))
    grad_pooled = product((left * s.inv_norm.unsqueeze(2)).mT, r.keys)
    grad_pooled = grad_pooled if right is None else product(right, grad_pooled)
    return _key_grads(r, unit_grads(r.keys, s.inv_norm, grads), grad_pooled, out)


def _key_grads(r: Round, own: Tensor, grad_pooled: Tensor, out: Tensor) -> Tensor:
    """own + those of the keys by way of the bin means, of which, normalised, those are grad_pooled [B, O, C]: `out`."""
    s = r.saved
    binned = unit_grads(s.pooled, s.pooled_inv_norm, grad_pooled) * s.inv_bin_count.unsqueeze(2)
    return spread(out, r.labels, binned=binned, image=r.image, base=own)


def _value_grads(r: Round, scaled: Tensor, out: Tensor, base: Tensor | None = None) -> Tensor:
    """base + those of the values [B, N, W]: `out`. scaled: of the centres, over their sums of weights."""
    binned = scaled * r.saved.inv_bin_count.unsqueeze(2)
    return spread(out, r.labels, scaled, r.gate and weights_of(r), binned, r.image, base)


def cluster_backward(
    grad_centres: Tensor, grad_similarity: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor,
    labels: Tensor, saved: Tensor, grid: list[int], hw: list[int], aggregate: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of k, v [B, N, C], alpha and beta, from those of the centres [B, O, C] and the similarity [B, N]."""
    ((image, shapes),) = layouts(hw, grid, k.shape[2], 1)
    r = Round(k, v, image, labels, views(saved, shapes)[0], (alpha, beta) if aggregate == 1 else None)
    scaled = grad_centres / r.saved.weight_sum.unsqueeze(2)
    grad_cosine, gates = torch.where(labels < 0, 0, grad_similarity), alpha.new_zeros(2)
    if r.gate:
        grad_cosine, gates = _cosine_grads(r, grad_similarity, scaled)
    grad_k = _own_key_grads(r, grad_cosine, like_tokens(k))
    return grad_k, _value_grads(r, scaled, like_tokens(v)), gates[:1].clone(), gates[1:].clone()


def icm_backward(
    grad: Tensor, x: Tensor, projections: list[Tensor], alpha: Tensor, beta: Tensor, labels: Tensor,
    saved: Tensor, grids: list[int], hw: list[int], variant: int,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Gradients of x [B, N, C], of the projections, of alpha and beta, from that of the output [B, N, C]."""
    rounds, last = open_rounds(x, projections, alpha, beta, labels, saved, grids, hw, variant)
    chain, folded = fold(projections, x)
    gates = alpha.new_zeros((2, len(alpha)))
    if variant == PAPER:
        grad_tokens, left, right, gates[:, 0] = _dense_grads(grad, rounds, last, alpha, beta)
    else:
        grad_tokens, grad_weights = _chain_grads(grad, rounds, last)
    for t, r in reversed(list(enumerate(rounds))):
        if t == 0:
            # Back through the one product of all later projections.
            bias = grad_tokens.sum((0, 1)).unsqueeze(0)
            grad_folded = torch.cat([sum_of_products(r.saved.centres.mT, grad_tokens), bias])
            grad_tokens = product(grad_tokens, folded[:-1].mT)
        scaled = grad_tokens / r.saved.weight_sum.unsqueeze(2)
        grad_keys = _float(x, *r.keys.shape[1:])
        if variant == PAPER:
            _dense_key_grads(r, left[t], right[t], grad_keys)
        else:
            grad_cosine, gates[:, t] = _cosine_grads(r, grad_weights[t], scaled)
            _own_key_grads(r, grad_cosine, grad_keys)
        if t > 0:
            grad_values = _value_grads(r, scaled, _float(x, *r.values.shape[1:]))
            grad_tokens = torch.cat([grad_keys, grad_values], 2)
    grads, base = _fold_grads(projections, chain, grad_folded), grad_keys
    if projections[0].numel() > 0:
        grads[:2] = sum_of_products(grad_keys.mT, x), grad_keys.sum((0, 1))
        base = product(grad_keys, projections[0])
    grads = [p.new_empty(p.shape).copy_(g) for p, g in zip(projections, grads, strict=True)]
    return _value_grads(rounds[0], scaled, like_tokens(x), base), grads, gates[0].clone(), gates[1].clone()


def _dense_grads(
    grad: Tensor, rounds: Sequence[Round], last: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor | None], Tensor]:
    """Of out = sigmoid(alpha M_1 ... M_T + beta) R: that of R; by round, left [B, N_t, J] and right [B, O_t, J] (None:
    1) of the gradient left right^T of M_t; those of alpha and beta [2]."""
    products = products_of(rounds)
    weights = sigmoid(products[0], alpha, beta)
    slope = product(grad, last.mT) * weights * (1 - weights)
    left = [alpha * slope]
    for r in rounds[:-1]:
        left.append(product(r.saved.matrix.mT, left[-1]))
    gates = torch.stack([(slope * products[0]).sum(), slope.sum()])
    return product(weights.mT, grad), left, [*products[1:], None], gates


def _chain_grads(grad: Tensor, rounds: Sequence[Round], last: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Of out_n = (product of the weights along n's chain of centres) R_(its end): that of R, those of each round's
    weights [B, N_t]."""
    weights, ends = chains(rounds)
    grad_last = sums(grad, ends, weights[0], _float(grad, *last.shape[1:]))
    reach, grads = dots(grad, last, ends), []
    for r, later in zip(rounds, weights[1:], strict=False):
        grads.append(reach * later.gather(1, r.labels.long()))
        reach = sums(reach.unsqueeze(2), r.labels, weights_of(r), _float(grad, later.shape[1], 1)).squeeze(2)
    return grad_last, [*grads, reach]


def _fold_grads(projections: list[Tensor], chain: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Of the projections, but for the first keys', from the gradient [C + 1, T * C] of `fold`'s second result."""
    grads = [p.new_zeros(p.shape) for p in projections]
    *keys, after = grad.chunk(len(chain) - 1, 1)
    for t, before in reversed(list(enumerate(chain[:-1]))):
        parts = [(4 * t + 2, after)] if t == 0 else [(4 * t, keys[t - 1]), (4 * t + 2, after)]
        after = torch.zeros_like(before)
        for i, part in parts:
            if projections[i].numel() > 0:
                grads[i : i + 2] = product(part.mT, before)[0], part[-1]
                part = product(part, projections[i])[0]
            after += part
    return grads


def cluster_dispatch_backward(
    grad: Tensor, centres: Tensor, labels: Tensor, similarity: Tensor
) -> tuple[Tensor, Tensor]:
    """grad [B, N, C] -> gradients of the centres [B, O, C] and of the similarity [B, N]."""
    grad_centres = sums(grad, labels, similarity, centres.new_empty(centres.shape))
    return grad_centres, dots(grad, centres, labels.masked_fill(labels >= centres.shape[1], -1))
