"""Cosine clustering and the ICM in plain PyTorch: the oracle of the kernels, and the explicit fallback.

Everything is dense and written for reading. Computes in float32 for 16-bit inputs, else in the input's dtype.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from .._autocast import has_autocast
from .._torch_internals import is_tracing

_FROZEN = (
    "clustering: torch.onnx.export(dynamo=False) fixes the batch and the sides that it traces, whatever dynamic_axes "
    "says; dynamo=True with dynamic_shapes keeps them dynamic"
)
EPS = 1e-12  # a norm below it counts as zero

_Function = TypeVar("_Function", bound=Callable[..., object])

Scalar = float | torch.Tensor
Projection = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]


class ClusterResult(NamedTuple):
    """Centres [B, O, C], labels [B, N] int64, similarity [B, N] of a token with its own centre, counts [B, O]
    int32.

    A masked token has the label -1 and the similarity 0. The similarity has the dtype the computation ran in:
    float32 for 16-bit inputs, else the input's.
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


def pool(
    tokens: torch.Tensor, hw: Sequence[int], grid: Sequence[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens [B, H*W, C] -> bin means [B, O, C]; bins, which may overlap, as in adaptive_avg_pool2d.

    mask [B, H*W]: of the tokens where it is true; the others are zeros already. A bin without any gives 0.
    """
    if all(type(side) is int and side == 1 for side in grid):
        # torch restrides its own mean of one bin in place, which vmap does not batch.
        means = tokens.mean(1, keepdim=True)
    elif torch.compiler.is_exporting():
        image = torch.unflatten(tokens, 1, tuple(hw))
        means = _bin_means(_bin_means(image, 1, grid[0]), 2, grid[1]).flatten(1, 2)
    else:
        if is_tracing() and torch.onnx.is_in_onnx_export():
            warnings.warn(_FROZEN, stacklevel=2)
        image = torch.unflatten(tokens.transpose(1, 2), 2, tuple(hw))
        means = F.adaptive_avg_pool2d(image, (grid[0], grid[1])).flatten(2).transpose(1, 2)
    if mask is None:
        return means
    part = pool(mask.unsqueeze(2).to(tokens.dtype), hw, grid)
    return means / torch.where(part > 0, part, 1)


def _bin_means(image: torch.Tensor, dim: int, bins: int) -> torch.Tensor:
    """Means over adaptive_avg_pool2d's bins along one dimension, by indices that are computed from its size.

    For exported graphs: decomposed, adaptive_avg_pool2d keeps the bins of the size that was traced.
    """
    size = image.size(dim)
    edges = torch.arange(bins + 1, device=image.device) * size
    starts, ends = edges[:-1] // bins, (edges[1:] + (bins - 1)) // bins
    longest = size // bins + 2
    index = starts.unsqueeze(1) + torch.arange(longest, device=image.device)
    inside = index < ends.unsqueeze(1)
    pixels = image.index_select(dim, index.clamp_max(size - 1).flatten())
    behind = (1,) * (image.dim() - dim - 1)
    pixels = torch.where(
        inside.view(bins, longest, *behind), torch.unflatten(pixels, dim, (bins, longest)), 0
    )
    return pixels.sum(dim + 1) / (ends - starts).view(bins, *behind)


def select(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Tokens [B, N, C] with zeros for those that take no part: what they hold, a NaN too, is without effect."""
    return tokens if mask is None else torch.where(mask.unsqueeze(2), tokens, 0)


def cosines(
    keys: torch.Tensor, hw: Sequence[int], grid: Sequence[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Of the keys [B, N, C] with their pooled centres: [B, N, O]. mask [B, N] as in `pool`."""
    return unit_rows(keys) @ unit_rows(pool(keys, hw, grid, mask)).transpose(1, 2)


def _cluster_round(
    keys: torch.Tensor,
    values: torch.Tensor,
    grid: Sequence[int],
    hw: Sequence[int],
    gate: tuple[torch.Tensor, torch.Tensor] | None,
    order: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> _Round:
    """One round of clustering.

    gate: None for raw cosines and means over counts; (alpha, beta), scalars, for the similarities
    sigmoid(beta + alpha * cosine), which then weigh the means.
    order: without a gate, a scalar whose sign the cosines take for the arg-max.
    mask: [B, N], the tokens that take part.
    """
    keys, values = select(keys, mask), select(values, mask)
    similarity = cosines(keys, hw, grid, mask)
    if gate is not None:
        alpha, beta = gate
        similarity = torch.sigmoid(beta + alpha * similarity)
    labels = (similarity if order is None else order.sign() * similarity).argmax(dim=-1)
    own = similarity.gather(2, labels.unsqueeze(2)).squeeze(2)
    part = torch.ones_like(own)
    if mask is not None:
        part, own = mask.to(own.dtype), torch.where(mask, own, 0)
    weights = part if gate is None else own

    # A sum by index, not a product with the one-hot mask: 0 * NaN would spread a NaN to every centre.
    centres = pool(values, hw, grid, mask)
    rows = labels.unsqueeze(2).expand_as(values)
    total = torch.zeros_like(centres[..., 0])
    sums = torch.zeros_like(centres).scatter_add(1, rows, weights.unsqueeze(2) * values)
    mass = total.scatter_add(1, labels, weights)
    centres = (centres + sums) / (1 + mass).unsqueeze(2)
    counts = total.detach().scatter_add(1, labels, part.detach())
    if mask is not None:
        labels = labels.masked_fill(~mask, -1)
    return _Round(centres, similarity, labels, own, counts)


def _outside_autocast(function: _Function) -> _Function:
    """The function with autocast off: its precision is its own."""

    @functools.wraps(function)
    def wrapped(x: torch.Tensor, *args: object, **kwargs: object) -> object:
        if not has_autocast(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _scalar(value: Scalar, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(dtype=like.dtype, device=like.device)
    return torch.full((), value, dtype=like.dtype, device=like.device)


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
    mask: torch.Tensor | None = None,
) -> ClusterResult:
    """`frd_kernels.cluster` in plain PyTorch."""
    keys, values = k.to(compute_dtype(k.dtype)), v.to(compute_dtype(v.dtype))
    slope = _scalar(alpha, keys).reshape(())
    if aggregate == "similarity":
        gate = slope, _scalar(beta, keys).reshape(())
        found = _cluster_round(keys, values, grid, hw, gate, mask=mask)
    else:
        found = _cluster_round(keys, values, grid, hw, None, slope.detach(), mask)
    # The backward needs what it keeps of labels and similarities: the caller's are his own to write into.
    labels, own = found.labels.clone(), found.own.clone()
    return ClusterResult(found.centres.to(v.dtype), labels, own, found.counts.to(torch.int32))


@_outside_autocast
def dispatch(
    centres: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor, *, channels_first: bool = False
) -> torch.Tensor:
    """`frd_kernels.dispatch` in plain PyTorch."""
    dtype = compute_dtype(centres.dtype)
    part = (labels >= 0).unsqueeze(2)
    index = labels.long().clamp_min(0).unsqueeze(2).expand(-1, -1, centres.size(2))
    # Both factors are selected: 0 * NaN is NaN, and so is its gradient.
    rows = torch.where(part, centres.to(dtype).gather(1, index), 0)
    out = (torch.where(part, similarity.to(dtype).unsqueeze(2), 0) * rows).to(centres.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2) if channels_first else out


@_outside_autocast
def dispatch_to_all(
    keys: torch.Tensor,
    centres: torch.Tensor,
    grid: Sequence[int],
    hw: Sequence[int],
    alpha: Scalar,
    beta: Scalar,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every token gets all centres, each times sigmoid(beta + alpha * cosine), instead of its own one.

    keys [B, N, C], centres [B, O, C], mask [B, N] -> [B, N, C]. The [B, N, O] similarities are stored.
    """
    dtype = compute_dtype(keys.dtype)
    cosine = cosines(select(keys.to(dtype), mask), hw, grid, mask)
    similarity = torch.sigmoid(_scalar(beta, cosine) + _scalar(alpha, cosine) * cosine)
    return select((similarity @ centres.to(dtype)).to(centres.dtype), mask)


@_outside_autocast
def cluster_densely(
    keys: torch.Tensor, values: torch.Tensor, grid: Sequence[int], hw: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A round with raw cosines and means over counts: the centres [B, O, C], and all cosines [B, N, O]."""
    dtype = compute_dtype(keys.dtype)
    found = _cluster_round(keys.to(dtype), values.to(dtype), grid, hw, None)
    return found.centres.to(values.dtype), found.similarity


@_outside_autocast
def dispatch_densely(
    last: torch.Tensor, matrices: Sequence[torch.Tensor], alpha: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """sigmoid(alpha * (M1 M2 ... MT) + beta) R_T, Eq. 4 of the paper.

    last: R_T [B, O_T, C], the last centres; matrices: of each round, its cosines M_t [B, N_t, O_t]; alpha, beta [1].
    -> [B, N_1, C].
    """
    product = functools.reduce(torch.matmul, matrices)
    alpha, beta = _scalar(alpha, product), _scalar(beta, product)
    return (torch.sigmoid(alpha * product + beta) @ last.to(product.dtype)).to(last.dtype)


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
    if paper:
        out = dispatch_densely(tokens, [found.similarity for found in rounds], alphas, betas)
    else:
        out = _masked_dispatch(rounds)
    return out.to(x.dtype)


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
