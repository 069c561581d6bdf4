"""Formulas for `torch.utils.flop_counter.FlopCounterMode`: an operator counts what the plain operations count that it
replaces, two for each multiply-accumulate of a convolution, a linear layer or a matrix product.

A difference convolution is the plain convolution by `pdc_weight`: 9 products, radial 25. A round of clustering is the
product of unit keys and unit centres. Pooling, sums over clusters, the dispatch to a token's own centre and the weight
transform are no products and count nothing. A backward pass counts twice the forward pass, once for each factor of
every product. (For the weights of a grouped convolution torch itself counts as if there were one group.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .pdc.kinds import plain_side

Shape = Sequence[int]


def register(namespace: str, formulas: dict[str, Callable[..., int]]) -> None:
    """The formulas of operators of a namespace, by name; they take shapes in place of tensors."""
    for name, formula in formulas.items():
        register_flop_formula(getattr(getattr(torch.ops, namespace), name))(formula)


def nothing(*_args: Any, **_kwargs: Any) -> int:
    """Of what holds no product."""
    return 0


def convolution(out: Shape, weight: Shape, kind: int | None = None) -> int:
    """Of weight [O, I, h, w], or the plain kernel for a 3x3 of this kind, at every position of out [B, O, H, W]."""
    taps = math.prod(weight[2:]) if kind is None else plain_side(kind) ** 2
    return 2 * math.prod(out) * weight[1] * taps


def clustering(keys: Shape, centres: int) -> int:
    """Of the cosines of keys [B, N, C] with so many centres."""
    return 2 * math.prod(keys) * centres


def icm(x: Shape, projections: Sequence[Shape], grids: Shape, variant: int) -> int:
    """Of all rounds on tokens x [B, N, C], and for variant 0 of sigmoid(alpha * (M1 M2 ... MT) + beta) RT."""
    batch, count, channels = x
    total, tokens, product = 0, count, None
    for t, (rows, columns) in enumerate(zip(grids[::2], grids[1::2], strict=True)):
        linear = sum(2 * batch * tokens * math.prod(w) for w in projections[4 * t : 4 * t + 4 : 2])
        total += linear + clustering((batch, tokens, channels), rows * columns)
        if variant == 0 and product is not None:
            total += 2 * batch * count * product * rows * columns
        tokens = product = rows * columns
    return total + (2 * batch * count * tokens * channels if variant == 0 else 0)
