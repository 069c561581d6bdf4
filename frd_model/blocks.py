"""The FRD block: a mixer of macro (ICM) and micro (DPM) relations, then an MLP, both residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frd_kernels as fk

from .config import FRDNetConfig


def make_norm(kind: str, channels: int) -> nn.Module:
    """The normalisation of an FRD block: ``"group"`` has one group, so it does not depend on the batch."""
    if kind == "group":
        return nn.GroupNorm(1, channels)
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.Identity()


def make_icm(channels: int, config: FRDNetConfig) -> nn.Module:
    """The clustering half of a mixer, or the identity if the configuration switches it off."""
    if not config.icm:
        return nn.Identity()
    icm = fk.ICM(channels, grids=config.grids, variant=config.variant)
    if config.icm_alpha is not None:
        nn.init.constant_(icm.alpha, config.icm_alpha)
    return icm


def make_dpm(channels: int, config: FRDNetConfig) -> nn.Module:
    """The pixel difference half of a mixer: a DPM, one of its two blocks, or the identity."""
    if not config.dpm:
        return nn.Identity()
    if config.angular and config.central:
        return fk.DPM(channels)
    if config.angular:
        return fk.PDCBlock2d(channels, channels, kind="angular", residual=True)
    return fk.PDCBlock2d(channels, channels, kind="central")


class Mixer(nn.Module):
    """1x1 conv, split into halves, ICM and 1x1 conv on one, DPM on the other, concat, 1x1 conv.

    [B, C, h, w] -> [B, C, h, w].
    """

    def __init__(self, channels: int, config: FRDNetConfig) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"channels: the mixer halves them, an even number is needed, got {channels}")
        half = channels // 2
        self.enter = nn.Conv2d(channels, channels, 1)
        self.icm = make_icm(half, config)
        self.macro = nn.Conv2d(half, half, 1) if config.icm else nn.Identity()
        self.dpm = make_dpm(half, config)
        self.leave = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        macro, micro = self.enter(x).chunk(2, dim=1)
        return self.leave(torch.cat((self.macro(self.icm(macro)), self.dpm(micro)), dim=1))


class MLP(nn.Module):
    """Two 1x1 convolutions with a GELU between them. [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class FRDBlock(nn.Module):
    """Residual mixer and residual MLP, each pre-normalised and scaled, then one more norm.

    [B, C, h, w] -> [B, C, h, w]: ``x + s1 * Mixer(norm(x))``, then ``x + s2 * MLP(norm(x))``, then norm.
    """

    def __init__(self, channels: int, config: FRDNetConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(config.norm, channels)
        self.mixer = Mixer(channels, config)
        self.norm2 = make_norm(config.norm, channels)
        self.mlp = MLP(channels, max(1, round(channels * config.mlp_ratio)))
        self.norm_out = make_norm(config.norm if config.block_norm else "none", channels)
        scale = config.layer_scale
        self.scale1 = None if scale is None else nn.Parameter(torch.full((channels,), float(scale)))
        self.scale2 = None if scale is None else nn.Parameter(torch.full((channels,), float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + _scaled(self.mixer(self.norm1(x)), self.scale1)
        x = x + _scaled(self.mlp(self.norm2(x)), self.scale2)
        return self.norm_out(x)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.view(-1, 1, 1)
