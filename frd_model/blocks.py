"""The FRD block: a mixer of macro (ICM) and micro (DPM) relations, then an MLP, both residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

import frd_kernels as fk

# The dense form of a round, which the fused operator never stores.
from frd_kernels.cluster.reference import cluster_densely, dispatch_densely

from .config import FRDNetConfig


def make_norm(kind: str, channels: int) -> nn.Module:
    """The normalisation of an FRD block: ``"group"`` has one group, so it does not depend on the batch."""
    if kind == "group":
        return nn.GroupNorm(1, channels)
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.Identity()


class DivergentICM(fk.ICM):
    """The ICM of the paper's text: of the last round's centres only the two most divergent reach the pixels.

    sigmoid(alpha * (M1 ... MT)[:, pair] + beta) R_T[pair], with `pair` the rows of R_T of the lowest mutual cosine, of
    equal ones the first in reading order; no gradient flows through the choice. The parameters are those of
    :class:`frd_kernels.ICM` without its round of two centres. Plain PyTorch, with the cosines [B, N, O] of each round
    in memory: the fused operator `icm` is not used.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        height, width = x.shape[2], x.shape[3]
        hw: tuple[int, int] = height, width
        tokens, matrices = x.flatten(2).transpose(1, 2), []
        for project, grid in zip(self.rounds, self.grids, strict=True):
            keys, values = project(tokens)
            tokens, matrix = cluster_densely(keys, values, grid, hw)
            matrices.append(matrix)
            hw = grid
        out = dispatch_pair(tokens, matrices, self.alpha, self.beta)
        return torch.unflatten(out.transpose(1, 2), 2, (height, width))


def dispatch_pair(centres: Tensor, matrices: Sequence[Tensor], alpha: Tensor, beta: Tensor) -> Tensor:
    """Eq. 4 with the two most divergent centres alone. centres [B, O, C], matrices as M_1 ... M_T -> [B, N, C]."""
    pair = most_divergent(centres).unsqueeze(2)
    last = matrices[-1].gather(2, pair.mT.expand(-1, matrices[-1].shape[1], -1))
    kept = centres.gather(1, pair.expand(-1, -1, centres.shape[2]))
    return dispatch_densely(kept, [*matrices[:-1], last], alpha, beta)


def most_divergent(centres: Tensor) -> Tensor:
    """Indices i < j of the two centres of the lowest mutual cosine. [B, O, C], O >= 2 -> int64 [B, 2]."""
    unit = F.normalize(centres.detach().float(), dim=2, eps=1e-12)
    pairs = torch.triu_indices(centres.shape[1], centres.shape[1], 1, device=centres.device)
    # Not a matrix product, which autocast would round to 16 bit.
    first = (unit[:, pairs[0]] * unit[:, pairs[1]]).sum(dim=2).argmin(dim=1)
    return pairs.mT[first]


# Leaves of a torch.fx graph, which has no sizes.
for _name in ("cluster_densely", "dispatch_pair"):
    torch.fx.wrap(_name)


def make_icm(channels: int, config: FRDNetConfig) -> nn.Module:
    """The clustering half of a mixer, or the identity if the configuration switches it off."""
    if not config.icm:
        return nn.Identity()
    icm: fk.ICM
    if config.icm_centres == "divergent":
        icm = DivergentICM(channels, grids=config.grids[:-1])
    else:
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
