"""`pdc_block` and its backward as operators: fakes, autograd to any order, autocast.

The backward operators take what the forward took, and compute the hidden values again. Keeping them would take a second
output of the forward: whether a gradient will be wanted is not known when a graph is recorded for `torch.export`, and
the second derivative would have to go through that output too. Computing them again is one launch of the stencil, of
five or six of the backward pass on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import _autograd, _flops, _library, _triton
from .._autocast import autocast_dtype, cast_operands
from ..pdc.arguments import Geometry

# Importing it also registers the autograd of the operators that the double backward uses.
from ..pdc.ops import empty_image

OptionalTensor = torch.Tensor | None


def pdc_block(
    ops: Any,
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    pdc_bias: OptionalTensor,
    point_weight: torch.Tensor,
    point_bias: OptionalTensor,
    residual: OptionalTensor,
    geometry: Geometry,
) -> torch.Tensor:
    """x [B, C, H, W], pdc_weight [C, 1, 3, 3], point_weight [Co, C, 1, 1], checked by the caller; ops: the namespace,
    torch.ops.frd."""
    options = (int(geometry.kind), geometry.theta, geometry.stride, geometry.dilation)
    tensors = (x, pdc_weight, pdc_bias, point_weight, point_bias, residual)
    device = x.device.type
    dtype = autocast_dtype(device)
    if dtype is not None:
        tensors = cast_operands(*tensors)
        # The autocast rule that the operator is registered with, and that a compiler sees, casts to bfloat16.
        if dtype != torch.bfloat16 and _autograd.has_observers():
            with torch.autocast(device, enabled=False):
                return _autograd.call(ops.pdc_block.default, *tensors, *options)
    return _autograd.call(ops.pdc_block.default, *tensors, *options)


def _fake(
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    pdc_bias: OptionalTensor,
    point_weight: torch.Tensor,
    point_bias: OptionalTensor,
    residual: OptionalTensor,
    kind: int,
    theta: float,
    stride: list[int],
    dilation: list[int],
) -> torch.Tensor:
    torch._check(x.dim() == 4 and pdc_weight.dim() == 4 and point_weight.dim() == 4)
    torch._check(x.dtype == pdc_weight.dtype and x.dtype == point_weight.dtype)
    rows, columns = ((size - 1) // s + 1 for size, s in zip(x.shape[2:], stride, strict=True))
    return empty_image(x, (x.shape[0], point_weight.shape[0], rows, columns))


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    pdc_bias: OptionalTensor,
    point_weight: torch.Tensor,
    kind: int,
    theta: float,
    stride: list[int],
    dilation: list[int],
    need_point_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        empty_image(x, tuple(x.shape)),
        pdc_weight.new_empty(pdc_weight.shape),
        pdc_weight.new_empty((pdc_weight.shape[0],)),
        point_weight.new_empty(point_weight.shape),
        point_weight.new_empty((point_weight.shape[0] if need_point_bias else 0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, pdc_weight, pdc_bias, point_weight, point_bias, residual, *ctx.options = inputs
    ctx.has = (pdc_bias is not None, point_bias is not None, residual is not None)
    ctx.save_for_backward(x, pdc_weight, pdc_bias, point_weight)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, kind, theta, stride, dilation, ctx.need_point_bias = inputs
    # stride, padding and dilation of the difference convolution: padding = dilation.
    ctx.options = (kind, theta, stride, dilation, dilation)
    ctx.has_bias = tensors[3] is not None
    ctx.save_for_backward(*tensors)


class _Rules:
    """The backwards of the operators of a namespace, which call operators of the same namespace, and those of the
    difference convolution in the namespace `pdc`."""

    def __init__(self, namespace: str, pdc: str) -> None:
        self.ops = getattr(torch.ops, namespace)
        self.pdc = getattr(torch.ops, pdc)

    def backward(self, ctx: Any, grad: torch.Tensor) -> tuple[OptionalTensor, ...]:
        x, pdc_weight, pdc_bias, point_weight = ctx.saved_tensors
        has_pdc_bias, has_point_bias, has_residual = ctx.has
        tensors = (grad, x, pdc_weight, pdc_bias, point_weight)
        dx, d_pdc, d_pdc_bias, d_point, d_point_bias = _autograd.call(
            self.ops.pdc_block_backward.default, *tensors, *ctx.options, has_point_bias
        )
        return (
            dx,
            d_pdc,
            d_pdc_bias if has_pdc_bias else None,
            d_point,
            d_point_bias if has_point_bias else None,
            grad if has_residual else None,
            *(None for _ in range(4)),
        )

    def double_backward(
        self,
        ctx: Any,
        a_x: torch.Tensor,
        a_pdc: torch.Tensor,
        a_pdc_bias: torch.Tensor,
        a_point: torch.Tensor,
        a_point_bias: torch.Tensor,
    ) -> tuple[OptionalTensor, ...]:
        """The gradient of <a, backward(grad, x, w, b, v)>, with a = (a_x, a_w, a_b, a_v, a_c) as the arguments are.

        With the difference convolution L, h = L(x, w) + b, m = [h > 0] and r = m h this product is
        <L(a_x, w) + L(x, a_w) + a_b, m (v' grad)> + <a_v r + a_c, grad>.
        """
        grad, x, pdc_weight, pdc_bias, point_weight = ctx.saved_tensors
        pdc, pdc_backward = self.pdc.pdc2d_depthwise, self.pdc.pdc2d_depthwise_backward
        hidden = pdc(x, pdc_weight, pdc_bias, *ctx.options)
        # A NaN passes the ReLU, as in torch.
        inactive = hidden <= 0

        def gate(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.masked_fill(inactive, 0)

        tangent = gate(pdc(a_x, pdc_weight, None, *ctx.options) + pdc(x, a_pdc, a_pdc_bias, *ctx.options))
        a_bias = a_point_bias if ctx.need_point_bias else None
        d_grad = F.conv2d(tangent, point_weight) + F.conv2d(gate(hidden), a_point, a_bias)
        d_point = torch.einsum("bohw,bchw->oc", grad, tangent)[:, :, None, None]
        through = gate(F.conv2d(grad, point_weight.transpose(0, 1)))
        through_a = gate(F.conv2d(grad, a_point.transpose(0, 1)))
        d_x, d_pdc, d_bias = pdc_backward(through_a, x, pdc_weight, *ctx.options, True, True)
        d_x = d_x + pdc_backward(through, x, a_pdc, *ctx.options, True, False)[0]
        d_pdc = d_pdc + pdc_backward(through, a_x, pdc_weight, *ctx.options, False, True)[1]
        return d_grad, d_x, d_pdc, d_bias if ctx.has_bias else None, d_point, *(None for _ in range(5))


def _flop_count(out: Any, pdc_weight: Any, point_weight: Any, kind: int | None) -> int:
    hidden = (out[0], pdc_weight[0], *out[2:])
    return _flops.convolution(hidden, pdc_weight, kind) + _flops.convolution(out, point_weight)


def _forward_flops(
    x: Any,
    pdc_weight: Any,
    pdc_bias: Any,
    point_weight: Any,
    point_bias: Any,
    residual: Any,
    kind: int,
    *_: Any,
    out_shape: Any,
    **__: Any,
) -> int:
    return _flop_count(out_shape, pdc_weight, point_weight, kind)


def _backward_flops(
    grad: Any, x: Any, pdc_weight: Any, pdc_bias: Any, point_weight: Any, kind: int, *_: Any, **__: Any
) -> int:
    return 2 * _flop_count(grad, pdc_weight, point_weight, kind)


def _dense_flops(
    x: Any, plain: Any, pdc_bias: Any, point_weight: Any, *_: Any, out_shape: Any, **__: Any
) -> int:
    return _flop_count(out_shape, plain, point_weight, None)


def register(namespace: str, pdc: str | None = None) -> None:
    """Registers fakes, autograd, autocast and FLOP formulas of the operators in `namespace`. The difference
    convolution's operators are in the namespace `pdc`, by default the same."""
    forward, backward = f"{namespace}::pdc_block", f"{namespace}::pdc_block_backward"
    rules = _Rules(namespace, pdc or namespace)
    torch.library.register_fake(forward, _fake)
    torch.library.register_fake(backward, _fake_backward)
    _autograd.register(forward, rules.backward, _setup)
    _autograd.register(backward, rules.double_backward, _setup_backward)
    _flops.register(namespace, {"pdc_block": _forward_flops, "pdc_block_backward": _backward_flops})
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(forward, device, torch.bfloat16)


def _fake_dense(
    x: torch.Tensor,
    plain: torch.Tensor,
    pdc_bias: OptionalTensor,
    point_weight: torch.Tensor,
    point_bias: OptionalTensor,
    residual: OptionalTensor,
    kind: int,
    theta: float,
    stride: list[int],
    dilation: list[int],
) -> torch.Tensor:
    rows, columns = ((size - 1) // s + 1 for size, s in zip(x.shape[2:], stride, strict=True))
    return empty_image(x, (x.shape[0], point_weight.shape[0], rows, columns))


register("frd")
register(_triton.NAMESPACE)
register(_library.CHAIN, "frd")
torch.library.register_fake(f"{_triton.NAMESPACE}::pdc_block_dense", _fake_dense)
_flops.register(_triton.NAMESPACE, {"pdc_block_dense": _dense_flops})
