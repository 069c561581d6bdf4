"""The ICM as a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from . import api
from .reference import Projection


class _Projections(nn.Module):
    """The 1x1 projections f and v of one round, over the last dimension."""

    def __init__(self, channels: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.key = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.value = nn.Linear(channels, channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.key.reset_parameters()
        self.value.reset_parameters()

    def tensors(self) -> Projection:
        return self.key.weight, self.key.bias, self.value.weight, self.value.bias


class ICM(nn.Module):
    """FRD-Net's clustering module: `icm` over an image, each round with its own key and value projections.

    The 1x1 projection behind the module is not part of it.

    Args:
        channels: C of the input and of the output.
        grids: centres per axis (rows, columns) of each round.
        variant: "paper" (Eq. 1 to 4) or "released" (the authors' code); see `icm`.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        rounds: per round, `key` and `value` (nn.Linear(C, C)).
        alpha: "paper": a scalar, initially 1 / (O_1 * ... * O_(T-1)). The entries of M1 M2 ... MT are sums of
            that many products of cosines and reach it where the centres are alike, so alpha = 1 would
            saturate the sigmoid and stop its gradient. "released": [T], initially 1.
        beta: shaped as alpha, initially 0.
    """

    def __init__(
        self,
        channels: int,
        grids: Sequence[Sequence[int]] = ((8, 8), (4, 4), (2, 1)),
        variant: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        if variant not in api.VARIANTS:
            raise ValueError(f"variant must be 'paper' or 'released', got {variant!r}")
        if len(grids) == 0:
            raise ValueError("grids must hold at least one (rows, columns), got none")
        self.channels, self.variant = channels, variant
        self.grids = tuple((int(rows), int(columns)) for rows, columns in grids)
        self.rounds = nn.ModuleList(_Projections(channels, device, dtype) for _ in self.grids)
        shape = () if variant == "paper" else (len(self.grids),)
        self.alpha = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the parameters to their initial values."""
        for projections in self.rounds:
            cast(_Projections, projections).reset_parameters()
        terms = math.prod(rows * columns for rows, columns in self.grids[:-1])
        nn.init.constant_(self.alpha, 1 / terms if self.variant == "paper" else 1.0)
        nn.init.zeros_(self.beta)

    def extra_repr(self) -> str:
        return f"{self.channels}, grids={self.grids}, variant={self.variant!r}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        if x.dim() != 4 or x.size(1) != self.channels:
            raise ValueError(f"x must be [B, {self.channels}, H, W], got {list(x.shape)}")
        height, width = x.shape[2:]
        projections = [cast(_Projections, p).tensors() for p in self.rounds]
        out = api.icm(
            x.flatten(2).transpose(1, 2),
            projections,
            variant=self.variant,
            alpha=self.alpha,
            beta=self.beta,
            grids=self.grids,
            hw=(height, width),
        )
        return torch.unflatten(out.transpose(1, 2), 2, (height, width))
