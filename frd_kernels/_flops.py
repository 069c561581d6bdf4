"""FLOP formulas for `torch.utils.flop_counter.FlopCounterMode`.

An operator counts what the convolutions, linear layers and matrix products that it replaces would count: two for each
multiply-accumulate. A difference convolution counts as the plain convolution by `pdc_weight`, with 9 taps, or 25 for
radial. A round of clustering counts the product of the normalized keys and centres. Pooling, sums over clusters, the
dispatch to the assigned centres and the weight transform count as 0, as elementwise operations do in torch. A backward
pass counts twice the forward pass, once for each factor of every product. (For the weight gradient of a grouped
convolution torch itself counts as if there were one group.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .pdc.kinds import plain_size

Shape = Sequence[int]


def register(namespace: str, formulas: dict[str, Callable[..., int]]) -> None:
    """Registers formulas by operator name. They take shapes in place of tensors."""
    for name, formula in formulas.items():
        register_flop_formula(getattr(getattr(torch.ops, namespace), name))(formula)


def nothing(*_args: Any, **_kwargs: Any) -> int:
    """The formula of operators without products."""
    return 0


def convolution(out: Shape, weight: Shape, kind: int | None = None) -> int:
    """A convolution with weight [O, I, h, w], or with the plain kernel of a 3x3 weight of this kind, and result
    out [B, O, H, W]."""
    taps = math.prod(weight[2:]) if kind is None else plain_size(kind) ** 2
    return 2 * math.prod(out) * weight[1] * taps


def clustering(keys: Shape, centres: int) -> int:
    """The cosines of keys [B, N, C] with this many centres."""
    return 2 * math.prod(keys) * centres


def icm(x: Shape, projections: Sequence[Shape], grids: Shape, variant: int) -> int:
    """All rounds on tokens x [B, N, C], and for variant 0 ("paper") the products of
    sigmoid(alpha * (M1 M2 ... MT) + beta) RT."""
    batch, count, channels = x
    total, tokens, product = 0, count, None
    for t, (rows, columns) in enumerate(zip(grids[::2], grids[1::2], strict=True)):
        linear = sum(2 * batch * tokens * math.prod(w) for w in projections[4 * t : 4 * t + 4 : 2])
        total += linear + clustering((batch, tokens, channels), rows * columns)
        if variant == 0 and product is not None:
            total += 2 * batch * count * product * rows * columns
        tokens = product = rows * columns
    return total + (2 * batch * count * tokens * channels if variant == 0 else 0)
