"""The operator `pdc_weight`: a 3x3 parameter -> the plain kernel of the equivalent convolution.

It is linear, and `pdc_weight_backward` is its transpose: each is the backward of the other, to any order.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import _autograd, _flops
from .kinds import plain_size


def _fake(weight: torch.Tensor, kind: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    torch._check(weight.dim() == 4)
    size = plain_size(kind)
    return weight.new_empty((weight.size(0), weight.size(1), size, size), dtype=dtype)


def _fake_backward(grad: torch.Tensor, kind: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    torch._check(grad.dim() == 4)
    return grad.new_empty((grad.size(0), grad.size(1), 3, 3), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    source, ctx.kind, ctx.theta, _dtype = inputs
    ctx.source_dtype = source.dtype


class _Rules:
    """The backwards of both operators of a namespace: each is the other's transpose."""

    def __init__(self, namespace: str) -> None:
        self.ops = getattr(torch.ops, namespace)

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        options = ctx.kind, ctx.theta, ctx.source_dtype
        return _autograd.call(self.ops.pdc_weight_backward.default, grad, *options), None, None, None

    def double_backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        options = ctx.kind, ctx.theta, ctx.source_dtype
        return _autograd.call(self.ops.pdc_weight.default, grad, *options), None, None, None


def register(namespace: str) -> None:
    """Registers fakes, autograd and FLOP formulas of the weight transform in `namespace`."""
    forward, transposed = f"{namespace}::pdc_weight", f"{namespace}::pdc_weight_backward"
    rules = _Rules(namespace)
    torch.library.register_fake(forward, _fake)
    torch.library.register_fake(transposed, _fake_backward)
    _autograd.register(forward, rules.backward, _setup)
    _autograd.register(transposed, rules.double_backward, _setup)
    _flops.register(namespace, {"pdc_weight": _flops.nothing, "pdc_weight_backward": _flops.nothing})
