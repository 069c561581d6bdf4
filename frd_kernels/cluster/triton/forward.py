"""The clustering on Triton kernels: `frd_triton::cluster`, `frd_triton::icm` and `frd_triton::cluster_dispatch`.

Signatures and semantics are those of `csrc/register.cpp`; arguments are checked by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..ops import like_tokens, strided_tokens
from .kernels import Maybe, assign, inv_norms, product, spread, sums
from .layout import Image, Saved, layouts, saved_layout, views

Tensor = torch.Tensor
PAPER = 0


class Round(NamedTuple):
    """keys [B, N, C] and values [B, N, W] of an image, what the round finds, and alpha and beta [1], None where all
    weights are 1."""

    keys: Tensor
    values: Tensor
    image: Image
    labels: Tensor
    saved: Saved
    gate: tuple[Tensor, Tensor] | None


def sigmoid(value: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Of alpha * value + beta. torch.sigmoid rounds by an element's place in a vector, so by the batch."""
    return 1 / (1 + torch.exp(-(alpha * value + beta)))


def weights_of(r: Round) -> Tensor:
    """The weights of a round with a gate [B, N]."""
    assert r.gate is not None
    return sigmoid(r.saved.cosine, *r.gate)


def _run_round(r: Round, sign: Maybe, counts: Maybe = None) -> None:
    """Writes the labels, where they are not -1, and `saved`, but for `folded`; counts [B, O]."""
    keys, values, image, labels, saved, gate = r
    sums(keys, labels, None, saved.pooled, image)
    inv_norms(keys, saved.inv_norm)
    inv_norms(saved.pooled, saved.pooled_inv_norm)
    assign(keys, labels, saved, sign)
    sums(values, labels, gate and weights_of(r), saved.centres, image, saved, counts)


def cluster(
    k: Tensor, v: Tensor, mask: Maybe, alpha: Tensor, beta: Tensor, grid: list[int], hw: list[int], aggregate: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One round on keys and values [B, N, C], mask [B, N] bool: centres [B, O, C], labels [B, N], similarity [B, N],
    counts [B, O], saved [B, *]."""
    ((image, shapes),) = layouts(hw, grid, k.shape[2], 1)
    labels = (
        k.new_zeros(k.shape[:2], dtype=torch.int32)
        if mask is None
        else (mask.to(torch.int32) - 1).contiguous()
    )
    counts = labels.new_empty((len(k), grid[0] * grid[1]))
    saved = k.new_zeros((len(k), saved_layout(k.dtype, hw, grid, k.shape[2], 1)[1]), dtype=torch.float32)
    r = Round(k, v, image, labels, views(saved, shapes)[0], (alpha, beta) if aggregate == 1 else None)
    _run_round(r, alpha.sign(), counts)
    similarity = (weights_of(r) if r.gate else r.saved.cosine).masked_fill(labels < 0, 0)
    return v.new_empty((*counts.shape, k.shape[2])).copy_(r.saved.centres), labels, similarity, counts, saved


def icm(
    x: Tensor, projections: list[Tensor], alpha: Tensor, beta: Tensor, grids: list[int], hw: list[int], variant: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All rounds on tokens [B, N, C] and the dispatch: out like x, labels [B, *], saved [B, *]. projections: Wk, bk,
    Wv, bv of each round, empty where it has none."""
    label_count, saved_count = saved_layout(x.dtype, hw, grids, x.shape[2], variant)
    labels = x.new_zeros((len(x), label_count), dtype=torch.int32)
    saved = x.new_zeros((len(x), saved_count), dtype=torch.float32)  # some elements stay
    rounds, last = open_rounds(x, projections, alpha, beta, labels, saved, grids, hw, variant)
    for t, r in enumerate(rounds):
        _run_round(r, None if r.gate is None else r.gate[0].sign())
        if t == 0:
            folded = fold(projections, x)[1]
            product(r.saved.centres, folded[:-1], folded[-1], r.saved.folded)
    out = like_tokens(x)
    if variant == PAPER:
        product(sigmoid(products_of(rounds)[0], alpha, beta), last, out=out)
    else:
        weights, ends = chains(rounds)
        spread(out, ends, last, weights[0])
    return out, labels, saved


def open_rounds(
    x: Tensor, projections: list[Tensor], alpha: Tensor, beta: Tensor, labels: Tensor, saved: Tensor,
    grids: list[int], hw: list[int], variant: int,
) -> tuple[list[Round], Tensor]:  # fmt: skip
    """The rounds on views of `labels` and `saved`, and the last centres, [B, O, C]."""
    keys = values = x
    if projections[0].numel() > 0:
        keys = product(x, projections[0].mT, projections[1].contiguous())
    rounds = []
    for t, (image, shapes) in enumerate(layouts(hw, grids, x.shape[2], variant)):
        s, saved = views(saved, shapes)
        gate = None if variant == PAPER else (alpha[t : t + 1], beta[t : t + 1])
        rounds.append(Round(keys, values, image, labels[:, : keys.shape[1]], s, gate))
        labels = labels[:, keys.shape[1] :]
        # Of the next round: its keys and, behind them, what all later projections give.
        tokens = s.folded if t == 0 else s.centres
        keys, values = tokens[..., : x.shape[2]], tokens[..., x.shape[2] :]
    return rounds, tokens


def products_of(rounds: Sequence[Round]) -> list[Tensor]:
    """Of the cosines of each round with those of all later ones: [B, N_t, J]."""
    products = [rounds[-1].saved.matrix]
    for r in rounds[-2::-1]:
        products.insert(0, product(r.saved.matrix, products[0]))
    return products


def chains(rounds: Sequence[Round]) -> tuple[list[Tensor], Tensor]:
    """(by round the product of the weights from each token on, the last centres of the first round's tokens)."""
    products, end = [weights_of(rounds[-1])], rounds[-1].labels
    for r in rounds[-2::-1]:
        index = r.labels.long()
        products.insert(0, weights_of(r) * products[0].gather(1, index))
        end = end.gather(1, index)
    return products, end


def fold(projections: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Affine maps of the first round's means as matrices [C + 1, columns], the last row the bias: (the values of each
    round and the result [C columns], all of `Saved.folded` [T * C columns])."""
    chain, keys = [torch.eye(x.shape[2] + 1, x.shape[2], dtype=torch.float32, device=x.device)], []
    for i in range(0, len(projections), 4):
        key_weight, key_bias, value_weight, value_bias = projections[i : i + 4]
        before = chain[-1]
        keys.append(_compose(before, key_weight, key_bias) if i > 0 else before)
        chain.append(_compose(before, value_weight, value_bias))
    return chain, torch.cat([*keys[1:], chain[-1]], 1)


def _compose(before: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if weight.numel() == 0:
        return before
    after = product(before, weight.mT)[0]
    after[-1] += bias
    return after


def cluster_dispatch(centres: Tensor, labels: Tensor, similarity: Tensor, channels_first: bool) -> Tensor:
    """centres [B, O, C], labels [B, N], similarity [B, N] -> [B, N, C], its memory [B, C, N] if channels_first. A label
    beyond the centres, which is not followed, makes its token NaN."""
    beyond = labels >= centres.shape[1]
    labels, similarity = labels.masked_fill(beyond, 0), similarity.masked_fill(beyond, float("nan"))
    out = strided_tokens(centres, (*labels.shape, centres.shape[2]), channels_first)
    return spread(out, labels, centres, similarity)
