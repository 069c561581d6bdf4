"""Cosine clustering and the ICM in plain PyTorch: the oracle of the tests and the backend "reference".

Written for reading, with all N x O similarities in memory. Computes in float32 for 16-bit inputs, else in their dtype.
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
from .saved import compute_dtype

_FROZEN = (
    "clustering: torch.onnx.export(dynamo=False) fixes the batch, height and width that it traces, whatever "
    "dynamic_axes says; dynamo=True with dynamic_shapes keeps them dynamic"
)
# A norm up to this counts as zero.
EPS = 1e-12

_Function = TypeVar("_Function", bound=Callable[..., object])

Scalar = float | torch.Tensor
Projection = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]


class ClusterResult(NamedTuple):
    """The result of `cluster`.

    Attributes:
        centres: [B, O, C].
        labels: int64 [B, N], the assigned centre of each token; -1 for a masked one.
        similarity: [B, N], of each token with its assigned centre; 0 for a masked one. float32 for 16-bit inputs, else
            in their dtype.
        counts: int32 [B, O], the tokens of each centre.
    """

    centres: torch.Tensor
    labels: torch.Tensor
    similarity: torch.Tensor
    counts: torch.Tensor


class _Round(NamedTuple):
    """centres [B, O, C], similarity [B, N, O] (cosines or their sigmoids), labels [B, N], assigned [B, N] (the
    similarity with the assigned centre), counts [B, O]."""

    centres: torch.Tensor
    similarity: torch.Tensor
    labels: torch.Tensor
    assigned: torch.Tensor
    counts: torch.Tensor


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """row / max(||row||, EPS) along the last dimension. Rows of norm zero, up to EPS, pass no gradient."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(norm <= EPS, (rows / EPS).detach(), rows / norm.clamp_min(EPS))


