"""Parsing and checks of the arguments of a pixel difference convolution, for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import _checked_calls
from .._autocast import autocast_dtype
from .._numbers import as_int, is_integer, is_number, parse_count
from .._torch_internals import untraced
from .kinds import Kind, parse_kind, plain_size

IntOrPair = int | Sequence[int]


class Geometry(NamedTuple):
    """The options of a pixel difference convolution; pairs are (vertical, horizontal).

    padding counts as for a 3x3 kernel. For radial it may be as low as -dilation, which adds no zeros at all.
    """

    kind: Kind
    theta: float
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def plain_size(self) -> int:
        """Kernel size of the equivalent plain convolution."""
        return plain_size(self.kind)

    @property
    def plain_padding(self) -> tuple[int, int]:
        """Padding of the equivalent plain convolution: radial's outer taps reach one dilation step further."""
        if self.kind != Kind.RADIAL:
            return self.padding
        return self.padding[0] + self.dilation[0], self.padding[1] + self.dilation[1]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') for an input of height x width pixels."""
        rows, columns = (
            (size + 2 * p - 2 * d - 1) // s + 1
            for size, p, d, s in zip((height, width), self.padding, self.dilation, self.stride, strict=True)
        )
        return rows, columns


def _pair(value: IntOrPair, name: str, lowest: int) -> tuple[int, int]:
    # The common case.
    if type(value) is int and value >= lowest:
        return value, value
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(pair) != 2 or not all(map(is_integer, pair)):
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    if any(v < lowest for v in pair):
        raise ValueError(f"{name} must be at least {lowest}, got {value!r}")
    return as_int(pair[0]), as_int(pair[1])


def parse_theta(theta: float) -> float:
    """theta in [0, 1] as a float; raises TypeError or ValueError."""
    if not is_number(theta):
        raise TypeError(f"theta must be a number in [0, 1], got {type(theta).__name__}")
    if not 0.0 <= theta <= 1.0:
        raise ValueError(f"theta must be in [0, 1], got {theta}")
    return float(theta)


def parse_geometry(
    kind: str,
    theta: float,
    stride: IntOrPair,
    padding: IntOrPair | str,
    dilation: IntOrPair,
    groups: int,
) -> Geometry:
    """Parses the options of `pdc2d`; raises TypeError or ValueError."""
    stride_pair = _pair(stride, "stride", 1)
    dilation_pair = _pair(dilation, "dilation", 1)
    if not isinstance(padding, str):
        padding_pair = _pair(padding, "padding", 0)
    elif padding == "same":
        if stride_pair != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride {stride!r}")
        padding_pair = dilation_pair
    elif padding == "valid":
        padding_pair = (0, 0)
    else:
        raise ValueError(f"padding must be an int, a pair of ints, 'same' or 'valid', got {padding!r}")
    groups = parse_count(groups, "groups")
    return Geometry(parse_kind(kind), parse_theta(theta), stride_pair, padding_pair, dilation_pair, groups)


def checked_geometry(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    theta: float,
    stride: IntOrPair,
    padding: IntOrPair | str,
    dilation: IntOrPair,
    groups: int,
) -> Geometry:
    """`parse_geometry` and `check_tensors`, skipped for calls that have passed them before."""
    options = (kind, theta, stride, padding, dilation, groups)
    key = _checked_calls.key("pdc2d", x, weight, bias, *options)
    geometry: Geometry | None = _checked_calls.get(key)
    if geometry is None:
        geometry = untraced(_checked, x, weight, bias, *options)
        _checked_calls.store(key, geometry)
    return geometry


def _checked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: Any) -> Geometry:
    geometry = parse_geometry(*options)
    check_tensors(x, weight, bias, geometry)
    return geometry


def check_weight(weight: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless weight is a floating point tensor [O, I, 3, 3]."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(
            f"weight must be [out_channels, in_channels / groups, 3, 3], got {list(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point, got {weight.dtype}")


def check_tensors(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry
) -> None:
    """Raises TypeError or ValueError unless shapes, dtypes and devices agree and the output is not empty."""
    check_weight(weight)
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [B, C, H, W] or [C, H, W], got {list(x.shape)}")
    channels, groups = x.shape[-3], geometry.groups
    if channels % groups or weight.shape[0] % groups:
        raise ValueError(
            f"groups must divide in_channels {channels} and out_channels {weight.shape[0]}, got {groups}"
        )
    if channels != weight.shape[1] * groups:
        raise ValueError(
            f"x must have weight.shape[1] * groups = {weight.shape[1] * groups} channels, got {channels}"
        )
    # Under autocast the operands are cast to one dtype later, as for F.conv2d.
    mixed_allowed = autocast_dtype(x.device.type) is not None
    named = [("x", x)] if bias is None else [("x", x), ("bias", bias)]
    for name, tensor in named:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != weight.dtype and not (mixed_allowed and tensor.is_floating_point()):
            raise ValueError(f"{name} must have the dtype of weight, {weight.dtype}, got {tensor.dtype}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {tensor.device}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be [out_channels] = [{weight.shape[0]}], got {list(bias.shape)}")
    rows, columns = geometry.output_size(x.shape[-2], x.shape[-1])
    if rows < 1 or columns < 1:
        raise ValueError(
            f"the output would be empty: x is {x.shape[-2]}x{x.shape[-1]} with padding {geometry.padding}, "
            f"dilation {geometry.dilation}; it must cover a 3x3 window"
        )
