"""The weight transform as an operator: a 3x3 parameter -> the plain kernel that equals the difference form.

`frd::pdc_weight` is linear, so `frd::pdc_weight_backward`, its transpose, differentiates into it again, to
any order.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import _library  # noqa: F401  registers the schemas
from ..kinds import Kind

_ops = torch.ops.frd


def _side(kind: int) -> int:
    return 5 if kind == Kind.RADIAL else 3


@torch.library.register_fake("frd::pdc_weight")
def _(weight: torch.Tensor, kind: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    torch._check(weight.dim() == 4)
    return weight.new_empty((weight.size(0), weight.size(1), _side(kind), _side(kind)), dtype=dtype)


@torch.library.register_fake("frd::pdc_weight_backward")
def _(grad: torch.Tensor, kind: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    torch._check(grad.dim() == 4)
    return grad.new_empty((grad.size(0), grad.size(1), 3, 3), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    source, ctx.kind, ctx.theta, _dtype = inputs
    ctx.source_dtype = source.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _ops.pdc_weight_backward(grad, ctx.kind, ctx.theta, ctx.source_dtype), None, None, None


def _double_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _ops.pdc_weight(grad, ctx.kind, ctx.theta, ctx.source_dtype), None, None, None


torch.library.register_autograd("frd::pdc_weight", _backward, setup_context=_setup)
torch.library.register_autograd("frd::pdc_weight_backward", _double_backward, setup_context=_setup)
