"""The layers `PDCBlock2d`, PiDiNet's residual block, and `DPM`, FRD-Net's detail branch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Some tools replace `nn.Conv2d` by a class of their own.
from torch.nn.modules.conv import Conv2d

from .._inner import has_global_hooks, is_plain
from .._numbers import parse_count
from ..pdc.layers import PDC2d
from . import api


class PDCBlock2d(nn.Module):
    """Depthwise PDC -> ReLU -> 1x1 (-> + shortcut), the block of PiDiNet; padding = dilation.

    Args:
        kind: "vanilla", "central", "angular", "radial" or PiDiNet's "cv", "cd", "ad", "rd".
        stride, dilation: of the difference convolution.
        residual: adds the input. If the stride is not 1 or the channels differ, adds `shortcut(input)` instead, a 1x1
            convolution with bias and that stride. (PiDiNet's own stride-2 block is `F.max_pool2d(x, 2)` followed by a
            block of stride 1 whose `shortcut` is a 1x1 convolution.)
        bias: on both convolutions of the main path.
        theta: 0 is the plain convolution, 1 the pure difference.
        device: of the parameters.
        dtype: of the parameters.

    The main path is one kernel as long as `pdc` and `point` are unmodified. If hooks, an adapter or a parametrization
    are attached to one of them, or it is replaced by another module, both are called instead.

    Parameters: `pdc.weight` [C, 1, 3, 3] and `point.weight` [Co, C, 1, 1] (`conv1` and `conv2` in PiDiNet's
    checkpoints), `pdc.bias`, `point.bias`, `shortcut.weight`, `shortcut.bias`.

    Input [B, C, H, W], output [B, Co, Ho, Wo] with Ho = (H - 1) // stride + 1.

    Raises:
        ValueError: an argument is invalid; the message names it, the rule and the value.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kind: str,
        stride: int = 1,
        dilation: int = 1,
        residual: bool = False,
        bias: bool = False,
        theta: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels = parse_count(in_channels, "in_channels")
        out_channels = parse_count(out_channels, "out_channels")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual = residual
        self.pdc = PDC2d(
            in_channels,
            in_channels,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=in_channels,
            bias=bias,
            kind=kind,
            theta=theta,
            **factory,
        )
        self.point = nn.Conv2d(in_channels, out_channels, 1, bias=bias, **factory)
        self.shortcut: nn.Conv2d | None = None
        if residual and (self.pdc.stride != (1, 1) or in_channels != out_channels):
            stride_pair = self.pdc.geometry().stride
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride_pair, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = None
        if self.residual:
            residual = x if self.shortcut is None else self.shortcut(x)
        pdc, point = self.pdc, self.point
        if not _is_fused(pdc, point):
            out = point(F.relu(pdc(x)))
            # Under autocast a float32 residual must not promote the result to float32.
            return out if residual is None else out + residual.to(out.dtype)
        return api.pdc_block(
            x,
            pdc.weight,
            point.weight,
            kind=pdc.kind,
            theta=pdc.theta,
            stride=pdc.stride,
            dilation=pdc.dilation,
            residual=residual,
            pdc_bias=pdc.bias,
            point_bias=point.bias,
        )

    def extra_repr(self) -> str:
        return f"residual={self.residual}"


def _is_fused(pdc: PDC2d, point: nn.Conv2d) -> bool:
    """Whether `pdc_block` computes what calls of the two modules would: nothing is attached to them, and the
    attributes that are no arguments of `pdc_block` have the values that PDCBlock2d gave them."""
    return (
        not has_global_hooks()
        and is_plain(pdc, PDC2d)
        and is_plain(point, Conv2d)
        and pdc.padding == pdc.dilation
        and pdc.padding_mode == "zeros"
        and point.kernel_size == (1, 1)
        and point.stride == (1, 1)
        and point.padding == (0, 0)
        and point.groups == 1
    )


class DPM(nn.Module):
    """FRD-Net's detail branch: y = x + angular(x), out = central(y); two depthwise blocks without bias.

    Parameters: `angular.pdc.weight`, `central.pdc.weight` [C, 1, 3, 3]; `angular.point.weight`,
    `central.point.weight` [C, C, 1, 1]. Input and output [B, C, H, W].

    Args:
        channels: C of the input and of the output.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        channels = parse_count(channels, "channels")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.angular = PDCBlock2d(channels, channels, kind="angular", residual=True, **factory)
        self.central = PDCBlock2d(channels, channels, kind="central", **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.central(self.angular(x))
