"""`pdc2d_depthwise` and its backward as operators: fakes, autograd to any order, autocast."""

from __future__ import annotations

from typing import Any

import torch

from .. import _autograd, _flops, _triton
from .._autocast import autocast_dtype, cast_operands
from . import weight as _weight
from .arguments import Geometry

OptionalTensor = torch.Tensor | None


def pdc2d_depthwise(
    ops: Any, x: torch.Tensor, weight: torch.Tensor, bias: OptionalTensor, geometry: Geometry
) -> torch.Tensor:
    """x [B, C, H, W], weight [C, 1, 3, 3], bias [C], checked by the caller; ops: the namespace, torch.ops.frd."""
    options = (int(geometry.kind), geometry.theta, geometry.stride, geometry.padding, geometry.dilation)
    device = x.device.type
    dtype = autocast_dtype(device)
    if dtype is not None:
        x, weight, bias = cast_operands(x, weight, bias)
        # The autocast rule that the operator is registered with, and that a compiler sees, casts to bfloat16.
        if dtype != torch.bfloat16 and _autograd.has_observers():
            with torch.autocast(device, enabled=False):
                return _autograd.call(ops.pdc2d_depthwise.default, x, weight, bias, *options)
    return _autograd.call(ops.pdc2d_depthwise.default, x, weight, bias, *options)


def empty_image(x: torch.Tensor, size: tuple[Any, ...]) -> torch.Tensor:
    """An uninitialized image in the layout of the kernels' results: channels_last if x is, else contiguous."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: OptionalTensor,
    kind: int,
    theta: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    torch._check(x.dim() == 4 and weight.dim() == 4)
    torch._check(x.dtype == weight.dtype)
    sizes = zip(x.shape[2:], stride, padding, dilation, strict=True)
    rows, columns = ((size + 2 * p - 2 * d - 1) // s + 1 for size, s, p, d in sizes)
    return empty_image(x, (x.shape[0], x.shape[1], rows, columns))


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    kind: int,
    theta: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_dx: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = empty_image(x, tuple(x.shape)) if need_dx else x.new_empty((0,))
    dw = weight.new_empty(weight.shape if need_dw else (0,))
    return dx, dw, weight.new_empty((weight.shape[0] if need_dw else 0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, *ctx.options = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    grad, x, weight, *ctx.options, ctx.need_dx, ctx.need_dw = inputs
    ctx.save_for_backward(grad, x, weight)


class _Rules:
    """The backwards of the operators of a namespace, which call operators of the same namespace."""

    def __init__(self, namespace: str) -> None:
        self.ops = getattr(torch.ops, namespace)

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[OptionalTensor, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        need_bias = need_bias and ctx.has_bias
        backward = self.ops.pdc2d_depthwise_backward.default
        dx, dw, db = _autograd.call(backward, grad, x, weight, *ctx.options, need_x, need_weight or need_bias)
        gradients = (dx if need_x else None, dw if need_weight else None, db if need_bias else None)
        return *gradients, None, None, None, None, None

    def double_backward(
        self, ctx: Any, grad_dx: torch.Tensor, grad_dw: torch.Tensor, grad_db: torch.Tensor
    ) -> tuple[OptionalTensor, ...]:
        """y = L(x, w) is bilinear, so <a, dx> = <L(a, w), grad> and <b, dw> = <L(x, b), grad>: the gradients of the
        backward are forward and backward of the same operator."""
        grad, x, weight = ctx.saved_tensors
        d_grad = d_x = d_weight = None
        if ctx.need_dx:
            d_grad = self.ops.pdc2d_depthwise(grad_dx, weight, None, *ctx.options)
            d_weight = self.ops.pdc2d_depthwise_backward(grad, grad_dx, weight, *ctx.options, False, True)[1]
        if ctx.need_dw:
            from_weight = self.ops.pdc2d_depthwise(x, grad_dw, grad_db, *ctx.options)
            d_grad = from_weight if d_grad is None else d_grad + from_weight
            d_x = self.ops.pdc2d_depthwise_backward(grad, x, grad_dw, *ctx.options, True, False)[0]
        return d_grad, d_x, d_weight, *(None for _ in range(7))


def _flop_count(x: Any, weight: Any, bias: Any, kind: int, *_: Any, out_shape: Any, **__: Any) -> int:
    return _flops.convolution(out_shape, weight, kind)


def _backward_flop_count(grad: Any, x: Any, weight: Any, kind: int, *options: Any, **_: Any) -> int:
    *_geometry, need_dx, need_dw = options
    return (need_dx + need_dw) * _flops.convolution(grad, weight, kind)


def register(namespace: str) -> None:
    """Registers fakes, autograd, autocast and FLOP formulas of the operators in `namespace`."""
    _weight.register(namespace)
    forward, backward = f"{namespace}::pdc2d_depthwise", f"{namespace}::pdc2d_depthwise_backward"
    rules = _Rules(namespace)
    torch.library.register_fake(forward, _fake)
    torch.library.register_fake(backward, _fake_backward)
    _autograd.register(forward, rules.backward, _setup)
    _autograd.register(backward, rules.double_backward, _setup_backward)
    _flops.register(
        namespace, {"pdc2d_depthwise": _flop_count, "pdc2d_depthwise_backward": _backward_flop_count}
    )
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(forward, device, torch.bfloat16)


register("frd")
register(_triton.NAMESPACE)
