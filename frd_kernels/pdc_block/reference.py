"""The PDC block in plain PyTorch: the oracle of the tests and the backend "reference"."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._torch_internals import untraced
from ..pdc import reference as pdc_reference
from ..pdc.arguments import IntOrPair


def pdc_block(
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    point_weight: torch.Tensor,
    *,
    kind: str,
    theta: float = 1.0,
    stride: IntOrPair = 1,
    dilation: IntOrPair = 1,
    residual: torch.Tensor | None = None,
    pdc_bias: torch.Tensor | None = None,
    point_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """conv1x1(relu(pdc2d(x))) + residual, padding = dilation. Arguments and errors: `frd_kernels.pdc_block`.

    x [B, C, H, W]; pdc_weight [C, 1, 3, 3] (depthwise) or [Ch, C / groups, 3, 3];
    point_weight [Co, Ch, 1, 1]; residual and result [B, Co, Ho, Wo].
    """
    hidden = pdc_reference.pdc2d(
        x,
        pdc_weight,
        pdc_bias,
        kind=kind,
        theta=theta,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=untraced(_groups, x, pdc_weight),
    )
    out = F.conv2d(F.relu(hidden), point_weight, point_bias)
    return out if residual is None else out + residual


def _groups(x: torch.Tensor, pdc_weight: torch.Tensor) -> int:
    return x.shape[1] // pdc_weight.shape[1]


def dpm(
    x: torch.Tensor, angular: tuple[torch.Tensor, torch.Tensor], central: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """FRD-Net's detail branch, central(x + angular(x)): [B, C, H, W] -> [B, C, H, W].

    Each pair is (pdc_weight [C, 1, 3, 3], point_weight [C, C, 1, 1]).
    """
    y = pdc_block(x, *angular, kind="angular", residual=x)
    return pdc_block(y, *central, kind="central")
