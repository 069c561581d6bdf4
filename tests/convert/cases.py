"""Foreign PDC layers, restated by their formulas (shared/reference/pdc.md), for the tests of `convert`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import frd_kernels as fk
from frd_kernels.convert import Report, fold

from ..pdc.cases import eager

OPS = {"cv": "vanilla", "cd": "central", "ad": "angular", "rd": "radial"}


def pidinet_function(op: str, theta: float = 1.0) -> Callable[..., torch.Tensor]:
    """A closure over op and theta with PiDiNet's traits: radial pads by itself and knows float32 only."""

    def func(
        x: torch.Tensor,
        weights: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        if op == "rd":
            if weights.dtype != torch.float32:
                raise RuntimeError("Index put requires the source and destination dtypes match")
            padding = dilation
        elif op != "cv" and padding != dilation:
            raise AssertionError("padding set wrong")
        options: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }
        return eager(x, weights, bias, kind=OPS[op], theta=theta, **options)

    return func


class PiDiNetConv(nn.Module):
    """PiDiNet's layer: a weight, a bias or none, and the function that uses them, `pdc`."""

    def __init__(
        self,
        pdc: Callable[..., torch.Tensor],
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        padding: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // groups, 3, 3))
        self.register_parameter("bias", nn.Parameter(torch.randn(out_channels)) if bias else None)
        self.pdc = pdc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pdc(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class CDCNConv(nn.Module):
    """CDCN's layer: conv(x) - theta times a 1x1 convolution of the summed weight, each with the bias."""

    def __init__(self, in_channels: int, out_channels: int, theta: float = 0.7, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, **{"padding": 1, "bias": False} | options)
        self.theta = theta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        centre = conv.weight.sum((2, 3), keepdim=True)
        return conv(x) - self.theta * F.conv2d(x, centre, conv.bias, conv.stride, groups=conv.groups)


class Branch(nn.Module):
    """A branch of DEA-Net's layer: it holds a convolution, whose weight its owner uses."""

    def __init__(self, conv: nn.Module, theta: float = 1.0) -> None:
        super().__init__()
        self.conv, self.theta = conv, theta


class DEConv(nn.Module):
    """DEA-Net's layer as five convolutions of the same image, added."""

    def __init__(self, channels: int, theta: float = 1.0) -> None:
        super().__init__()
        self.conv1_1 = Branch(nn.Conv2d(channels, channels, 3, padding=1))
        self.conv1_2 = Branch(nn.Conv1d(channels, channels, 3, padding=1))
        self.conv1_3 = Branch(nn.Conv1d(channels, channels, 3, padding=1))
        self.conv1_4 = Branch(nn.Conv2d(channels, channels, 3, padding=1), theta)
        self.conv1_5 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1_5(x)
        for branch, kind in ((self.conv1_1, "central"), (self.conv1_4, "angular")):
            theta = branch.theta if kind == "angular" else 1.0
            out = out + eager(x, branch.conv.weight, branch.conv.bias, kind=kind, theta=theta, padding=1)
        padded = F.pad(x, (1, 1, 1, 1))
        across = padded[..., :-2] - padded[..., 2:]  # left minus right neighbour
        out = out + F.conv2d(across, self.conv1_2.conv.weight[..., None], self.conv1_2.conv.bias)
        along = padded[..., :-2, :] - padded[..., 2:, :]  # upper minus lower neighbour
        return out + F.conv2d(along, self.conv1_3.conv.weight[..., None, :], self.conv1_3.conv.bias)


def randomised(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters of batch norms as after training, none of them trivial."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def folded(model: nn.Module) -> tuple[nn.Module, Report]:
    """The fold of the model in float64, checked to be exact on a random image of six channels."""
    model = randomised(model).double()
    report = Report()
    plain = fold(model, report)
    assert not plain.training and not any(isinstance(m, fk.PDC2d | fk.PDCBlock2d) for m in plain.modules())
    assert_same(model, plain)
    return plain, report


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    x = torch.randn(2, 6, 11, 10, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), copy.deepcopy(model).eval()(x), rtol=0, atol=1e-12)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def notes(report: Report) -> dict[str, str]:
    return {entry.name: f"{entry.result}: {entry.note}" for entry in report}
