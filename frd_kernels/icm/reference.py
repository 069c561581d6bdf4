"""Cosine clustering and the ICM in plain PyTorch: the oracle of the kernels, and the explicit fallback.

Everything is dense and written for reading. Computes in float32 for 16-bit inputs, else in the input's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F

EPS = 1e-12  # a norm below it counts as zero

_Function = TypeVar("_Function", bound=Callable[..., object])

Scalar = float | torch.Tensor
Projection = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]


class ClusterResult(NamedTuple):
    """Centres [B, O, C], labels [B, N] int64, similarity [B, N] of a token with its own centre, counts [B, O]
    int32.

    The similarity has the dtype the computation ran in: float32 for 16-bit inputs, else the input's.
    """

    centres: torch.Tensor
    labels: torch.Tensor
    similarity: torch.Tensor
    counts: torch.Tensor


class _Round(NamedTuple):
    centres: torch.Tensor  # [B, O, C]
    similarity: torch.Tensor  # [B, N, O]: raw cosines, or their sigmoids
    labels: torch.Tensor  # [B, N]
    own: torch.Tensor  # [B, N]: similarity with the own centre
    counts: torch.Tensor  # [B, O]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and similarities are kept in for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """rows / max(||row||, EPS) over the last dimension; a row of (almost) no length passes no gradient."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(norm <= EPS, (rows / EPS).detach(), rows / norm.clamp_min(EPS))


def pool(tokens: torch.Tensor, hw: Sequence[int], grid: Sequence[int]) -> torch.Tensor:
    """Tokens [B, H*W, C] -> bin means [B, O, C]; bins, which may overlap, as in adaptive_avg_pool2d."""
    image = tokens.transpose(1, 2).unflatten(2, tuple(hw))
    return F.adaptive_avg_pool2d(image, (grid[0], grid[1])).flatten(2).transpose(1, 2)


def _cluster_round(
    keys: torch.Tensor,
    values: torch.Tensor,
    grid: Sequence[int],
    hw: Sequence[int],
    gate: tuple[torch.Tensor, torch.Tensor] | None,
) -> _Round:
    """One round of clustering.

    gate: None for raw cosines and means over counts; (alpha, beta), scalars, for the similarities
    sigmoid(beta + alpha * cosine), which then weigh the means.
    """
    similarity = unit_rows(keys) @ unit_rows(pool(keys, hw, grid)).transpose(1, 2)
    if gate is not None:
        alpha, beta = gate
        similarity = torch.sigmoid(beta + alpha * similarity)
    labels = similarity.argmax(dim=-1)
    own = similarity.gather(2, labels.unsqueeze(2)).squeeze(2)
    ones = torch.ones_like(own)
    weights = ones if gate is None else own

    # A sum by index, not a product with the one-hot mask: 0 * NaN would spread a NaN to every centre.
    centres = pool(values, hw, grid)
    rows = labels.unsqueeze(2).expand_as(values)
    total = torch.zeros_like(centres[..., 0])
    sums = torch.zeros_like(centres).scatter_add(1, rows, weights.unsqueeze(2) * values)
    mass = total.scatter_add(1, labels, weights)
    centres = (centres + sums) / (1 + mass).unsqueeze(2)
    counts = total.detach().scatter_add(1, labels, ones.detach())
    return _Round(centres, similarity, labels, own, counts)


def _outside_autocast(function: _Function) -> _Function:
    """The function with autocast off: its precision is its own."""

    @functools.wraps(function)
    def wrapped(x: torch.Tensor, *args: object, **kwargs: object) -> object:
        if not torch.amp.is_autocast_available(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _scalar(value: Scalar, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


@_outside_autocast
def cluster(
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Sequence[int],
    hw: Sequence[int],
    *,
    aggregate: str = "count",
    alpha: Scalar = 1.0,
    beta: Scalar = 0.0,
) -> ClusterResult:
    """`frd_kernels.cluster` in plain PyTorch."""
    keys, values = k.to(compute_dtype(k.dtype)), v.to(compute_dtype(v.dtype))
    gate = None
    if aggregate == "similarity":
        gate = _scalar(alpha, keys).reshape(()), _scalar(beta, keys).reshape(())
    found = _cluster_round(keys, values, grid, hw, gate)
    return ClusterResult(found.centres.to(v.dtype), found.labels, found.own, found.counts.to(torch.int32))


def _project(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(tokens, weight.to(tokens.dtype), None if bias is None else bias.to(tokens.dtype))


@_outside_autocast
def icm(
    x: torch.Tensor,
    projections: Sequence[Projection | None] | None,
    *,
    variant: str = "paper",
    alpha: Scalar,
    beta: Scalar,
    grids: Sequence[Sequence[int]] = ((8, 8), (4, 4), (2, 1)),
    hw: Sequence[int],
) -> torch.Tensor:
    """`frd_kernels.icm` in plain PyTorch."""
    tokens = x.to(compute_dtype(x.dtype))
    count = len(grids)
    paper = variant == "paper"
    alphas = _scalar(alpha, tokens).expand(1 if paper else count)
    betas = _scalar(beta, tokens).expand(1 if paper else count)
    rounds = []
    for t, grid in enumerate(grids):
        projection = None if projections is None else projections[t]
        keys = values = tokens
        if projection is not None:
            keys = _project(tokens, projection[0], projection[1])
            values = _project(tokens, projection[2], projection[3])
        rounds.append(_cluster_round(keys, values, grid, hw, None if paper else (alphas[t], betas[t])))
        tokens, hw = rounds[-1].centres, grid
    return (_dense_dispatch(rounds, alphas, betas) if paper else _masked_dispatch(rounds)).to(x.dtype)


def _dense_dispatch(rounds: list[_Round], alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """sigmoid(alpha * (M1 M2 ... MT) + beta) R_T, Eq. 4 of the paper."""
    product = rounds[0].similarity
    for found in rounds[1:]:
        product = product @ found.similarity
    return torch.sigmoid(alpha * product + beta) @ rounds[-1].centres


def _masked_dispatch(rounds: list[_Round]) -> torch.Tensor:
    """The authors' code: the product of the similarities, each masked to the own centre, times R_T.

    A masked matrix has one entry a row, so the product follows each token's chain of centres.
    """
    weight, centre = rounds[0].own, rounds[0].labels
    for found in rounds[1:]:
        weight = weight * found.own.gather(1, centre)
        centre = found.labels.gather(1, centre)
    last = rounds[-1].centres
    return weight.unsqueeze(2) * last.gather(1, centre.unsqueeze(2).expand(-1, -1, last.size(2)))
