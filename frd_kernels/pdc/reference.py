"""Pixel difference convolution in plain PyTorch, as its formula says: differences first, then the weighted sum.

The oracle of the tests and the backend "reference". Definitions: PiDiNet (Su et al., ICCV 2021), with theta between
the plain convolution (0) and the pure difference (1) as in CDCN (Yu et al., CVPR 2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._torch_internals import untraced
from .arguments import Geometry, IntOrPair, check_tensors, check_weight, parse_geometry, parse_theta
from .kinds import Kind, parse_kind, plain_size
from .taps import Offset, pairs


def pdc_weight(weight: torch.Tensor, *, kind: str, theta: float = 1.0) -> torch.Tensor:
    """The plain kernel that equals the difference convolution by `weight`.

    Args:
        weight: [O, I, 3, 3].
        kind: "vanilla", "central", "angular", "radial" or PiDiNet's "cv", "cd", "ad", "rd".
        theta: 0 is the plain convolution, 1 the pure difference.

    Returns:
        [O, I, 3, 3], for radial [O, I, 5, 5].
    """
    untraced(check_weight, weight)
    return _plain_weight(weight, parse_kind(kind), parse_theta(theta))


def _plain_weight(weight: torch.Tensor, kind: Kind, theta: float) -> torch.Tensor:
    size = plain_size(kind)
    flat = weight.flatten(2)
    taps = [torch.zeros_like(flat[..., 0]) for _ in range(size * size)]

    def index(offset: Offset) -> int:
        return (offset[0] + size // 2) * size + offset[1] + size // 2

    for k, minuend, subtrahend in pairs(kind):
        taps[index(minuend)] = taps[index(minuend)] + flat[..., k]
        if subtrahend is not None:
            taps[index(subtrahend)] = taps[index(subtrahend)] - theta * flat[..., k]
    return torch.unflatten(torch.stack(taps, dim=-1), -1, (size, size))


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
    """Pixel difference convolution, y = sum_k w_k (x_plus(k) - theta x_minus(k)) + bias.

    16-bit inputs are computed in float32 and rounded once. Arguments and errors: `frd_kernels.pdc2d`.
    """
    geometry = parse_geometry(kind, theta, stride, padding, dilation, groups)
    untraced(check_tensors, x, weight, bias, geometry)
    return run(x, weight, bias, geometry)


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry) -> torch.Tensor:
    """`pdc2d` for checked arguments."""
    dtype = x.dtype
    compute = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    groups, theta = geometry.groups, geometry.theta
    x, taps = x.to(compute), weight.to(compute).flatten(2)
    (stride_y, stride_x), (dilation_y, dilation_x) = geometry.stride, geometry.dilation
    rows, columns = geometry.output_size(x.shape[-2], x.shape[-1])
    pad_y, pad_x = geometry.plain_padding
    padded = F.pad(x, (pad_x, pad_x, pad_y, pad_y))
    radius = geometry.plain_size // 2

    def shifted(offset: Offset) -> torch.Tensor:
        """x at `offset` from every output position: [..., C, rows, columns]."""
        top, left = (radius + offset[0]) * dilation_y, (radius + offset[1]) * dilation_x
        bottom, right = top + (rows - 1) * stride_y + 1, left + (columns - 1) * stride_x + 1
        return padded[..., top:bottom:stride_y, left:right:stride_x]

    out: torch.Tensor | None = None
    for k, minuend, subtrahend in pairs(geometry.kind):
        if theta == 1.0 and minuend == subtrahend:
            # The difference is 0, and this weight unused.
            continue
        difference = shifted(minuend)
        if subtrahend is not None:
            difference = difference - theta * shifted(subtrahend)
        term = _contract(difference, taps[..., k], groups)
        out = term if out is None else out + term
    assert out is not None
    if bias is not None:
        out = out + bias.to(compute)[:, None, None]
    return out.to(dtype)


def as_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> torch.Tensor:
    """`run` as one plain convolution with `pdc_weight`, which every transform and FLOP counter of torch supports."""
    dtype = x.dtype
    compute = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    plain = _plain_weight(weight.to(compute), geometry.kind, geometry.theta)
    out = F.conv2d(
        x.to(compute),
        plain,
        None if bias is None else bias.to(compute),
        geometry.stride,
        geometry.plain_padding,
        geometry.dilation,
        geometry.groups,
    )
    return out.to(dtype)


def is_depthwise(weight: torch.Tensor, groups: int) -> bool:
    """Whether each group has one input and one output channel, as the stencil kernels require."""
    return weight.shape[1] == 1 and weight.shape[0] == groups


def _contract(x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """x [..., C, H, W], weight [O, C / groups] -> [..., O, H, W], a grouped 1x1 convolution."""
    if untraced(is_depthwise, weight, groups):
        return x * weight[:, 0, None, None]
    split = torch.unflatten(x, -3, (groups, -1))
    out = torch.einsum("...gchw,goc->...gohw", split, torch.unflatten(weight, 0, (groups, -1)))
    return out.flatten(-4, -3)