def pool(
    tokens: torch.Tensor, hw: Sequence[int], grid: Sequence[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens [B, H*W, C] -> bin means [B, O, C] over the bins of adaptive_avg_pool2d, which may overlap.

    With a mask [B, H*W], means over the tokens where it is true; the others must be zeros. An empty bin gives 0.
    """
    if all(type(n) is int and n == 1 for n in grid):
        # For one bin adaptive_avg_pool2d changes strides in place, which vmap does not support.
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
    fraction = pool(mask.unsqueeze(2).to(tokens.dtype), hw, grid)
    return means / torch.where(fraction > 0, fraction, 1)


def _bin_means(image: torch.Tensor, dim: int, bins: int) -> torch.Tensor:
    """Means over the bins of adaptive_avg_pool2d along one dimension, by indices computed from its size.

    For exported graphs, in which a decomposed adaptive_avg_pool2d keeps the bins of the size that was traced.
    """
    size = image.size(dim)
    edges = torch.arange(bins + 1, device=image.device) * size
    starts, ends = edges[:-1] // bins, (edges[1:] + (bins - 1)) // bins
    longest = size // bins + 2
    index = starts.unsqueeze(1) + torch.arange(longest, device=image.device)
    inside = index < ends.unsqueeze(1)
    pixels = image.index_select(dim, index.clamp_max(size - 1).flatten())
    trailing = (1,) * (image.dim() - dim - 1)
    pixels = torch.where(
        inside.view(bins, longest, *trailing), torch.unflatten(pixels, dim, (bins, longest)), 0
    )
    return pixels.sum(dim + 1) / (ends - starts).view(bins, *trailing)


def zero_masked(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Tokens [B, N, C] with zeros in place of masked ones, which may be NaN."""
    return tokens if mask is None else torch.where(mask.unsqueeze(2), tokens, 0)


def cosines(
    keys: torch.Tensor, hw: Sequence[int], grid: Sequence[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Cosines [B, N, O] of keys [B, N, C] with their pooled centres; mask [B, N] as in `pool`."""
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

    gate: None for cosines and means over counts; scalars (alpha, beta) for the similarities sigmoid(beta + alpha *
    cosine), which are the weights of the means as well.
    order: without a gate, a scalar: the arg-max is over sign(order) * cosine.
    mask: [B, N], true for the tokens to cluster.
    """
    keys, values = zero_masked(keys, mask), zero_masked(values, mask)
    similarity = cosines(keys, hw, grid, mask)
    if gate is not None:
        alpha, beta = gate
        similarity = torch.sigmoid(beta + alpha * similarity)
    labels = (similarity if order is None else order.sign() * similarity).argmax(dim=-1)
    assigned = similarity.gather(2, labels.unsqueeze(2)).squeeze(2)
    ones = torch.ones_like(assigned)
    if mask is not None:
        ones, assigned = mask.to(assigned.dtype), torch.where(mask, assigned, 0)
    weights = ones if gate is None else assigned

    # A sum by index, not a product with the one-hot mask: 0 * NaN would spread a NaN to every centre.
    centres = pool(values, hw, grid, mask)
    rows = labels.unsqueeze(2).expand_as(values)
    zeros = torch.zeros_like(centres[..., 0])
    sums = torch.zeros_like(centres).scatter_add(1, rows, weights.unsqueeze(2) * values)
    weight_sum = zeros.scatter_add(1, labels, weights)
    centres = (centres + sums) / (1 + weight_sum).unsqueeze(2)
    counts = zeros.detach().scatter_add(1, labels, ones.detach())
    if mask is not None:
        labels = labels.masked_fill(~mask, -1)
    return _Round(centres, similarity, labels, assigned, counts)


def _outside_autocast(function: _Function) -> _Function:
    """Runs the function with autocast off: it chooses its own precision."""

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
    # Copies, since the backward reads the originals and the caller may write into the results.
    labels, assigned = found.labels.clone(), found.assigned.clone()
    return ClusterResult(found.centres.to(v.dtype), labels, assigned, found.counts.to(torch.int32))


@_outside_autocast
def dispatch(
    centres: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor, *, channels_first: bool = False
) -> torch.Tensor:
    """`frd_kernels.dispatch` in plain PyTorch."""
    dtype = compute_dtype(centres.dtype)
    valid = (labels >= 0).unsqueeze(2)
    index = labels.long().clamp_min(0).unsqueeze(2).expand(-1, -1, centres.size(2))
    # Both factors are masked: 0 * NaN is NaN, and so is its gradient.
    rows = torch.where(valid, centres.to(dtype).gather(1, index), 0)
    out = (torch.where(valid, similarity.to(dtype).unsqueeze(2), 0) * rows).to(centres.dtype)
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
    """The dense dispatch, sigmoid(beta + alpha * cosine) @ centres: a token gets all centres, not its assigned one.

    keys [B, N, C], centres [B, O, C], mask [B, N] -> [B, N, C]. The similarities [B, N, O] are stored.
    """
    dtype = compute_dtype(keys.dtype)
    cosine = cosines(zero_masked(keys.to(dtype), mask), hw, grid, mask)
    similarity = torch.sigmoid(_scalar(beta, cosine) + _scalar(alpha, cosine) * cosine)
    return zero_masked((similarity @ centres.to(dtype)).to(centres.dtype), mask)


@_outside_autocast
def cluster_densely(
    keys: torch.Tensor, values: torch.Tensor, grid: Sequence[int], hw: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A round with cosines and means over counts: its centres [B, O, C] and all cosines [B, N, O]."""
    dtype = compute_dtype(keys.dtype)
    found = _cluster_round(keys.to(dtype), values.to(dtype), grid, hw, None)
    return found.centres.to(values.dtype), found.similarity


@_outside_autocast
def dispatch_densely(
    last: torch.Tensor, matrices: Sequence[torch.Tensor], alpha: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """sigmoid(alpha * (M1 M2 ... MT) + beta) R_T [B, N_1, C], Eq. 4 of the paper.

    last: R_T [B, O_T, C], the last centres. matrices: the cosines M_t [B, N_t, O_t] of each round. alpha, beta: [1].
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
    gates = _gates(tokens, variant, alpha, beta, len(grids))
    rounds = []
    for t, grid in enumerate(grids):
        projection = None if projections is None else projections[t]
        keys = values = tokens
        if projection is not None:
            keys = _project(tokens, projection[0], projection[1])
            values = _project(tokens, projection[2], projection[3])
        rounds.append(_cluster_round(keys, values, grid, hw, _gate_of(t, gates, variant)))
        tokens, hw = rounds[-1].centres, grid
    return _dispatch_last(rounds, gates, variant).to(x.dtype)


def _gates(
    tokens: torch.Tensor, variant: str, alpha: Scalar, beta: Scalar, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and beta: [1] of the dispatch in the variant "paper", else [rounds]."""
    count = 1 if variant == "paper" else rounds
    return _scalar(alpha, tokens).expand(count), _scalar(beta, tokens).expand(count)


def _gate_of(
    t: int, gates: tuple[torch.Tensor, torch.Tensor], variant: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    return None if variant == "paper" else (gates[0][t], gates[1][t])


def _dispatch_last(
    rounds: list[_Round], gates: tuple[torch.Tensor, torch.Tensor], variant: str
) -> torch.Tensor:
    """The last round's centres at the tokens [B, N, C]."""
    if variant == "paper":
        return dispatch_densely(rounds[-1].centres, [found.similarity for found in rounds], *gates)
    return _masked_dispatch(rounds)


@_outside_autocast
def icm_folded(
    x: torch.Tensor,
    projections: Sequence[Projection | None] | None,
    *,
    variant: str = "paper",
    alpha: Scalar,
    beta: Scalar,
    grids: Sequence[Sequence[int]] = ((8, 8), (4, 4), (2, 1)),
    hw: Sequence[int],
) -> torch.Tensor:
    """`icm` with one product in the place of all projections but the first keys' (docs/clustering.md).

    Centres are weighted means, R_t = A_t V_t with rows of A_t that sum to 1, so that means and affine maps commute:
    K_t = A_(t-1) ... A_2 Z_t and R_T = A_T ... A_2 Z_(T+1), where Z_t = (A_1 x) (Wk_t Wv_(t-1) ... Wv_1)^T + bias.
    """
    tokens = x.to(compute_dtype(x.dtype))
    gates = _gates(tokens, variant, alpha, beta, len(grids))
    count = len(grids)
    maps = [None] * count if projections is None else projections
    keys = tokens if maps[0] is None else _project(tokens, maps[0][0], maps[0][1])
    folded = _fold_projections(maps, tokens)
    values, rounds = tokens, []
    for t, grid in enumerate(grids):
        rounds.append(_cluster_round(keys, values, grid, hw, _gate_of(t, gates, variant)))
        values, hw = rounds[-1].centres, grid
        if t == 0:
            values = F.linear(values, torch.cat([m[0] for m in folded]), torch.cat([m[1] for m in folded]))
        if t + 1 < count:
            width = len(folded[t][1])
            keys, values = values[..., :width], values[..., width:]
    rounds[-1] = rounds[-1]._replace(centres=values)
    return _dispatch_last(rounds, gates, variant).to(x.dtype)


def _fold_projections(
    maps: Sequence[Projection | None], like: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and biases that make Z_2 ... Z_(T+1) of A_1 x: the keys of rounds 2 to T and the last values."""
    width = like.size(-1)
    weight = torch.eye(width, dtype=like.dtype, device=like.device)
    bias = weight.new_zeros(width)
    folded = []
    for t, found in enumerate(maps):
        if found is None:
            found = (torch.eye(len(bias), dtype=like.dtype, device=like.device), None) * 2
        if t > 0:
            folded.append(_compose(found[0], found[1], weight, bias))
        weight, bias = _compose(found[2], found[3], weight, bias)
    return [*folded, (weight, bias)]


def _compose(
    outer: torch.Tensor, shift: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """outer (weight x + bias) + shift as one weight and bias."""
    outer = outer.to(weight.dtype)
    moved = outer @ bias
    return outer @ weight, moved if shift is None else moved + shift.to(bias.dtype)


def _masked_dispatch(rounds: list[_Round]) -> torch.Tensor:
    """The authors' code: the product of the similarity matrices, each masked to the assigned centres, times R_T.

    A masked matrix has one entry per row, so the product follows each token's chain of assigned centres.
    """
    weight, centre = rounds[0].assigned, rounds[0].labels
    for found in rounds[1:]:
        weight = weight * found.assigned.gather(1, centre)
        centre = found.labels.gather(1, centre)
    last = rounds[-1].centres
    return weight.unsqueeze(2) * last.gather(1, centre.unsqueeze(2).expand(-1, -1, last.size(2)))
