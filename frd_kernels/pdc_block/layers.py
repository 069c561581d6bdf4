"""`PDCBlock2d`, PiDiNet's residual block, and `DPM`, FRD-Net's detail branch, as layers."""

from __future__ import annotations

import torch
from torch import nn

from ..pdc.layers import PDC2d
from . import api


class PDCBlock2d(nn.Module):
    """Depthwise PDC -> ReLU -> 1x1 (-> + shortcut), the block of PiDiNet; padding = dilation.

    Args:
        kind: "vanilla", "central", "angular", "radial" or PiDiNet's "cv", "cd", "ad", "rd".
        stride, dilation: of the difference convolution.
        residual: adds the input; where stride or channels differ, a 1x1 convolution of it with bias and that
            stride, `shortcut`. (PiDiNet's own stride-2 block is `F.max_pool2d(x, 2)` followed by a block of
            stride 1 whose `shortcut` is a 1x1 convolution.)
        bias: on both convolutions of the main path.
        theta: 0 is the plain convolution, 1 the pure difference.

    Parameters: `pdc.weight` [C, 1, 3, 3] and `point.weight` [Co, C, 1, 1] (`conv1` and `conv2` in PiDiNet's
    checkpoints), `pdc.bias`, `point.bias`, `shortcut.weight`, `shortcut.bias`.

    Input [B, C, H, W], output [B, Co, Ho, Wo] with Ho = (H - 1) // stride + 1.

    Raises:
        ValueError: one line that names the argument, the rule and what came.
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
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
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
        )
        self.point = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.shortcut: nn.Conv2d | None = None
        if residual and (self.pdc.stride != (1, 1) or in_channels != out_channels):
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=self.pdc.geometry().stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = None
        if self.residual:
            residual = x if self.shortcut is None else self.shortcut(x)
        pdc, point = self.pdc, self.point
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


class DPM(nn.Module):
    """FRD-Net's detail branch: y = x + angular(x), out = central(y); two depthwise blocks without bias.

    Parameters: `angular.pdc.weight`, `central.pdc.weight` [C, 1, 3, 3]; `angular.point.weight`,
    `central.point.weight` [C, C, 1, 1]. Input and output [B, C, H, W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.angular = PDCBlock2d(channels, channels, kind="angular", residual=True)
        self.central = PDCBlock2d(channels, channels, kind="central")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.central(self.angular(x))
