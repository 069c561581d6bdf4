"""`pdc_block`: difference convolution -> ReLU -> 1x1 convolution (-> + residual)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Proxy
from torch.overrides import handle_torch_function

from .. import _autograd, _checked_calls, _triton, backend
from .._autocast import autocast_dtype, cast_operands
from .._torch_internals import untraced
from ..pdc import api as pdc_api
from ..pdc.arguments import Geometry, IntOrPair, check_tensors, parse_geometry
from . import ops, reference

OptionalTensor = torch.Tensor | None


def pdc_block(
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    point_weight: torch.Tensor,
    *,
    kind: str,
    theta: float = 1.0,
    stride: IntOrPair = 1,
    dilation: IntOrPair = 1,
    residual: OptionalTensor = None,
    pdc_bias: OptionalTensor = None,
    point_bias: OptionalTensor = None,
) -> torch.Tensor:
    """conv1x1(relu(pdc2d(x))) + residual, with padding = dilation.

    With a depthwise `pdc_weight` it is one kernel: the result of the stencil stays in cache until the 1x1 convolution
    has read it, and is recomputed in the backward pass instead of stored. With a dense one it is `pdc2d`, ReLU and
    `F.conv2d`; under `use_backend("triton")` it is one kernel at inference if all channels are 64, 128 or 256.

    Args:
        x: [B, C, H, W], contiguous or channels_last; the result has the same layout.
        pdc_weight: [C, 1, 3, 3] (depthwise) or [Ch, C / groups, 3, 3].
        point_weight: [Co, Ch, 1, 1], Ch = pdc_weight.shape[0].
        kind: "vanilla", "central", "angular", "radial" or PiDiNet's "cv", "cd", "ad", "rd".
        theta: 0 is the plain convolution, 1 the pure difference.
        stride, dilation: of the difference convolution; int or (vertical, horizontal).
        residual: [B, Co, Ho, Wo], added at the end.
        pdc_bias: [Ch]. point_bias: [Co].

    Returns:
        [B, Co, Ho, Wo] with Ho = (H - 1) // stride + 1, likewise Wo.

    Raises:
        ValueError: an argument has an invalid value, shape, dtype or device; the message names it and the rule.
        TypeError: an argument that must be a tensor or a number is not one.
    """
    if isinstance(x, Proxy):
        named: dict[str, Any] = {"kind": kind, "theta": theta, "stride": stride, "dilation": dilation}
        named |= {"residual": residual, "pdc_bias": pdc_bias, "point_bias": point_bias}
        return handle_torch_function(pdc_block, (x,), x, pdc_weight, point_weight, **named)
    tensors = (x, pdc_weight, pdc_bias, point_weight, point_bias, residual)
    key = _checked_calls.key("pdc_block", *tensors, kind, theta, stride, dilation)
    geometry: Geometry | None = _checked_calls.get(key)
    if geometry is None:
        geometry = untraced(_checked, *tensors, kind, theta, stride, dilation)
        _checked_calls.store(key, geometry)
    native = backend.select("pdc_block", x)
    if native is None:
        return _run_plain(*tensors, geometry)
    depthwise = pdc_api.is_depthwise(pdc_weight, geometry.groups)
    if depthwise and backend.is_fused("pdc_block", x, native):
        return ops.pdc_block(native, *tensors, geometry)
    if not depthwise and _runs_dense_kernel(native, *tensors):
        plain = pdc_api.plain_weight(native, pdc_weight, geometry)
        options = (int(geometry.kind), geometry.theta, geometry.stride, geometry.dilation)
        tensors = (x, plain, *tensors[2:])
        return _autograd.call(native.pdc_block_dense.default, *tensors, *options)
    return _compose(*tensors, geometry)


def _compose(
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    pdc_bias: OptionalTensor,
    point_weight: torch.Tensor,
    point_bias: OptionalTensor,
    residual: OptionalTensor,
    geometry: Geometry,
) -> torch.Tensor:
    hidden = F.relu(pdc_api.run(x, pdc_weight, pdc_bias, geometry))
    out = F.conv2d(hidden, point_weight, point_bias)
    return out if residual is None else out + residual


def _checked(
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    pdc_bias: OptionalTensor,
    point_weight: torch.Tensor,
    point_bias: OptionalTensor,
    residual: OptionalTensor,
    kind: str,
    theta: float,
    stride: IntOrPair,
    dilation: IntOrPair,
) -> Geometry:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    geometry = parse_geometry(kind, theta, stride, 0, dilation, _groups(x, pdc_weight))
    geometry = geometry._replace(padding=geometry.dilation)
    check_tensors(x, pdc_weight, pdc_bias, geometry)
    _check_point(x, pdc_weight, point_weight, point_bias, residual, geometry)
    return geometry


def _runs_dense_kernel(
    native: Any, x: torch.Tensor, pdc_weight: torch.Tensor, *others: OptionalTensor
) -> bool:
    """Whether Triton was requested and its dense kernel, which has no backward, supports these tensors.

    On an H100 it is slower than the operations it fuses, so it is never the default.
    """
    if native.name != _triton.NAMESPACE or backend.requested() != "triton":
        return False
    if autocast_dtype(x.device.type) is not None:
        return False
    needs_grad = any(t is not None and t.requires_grad for t in (x, pdc_weight, *others))
    if needs_grad and torch.is_grad_enabled():
        return False
    # Imported here, since it imports triton.
    from .triton.dense import can_run_dense

    point_weight = others[1]
    assert point_weight is not None
    return can_run_dense(x, pdc_weight, point_weight) is None


def _groups(x: torch.Tensor, pdc_weight: torch.Tensor) -> int:
    """The groups that x and `pdc_weight` imply; 1 for shapes that the checks are going to refuse."""
    if not isinstance(pdc_weight, torch.Tensor) or pdc_weight.dim() != 4 or pdc_weight.shape[1] < 1:
        return 1
    return max(x.shape[1] // pdc_weight.shape[1], 1)


def _check_point(
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    point_weight: torch.Tensor,
    point_bias: OptionalTensor,
    residual: OptionalTensor,
    geometry: Geometry,
) -> None:
    """Raises TypeError or ValueError unless the 1x1 convolution and the residual fit the difference convolution."""
    if not isinstance(point_weight, torch.Tensor):
        raise TypeError(f"point_weight must be a tensor, got {type(point_weight).__name__}")
    hidden = pdc_weight.shape[0]
    if point_weight.dim() != 4 or tuple(point_weight.shape[1:]) != (hidden, 1, 1):
        raise ValueError(
            f"point_weight must be [out_channels, {hidden}, 1, 1], got {list(point_weight.shape)}"
        )
    channels = point_weight.shape[0]
    expected: list[tuple[str, OptionalTensor, tuple[int, ...]]] = [
        ("point_weight", point_weight, tuple(point_weight.shape)),
        ("point_bias", point_bias, (channels,)),
        ("residual", residual, (x.shape[0], channels, *geometry.output_size(x.shape[2], x.shape[3]))),
    ]
    mixed_allowed = autocast_dtype(x.device.type) is not None
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != x.dtype and not (mixed_allowed and tensor.is_floating_point()):
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def _run_plain(
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    pdc_bias: OptionalTensor,
    point_weight: torch.Tensor,
    point_bias: OptionalTensor,
    residual: OptionalTensor,
    geometry: Geometry,
) -> torch.Tensor:
    """In plain PyTorch, outside autocast: the operands are cast as for the operator."""
    device = x.device.type
    if autocast_dtype(device) is not None:
        x, pdc_weight, pdc_bias, point_weight, point_bias, residual = cast_operands(
            x, pdc_weight, pdc_bias, point_weight, point_bias, residual
        )
        with torch.autocast(device, enabled=False):
            return _run_plain(x, pdc_weight, pdc_bias, point_weight, point_bias, residual, geometry)
    if backend.is_composed():
        return _compose(x, pdc_weight, pdc_bias, point_weight, point_bias, residual, geometry)
    return reference.pdc_block(
        x,
        pdc_weight,
        point_weight,
        kind=geometry.kind.name.lower(),
        theta=geometry.theta,
        stride=geometry.stride,
        dilation=geometry.dilation,
        residual=residual,
        pdc_bias=pdc_bias,
        point_bias=point_bias,
    )
