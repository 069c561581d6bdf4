"""`pdc2d` and `pdc_weight`: pixel difference convolution and its plain kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch.fx import Proxy
from torch.overrides import handle_torch_function

from .. import _autograd, backend
from .._autocast import autocast_dtype, cast_operands
from .._torch_internals import untraced
from . import ops, reference
from .arguments import (
    Geometry,
    IntOrPair,
    check_weight,
    checked_geometry,
    parse_theta,
)
from .kinds import Kind, parse_kind
from .reference import is_depthwise


def pdc_weight(weight: torch.Tensor, *, kind: str, theta: float = 1.0) -> torch.Tensor:
    """The plain kernel of the equivalent convolution: `pdc2d(x, w, ...)` equals `F.conv2d(x, pdc_weight(w, ...))`.

    In 16 bit the taps of each (out, in) pair are rounded together such that their sum is preserved. Rounded one by one,
    they would no longer sum to zero, and the mean of the input would show in the output.

    Args:
        weight: [O, I, 3, 3], floating point.
        kind: "vanilla", "central", "angular", "radial" or PiDiNet's "cv", "cd", "ad", "rd".
        theta: 0 is the plain convolution, 1 the pure difference.

    Returns:
        [O, I, 3, 3], for radial [O, I, 5, 5], to be used with padding + dilation. Dtype and device of `weight`.

    Raises:
        ValueError: unknown kind, theta outside [0, 1], or a weight of another shape or dtype.
    """
    if isinstance(weight, Proxy):
        return handle_torch_function(pdc_weight, (weight,), weight, kind=kind, theta=theta)
    untraced(check_weight, weight)
    parsed, theta = parse_kind(kind), parse_theta(theta)
    native = backend.select("pdc_weight", weight)
    if native is None:
        return reference.pdc_weight(weight, kind=kind, theta=theta)
    return _autograd.call(native.pdc_weight.default, weight, int(parsed), theta, weight.dtype)


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
    from the outer ring of a 5x5 window (in PiDiNet's order of weights), "vanilla" nothing. A depthwise convolution
    (`groups` equal to the input and output channels) runs as one stencil kernel that takes the differences in float32,
    before anything is rounded; every other runs as one plain convolution with `pdc_weight`.

    Args:
        x: [B, C, H, W] or [C, H, W]. The depthwise output is channels_last if x is dense in channels_last.
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
        ValueError: an argument has an invalid value, shape, dtype or device; the message names it and the rule.
        TypeError: an argument that must be a tensor or a number is not one.
    """
    if isinstance(x, Proxy):
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return handle_torch_function(pdc2d, (x,), x, weight, bias, kind=kind, theta=theta, **options)
    geometry = checked_geometry(x, weight, bias, kind, theta, stride, padding, dilation, groups)
    return run(x, weight, bias, geometry)


def pdc2d_padded(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding_mode: str, *options: Any
) -> torch.Tensor:
    """`pdc2d` with a padding mode of `nn.Conv2d`; options as for `parse_geometry`. One node of a `torch.fx` graph."""
    geometry = checked_geometry(x, weight, bias, *options)
    if padding_mode != "zeros":
        x, geometry = pad(x, geometry, padding_mode)
    return run(x, weight, bias, geometry)


torch.fx.wrap("pdc2d_padded")


def pad(x: torch.Tensor, geometry: Geometry, mode: str) -> tuple[torch.Tensor, Geometry]:
    """Pads x as far as the outermost tap reaches; the geometry returned adds no more zeros.

    Raises:
        ValueError: the mode cannot pad an image of this size by this much.
    """
    untraced(_check_pad, x, geometry, mode)
    vertical, horizontal = geometry.plain_padding
    x = F.pad(x, (horizontal, horizontal, vertical, vertical), mode=mode)
    # As for a 3x3 kernel: radial's outer taps add one dilation step to it.
    extra = geometry.dilation if geometry.kind == Kind.RADIAL else (0, 0)
    return x, geometry._replace(padding=(-extra[0], -extra[1]))


def _check_pad(x: torch.Tensor, geometry: Geometry, mode: str) -> None:
    for pad, size in zip(geometry.plain_padding, x.shape[-2:], strict=True):
        if (mode == "reflect" and pad >= size) or (mode == "circular" and pad > size):
            raise ValueError(
                f"padding_mode {mode!r} cannot pad {size} pixels by {pad} on a side (kind "
                f"{geometry.kind.name.lower()}, padding {geometry.padding}, dilation {geometry.dilation})"
            )


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    plain: torch.Tensor | None = None,
) -> torch.Tensor:
    """`pdc2d` for checked arguments; `plain` is the result of `plain_weight(...)` if the caller has kept it."""
    if x.dim() == 3:
        return run(x.unsqueeze(0), weight, bias, geometry, plain).squeeze(0)
    native = backend.select("pdc2d", x)
    if native is None:
        return _run_plain(x, weight, bias, geometry)
    if is_depthwise(weight, geometry.groups):
        return ops.pdc2d_depthwise(native, x, weight, bias, geometry)
    if plain is None:
        plain = plain_weight(native, weight, geometry)
    return F.conv2d(
        x, plain, bias, geometry.stride, geometry.plain_padding, geometry.dilation, geometry.groups
    )


def plain_weight(ops: Any, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The plain kernel in the dtype of the convolution, rounded once (zero-sum), also to the dtype of autocast.

    ops: the namespace from `backend.select`.
    """
    dtype = weight.dtype
    if dtype != torch.float64:
        dtype = autocast_dtype(weight.device.type) or dtype
    if geometry.kind == Kind.VANILLA:
        # An exported graph would keep a cast that does nothing.
        return weight if weight.dtype == dtype else weight.to(dtype)
    return _autograd.call(ops.pdc_weight.default, weight, int(geometry.kind), geometry.theta, dtype)


def _run_plain(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    """In plain PyTorch, outside autocast: the operands are cast as autocast casts those of `F.conv2d`."""
    if autocast_dtype(x.device.type) is not None:
        x, weight, bias = cast_operands(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return _run_plain(x, weight, bias, geometry)
    form = reference.as_conv2d if backend.is_composed() else reference.run
    return form(x, weight, bias, geometry)
