"""`ICM`, FRD-Net's iterative clustering, as a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.fx
from torch import nn

# Some tools replace `nn.Linear` by a class of their own.
from torch.nn.modules.linear import Linear

from .._inner import has_global_hooks, is_plain
from .._numbers import parse_count
from . import api
from .reference import Projection, cluster_densely, dispatch_densely


class _Projections(nn.Module):
    """The 1x1 projections f and v of one round, over the last dimension."""

    def __init__(self, channels: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.key = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.value = nn.Linear(channels, channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        for module in (self.key, self.value):
            # It may have been replaced by another module.
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [B, N, C] -> keys [B, N, C], values [B, N, C]."""
        return self.key(tokens), self.value(tokens)

    def tensors(self) -> Projection | None:
        """The parameters, if a call of the module computes with them and does nothing else; else None."""
        # `nn.Module.__getattr__` takes ten times as long.
        modules = self._modules
        key, value = modules.get("key"), modules.get("value")
        if not (is_plain(self, _Projections) and is_plain(key, Linear) and is_plain(value, Linear)):
            return None
        return key.weight, key.bias, value.weight, value.bias


def _is_image(tokens: torch.Tensor) -> bool:
    return tokens.stride(1) == 1


def _laid_out(tokens: torch.Tensor, channels_first: bool) -> torch.Tensor:
    return tokens.transpose(1, 2).contiguous().transpose(1, 2) if channels_first else tokens


# Leaves of a torch.fx graph: they look at layouts, which are unknown while it is traced.
for _name in ("_is_image", "_laid_out", "cluster_densely", "dispatch_densely"):
    torch.fx.wrap(_name)


class ICM(nn.Module):
    """FRD-Net's clustering module: `icm` over an image, each round with its own key and value projections.

    The 1x1 projection that follows it in FRD-Net is not part of it.

    It is one kernel as long as the projections are unmodified. If hooks, an adapter or a parametrization are attached
    to one of them or to its round, or it is replaced by another module, `rounds[t]` are called with tokens [B, N, C],
    and `cluster` runs after each.

    Args:
        channels: C of the input and of the output.
        grids: centres per axis (rows, columns) of each round.
        variant: "paper" (Eq. 1 to 4) or "released" (the authors' code); see `icm`.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        rounds: per round, `key` and `value` (nn.Linear(C, C)).
        alpha: "paper": [1], initially 1 / (O_1 * ... * O_(T-1)). The entries of M1 M2 ... MT are sums of that many
            products of cosines, and as large if the centres are alike; alpha = 1 would saturate the sigmoid, whose
            gradient would vanish. "released": [T], initially 1. State dicts of older versions, in which "paper" had
            0-dimensional tensors, load.
        beta: of alpha's shape, initially 0.
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
        channels = parse_count(channels, "channels")
        if variant not in api.VARIANTS:
            raise ValueError(f"variant must be 'paper' or 'released', got {variant!r}")
        if len(grids) == 0:
            raise ValueError("grids must hold at least one (rows, columns), got none")
        self.channels, self.variant = channels, variant
        for grid in grids:
            api.check_grid(grid, "grids")
        self.grids = tuple((int(rows), int(columns)) for rows, columns in grids)
        self.rounds = nn.ModuleList(_Projections(channels, device, dtype) for _ in self.grids)
        # Not 0-dimensional: FSDP shards the first dimension.
        gates = 1 if variant == "paper" else len(self.grids)
        self.alpha = nn.Parameter(torch.empty(gates, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(gates, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the parameters to their initial values."""
        for projections in self.rounds:
            cast(_Projections, projections).reset_parameters()
        terms = math.prod(rows * columns for rows, columns in self.grids[:-1])
        nn.init.constant_(self.alpha, 1 / terms if self.variant == "paper" else 1.0)
        nn.init.zeros_(self.beta)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("alpha", "beta"):
            value = state_dict.get(prefix + name)
            if isinstance(value, torch.Tensor) and value.dim() == 0 and self.variant == "paper":
                state_dict[prefix + name] = value.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.channels}, grids={self.grids}, variant={self.variant!r}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        projections = self._projections()
        if projections is not None:
            options = {"variant": self.variant, "alpha": self.alpha, "beta": self.beta, "grids": self.grids}
            return api.icm_of_image(x, self.channels, projections, **options)
        api.check_channels(x, self.channels)
        height, width = x.shape[2:]
        out = self._composed(x.flatten(2).transpose(1, 2), (height, width))
        return torch.unflatten(out.transpose(1, 2), 2, (height, width))

    def _projections(self) -> list[Projection] | None:
        """The arguments of `icm`, if calls of the rounds would compute the same, with nothing attached; else None."""
        if has_global_hooks():
            return None
        found = [p.tensors() if isinstance(p, _Projections) else None for p in self.rounds]
        given = [tensors for tensors in found if tensors is not None]
        return given if len(given) == len(found) else None

    def _composed(self, x: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
        """`icm` of tokens [B, N, C] by calls of the rounds."""
        tokens, last = x.contiguous(), _is_image(x)
        if self.variant == "paper":
            matrices = []
            for projections, grid in zip(self.rounds, self.grids, strict=True):
                keys, values = projections(tokens)
                tokens, matrix = cluster_densely(keys, values, grid, hw)
                matrices.append(matrix)
                hw = grid
            return _laid_out(dispatch_densely(tokens, matrices, self.alpha, self.beta), last)
        found = []
        alphas, betas = self.alpha.expand(len(self.grids)), self.beta.expand(len(self.grids))
        for t, (projections, grid) in enumerate(zip(self.rounds, self.grids, strict=True)):
            keys, values = projections(tokens)
            gates: dict[str, Any] = {"alpha": alphas[t], "beta": betas[t]}
            clusters = api.cluster(keys, values, grid, hw, aggregate="similarity", **gates)
            found.append(clusters)
            tokens, hw = clusters.centres, grid
        labels, similarity = found[0].labels, found[0].similarity
        for clusters in found[1:]:
            similarity = similarity * clusters.similarity.gather(1, labels)
            labels = clusters.labels.gather(1, labels)
        return api.dispatch(tokens, labels, similarity, channels_first=last)
