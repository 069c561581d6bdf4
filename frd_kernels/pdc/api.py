"""Functions of the pixel difference convolution family."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import _autograd, backend
from .._autocast import autocast_dtype
from ..kinds import Kind, parse_kind
from . import ops, reference
from .arguments import (
    Geometry,
    IntOrPair,
    check_weight,
    checked_geometry,
    parse_theta,
)


def pdc_weight(weight: torch.Tensor, *, kind: str, theta: float = 1.0) -> torch.Tensor:
    """The plain kernel that equals the difference convolution by `weight`: `F.conv2d(x, pdc_weight(w, ...))`.

    In 16 bit the taps of each (out, in) pair are rounded together so that their sum survives; a plain cast
    leaks the mean of the input into the output.

    Args:
        weight: [O, I, 3, 3], floating point.
        kind: "vanilla", "central", "angular", "radial" or PiDiNet's "cv", "cd", "ad", "rd".
        theta: 0 is the plain convolution, 1 the pure difference.

    Returns:
        [O, I, 3, 3], for radial [O, I, 5, 5] (to be used with padding + dilation); dtype and device of
        `weight`.

    Raises:
        ValueError: unknown kind, theta outside [0, 1], or a weight of another shape or dtype.
    """
    check_weight(weight)
    parsed, theta = parse_kind(kind), parse_theta(theta)
    native = backend.select("pdc_weight", weight)
    if native is None:
        return reference.pdc_weight(weight, kind=kind, theta=theta)
    return native.pdc_weight(weight, int(parsed), theta, weight.dtype)


def pdc2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kind: str,
    theta: float = 1.0,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Pixel difference convolution: y(p) = sum_k w_k (x(p + plus_k) - theta x(p + minus_k)) + bias.

    "central" subtracts the centre of the window, "angular" the next neighbour clockwise, "radial" the inner
    from the outer ring of a 5x5 window (PiDiNet's weight order), "vanilla" nothing. Depthwise (`groups` equal
    to in and out channels) runs as one stencil that takes the difference in float32 before anything is
    rounded; everything else as one plain convolution with `pdc_weight`.

    Args:
        x: [B, C, H, W] or [C, H, W]. Depthwise output is channels_last where x is dense in channels_last.
        weight: [O, C / groups, 3, 3].
        bias: [O].
        kind: "vanilla", "central", "angular", "radial" or PiDiNet's "cv", "cd", "ad", "rd".
        theta: 0 is the plain convolution, 1 the pure difference (PiDiNet, FRD-Net); CDCN's papers use 0.7.
        stride, dilation: int or (vertical, horizontal).
        padding: zeros on each side, int or pair, as for a 3x3 kernel; radial's outer taps reach one dilation
            step further, over zeros. Or "same" (stride 1), "valid".
        groups: divides C and O.

    Returns:
        [B, O, H', W'] of the size that `F.conv2d` gives for a 3x3 kernel; unbatched if x is.

    Raises:
        ValueError: one line that names the argument, the rule and what came.
        TypeError: something that has to be a tensor or a number is not.
    """
    geometry = checked_geometry(x, weight, bias, kind, theta, stride, padding, dilation, groups)
    return run(x, weight, bias, geometry)


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    plain: torch.Tensor | None = None,
) -> torch.Tensor:
    """`pdc2d` for checked arguments; `plain` is `plain_weight(...)`'s, if the caller has it at hand."""
    if x.dim() == 3:
        return run(x.unsqueeze(0), weight, bias, geometry, plain).squeeze(0)
    native = backend.select("pdc2d", x)
    if native is None:
        if autocast_dtype(x.device.type) is not None:
            return _autocast_reference(x, weight, bias, geometry)
        return reference.run(x, weight, bias, geometry)
    if is_depthwise(weight, geometry.groups):
        return ops.pdc2d_depthwise(native, x, weight, bias, geometry)
    if plain is None:
        plain = plain_weight(native, weight, geometry)
    return F.conv2d(
        x, plain, bias, geometry.stride, geometry.plain_padding, geometry.dilation, geometry.groups
    )


def is_depthwise(weight: torch.Tensor, groups: int) -> bool:
    """One input channel and one output channel per group: the case of the own stencil kernels."""
    return weight.shape[1] == 1 and weight.shape[0] == groups


def plain_weight(ops: Any, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The plain kernel in the dtype of the convolution: a cast under autocast stays zero-sum. ops: the
    namespace that `backend.select` gave."""
    dtype = weight.dtype
    if dtype != torch.float64:
        dtype = autocast_dtype(weight.device.type) or dtype
    if geometry.kind == Kind.VANILLA:
        return weight if weight.dtype == dtype else weight.to(dtype)  # an exported graph would keep the no-op
    return _autograd.call(ops.pdc_weight.default, weight, int(geometry.kind), geometry.theta, dtype)


def _autocast_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    """Casts the operands as autocast does for `F.conv2d`; the reference itself then sees no autocast."""
    x, weight, bias = ops.autocast_operands(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return reference.run(x, weight, bias, geometry)
