"""The baselines: the eager PyTorch that users of these layers run today.

Written from the formulas, with the sequence of tensor operations of PiDiNet's and FRD-Net's code at theta = 1, because
that sequence is what takes the time. `folded` is what a converted net runs: the plain kernel computed beforehand, then
one convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

# Wk, bk, Wv, bv.
Projection = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# Of x, weight, groups.
Convolution = Callable[..., torch.Tensor]
Index: TypeAlias = Sequence[int] | torch.Tensor
Layer = Callable[[torch.Tensor], torch.Tensor]

# The neighbour that is subtracted from each tap of a row-major 3x3 window: the one before it, clockwise.
PREVIOUS = [3, 0, 1, 6, 4, 2, 7, 8, 5]
# Taps of a row-major 5x5 window that the weights 1 to 8 of the radial difference act on, and their opposites.
OUTER = [0, 2, 4, 10, 14, 20, 22, 24]
INNER = [6, 7, 8, 11, 13, 16, 17, 18]


def with_indices(function: Callable[..., Any], kind: str, device: str) -> Callable[..., Any]:
    """`function` with its index lists as tensors on a GPU. The published code copies the lists from the host at each
    call, which a CUDA graph cannot contain."""
    lists = {"angular": {"previous": PREVIOUS}, "radial": {"outer": OUTER, "inner": INNER}}.get(kind, {})
    if device == "cpu" or not lists:
        return function
    return functools.partial(function, **{k: torch.tensor(v, device=device) for k, v in lists.items()})


def angular_weight(weight: torch.Tensor, previous: Index = PREVIOUS) -> torch.Tensor:
    """[O, I, 3, 3] -> the plain kernel [O, I, 3, 3]."""
    flat = weight.flatten(2)
    return (flat - flat[:, :, previous]).view_as(weight)


def central_weight(weight: torch.Tensor) -> torch.Tensor:
    """[O, I, 3, 3] -> the plain kernel [O, I, 3, 3], as a converter computes it."""
    flat = weight.flatten(2).clone()
    flat[:, :, 4] -= weight.sum((2, 3))
    return flat.view_as(weight)


def radial_weight(weight: torch.Tensor, outer: Index = OUTER, inner: Index = INNER) -> torch.Tensor:
    """[O, I, 3, 3] -> the plain kernel [O, I, 5, 5]."""
    used = weight.flatten(2)[:, :, 1:]
    buffer = weight.new_zeros(*weight.shape[:2], 25)
    buffer[:, :, outer] = used
    buffer[:, :, inner] = -used
    return buffer.unflatten(2, (5, 5))


def vanilla(x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """x [B, C, H, W], weight [O, C / groups, 3, 3] -> [B, O, H, W]; so are all of them."""
    return F.conv2d(x, weight, padding=1, groups=groups)


def angular(x: torch.Tensor, weight: torch.Tensor, groups: int, previous: Index = PREVIOUS) -> torch.Tensor:
    return F.conv2d(x, angular_weight(weight, previous), padding=1, groups=groups)


def central(x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    centre = F.conv2d(x, weight.sum((2, 3), keepdim=True), groups=groups)
    return F.conv2d(x, weight, padding=1, groups=groups) - centre


def radial(
    x: torch.Tensor, weight: torch.Tensor, groups: int, outer: Index = OUTER, inner: Index = INNER
) -> torch.Tensor:
    return F.conv2d(x, radial_weight(weight, outer, inner), padding=2, groups=groups)


PDC: dict[str, Convolution] = {"vanilla": vanilla, "angular": angular, "central": central, "radial": radial}
WEIGHT: dict[str, Callable[..., torch.Tensor]] = {
    "angular": angular_weight,
    "central": central_weight,
    "radial": radial_weight,
}


def folded(weight: torch.Tensor, kind: str, groups: int) -> Layer:
    """x -> difference convolution by `weight`; its plain kernel is computed here, once."""
    plain = weight if kind == "vanilla" else WEIGHT[kind](weight.float()).to(weight.dtype)
    padding = plain.shape[-1] // 2
    return lambda x: F.conv2d(x, plain, padding=padding, groups=groups)


def dpm(
    x: torch.Tensor,
    angular_taps: torch.Tensor,
    angular_point: torch.Tensor,
    central_taps: torch.Tensor,
    central_point: torch.Tensor,
    previous: Index = PREVIOUS,
) -> torch.Tensor:
    """FRD-Net's detail branch. x [B, C, H, W]; taps [C, 1, 3, 3]; points [C, C, 1, 1]."""
    groups = x.shape[1]
    y = F.conv2d(F.relu(angular(x, angular_taps, groups, previous)), angular_point) + x
    return F.conv2d(F.relu(central(y, central_taps, groups)), central_point)


def block(
    x: torch.Tensor, weight: torch.Tensor, point: torch.Tensor, previous: Index = PREVIOUS
) -> torch.Tensor:
    """Dense angular difference convolution -> ReLU -> 1x1. weight [C, C, 3, 3]; point [C, C, 1, 1]."""
    return F.conv2d(F.relu(angular(x, weight, 1, previous)), point)


def folded_dpm(
    angular_taps: torch.Tensor,
    angular_point: torch.Tensor,
    central_taps: torch.Tensor,
    central_point: torch.Tensor,
) -> Layer:
    """x -> the detail branch; both plain kernels are computed here, once."""
    groups = angular_taps.shape[0]
    first, second = folded(angular_taps, "angular", groups), folded(central_taps, "central", groups)

    def call(x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(F.relu(first(x)), angular_point) + x
        return F.conv2d(F.relu(second(y)), central_point)

    return call


def icm_products(
    x: torch.Tensor,
    projections: Sequence[Projection],
    alpha: torch.Tensor,
    beta: torch.Tensor,
    grids: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """Variant "released" as its authors write it: products [B, O, N, C] in aggregation and dispatch.

    x [B, C, H, W] -> [B, C, H, W]; alpha, beta [T].
    """
    image, masks = x, []
    for t, (projection, grid) in enumerate(zip(projections, grids, strict=True)):
        keys, values, key_centres, centres = _project(image, projection, grid)
        similarity = torch.sigmoid(beta[t] + alpha[t] * cosines(key_centres, keys))  # [B, O, N]
        best = similarity.max(dim=1, keepdim=True).indices
        masks.append(similarity * torch.zeros_like(similarity).scatter_(1, best, 1.0))
        weighted = values.unsqueeze(1) * masks[-1].unsqueeze(3)  # [B, O, N, C]
        centres = (centres + weighted.sum(2)) / (1 + masks[-1].sum(2, keepdim=True))
        image = _image(centres, grid)
    out = centres
    for mask in reversed(masks):
        out = (out.unsqueeze(2) * mask.unsqueeze(3)).sum(1)  # [B, O, N, C] -> [B, N, C]
    return _image(out, x.shape[2:])


def icm_gather(
    x: torch.Tensor,
    projections: Sequence[Projection],
    alpha: torch.Tensor,
    beta: torch.Tensor,
    grids: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """Variant "released" in its fastest eager form: sums by index, dispatch as a chain of gathers."""
    image, levels = x, []
    for t, (projection, grid) in enumerate(zip(projections, grids, strict=True)):
        keys, values, key_centres, centres = _project(image, projection, grid)
        own, labels = torch.sigmoid(beta[t] + alpha[t] * cosines(keys, key_centres)).max(dim=2)
        levels.append((own, labels))
        centres = _aggregate(centres, own.unsqueeze(2) * values, own, labels)
        image = _image(centres, grid)
    weight, chosen = levels[0]
    for own, labels in levels[1:]:
        weight, chosen = weight * own.gather(1, chosen), labels.gather(1, chosen)
    rows = chosen.unsqueeze(2).expand(-1, -1, centres.shape[2])
    return _image(weight.unsqueeze(2) * centres.gather(1, rows), x.shape[2:])


def icm_dense(
    x: torch.Tensor,
    projections: Sequence[Projection],
    alpha: torch.Tensor,
    beta: torch.Tensor,
    grids: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """Variant "paper": dense cosine matrices [B, N, O], aggregation by index as in FEC.

    x [B, C, H, W] -> [B, C, H, W]; alpha, beta scalars.
    """
    image, product = x, x
    for t, (projection, grid) in enumerate(zip(projections, grids, strict=True)):
        keys, values, key_centres, centres = _project(image, projection, grid)
        cosine = cosines(keys, key_centres)
        labels = cosine.max(dim=2).indices
        centres = _aggregate(centres, values, torch.ones_like(values[..., 0]), labels)
        product = product @ cosine if t else cosine
        image = _image(centres, grid)
    return _image(torch.sigmoid(alpha * product + beta) @ centres, x.shape[2:])


def cluster_products(
    grid: tuple[int, int], keys: torch.Tensor, values: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """One round and its dispatch as Context-Cluster writes them: products [B, O, N, C] in both.

    keys, values [B, C, H, W] -> [B, C, H, W]; alpha, beta [1].
    """
    k, v, key_centres, centres = _tokens(grid, keys, values)
    similarity = torch.sigmoid(beta + alpha * cosines(key_centres, k))  # [B, O, N]
    best = similarity.max(dim=1, keepdim=True).indices
    mask = similarity * torch.zeros_like(similarity).scatter_(1, best, 1.0)
    centres = (centres + (v.unsqueeze(1) * mask.unsqueeze(3)).sum(2)) / (1 + mask.sum(2, keepdim=True))
    return _image((centres.unsqueeze(2) * mask.unsqueeze(3)).sum(1), keys.shape[2:])


def cluster_gather(
    grid: tuple[int, int], keys: torch.Tensor, values: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """The same in its fastest eager form: sums by index, dispatch by a gather."""
    k, v, key_centres, centres = _tokens(grid, keys, values)
    own, labels = torch.sigmoid(beta + alpha * cosines(k, key_centres)).max(dim=2)
    centres = _aggregate(centres, own.unsqueeze(2) * v, own, labels)
    rows = labels.unsqueeze(2).expand(-1, -1, centres.shape[2])
    return _image(own.unsqueeze(2) * centres.gather(1, rows), keys.shape[2:])


def _tokens(grid: tuple[int, int], *images: torch.Tensor) -> Iterator[torch.Tensor]:
    """images [B, C, H, W] -> of each the tokens [B, N, C], then of each the pooled centres [B, O, C]."""
    pooled = (F.adaptive_avg_pool2d(image, grid) for image in images)
    return (maps.flatten(2).transpose(1, 2) for maps in (*images, *pooled))


def _project(image: torch.Tensor, projection: Projection, grid: tuple[int, int]) -> Iterator[torch.Tensor]:
    """image [B, C, H, W] -> keys and values [B, N, C], the pooled centres of both [B, O, C]."""
    key_weight, key_bias, value_weight, value_bias = projection
    keys = F.conv2d(image, key_weight[:, :, None, None], key_bias)
    values = F.conv2d(image, value_weight[:, :, None, None], value_bias)
    return _tokens(grid, keys, values)


def cosines(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[B, P, C], [B, Q, C] -> [B, P, Q]."""
    return F.normalize(left, dim=2) @ F.normalize(right, dim=2).transpose(1, 2)


def _aggregate(
    centres: torch.Tensor, weighted: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Mean of each centre [B, O, C] and its tokens: weighted values [B, N, C], weights and labels [B, N]."""
    sums = centres.scatter_add(1, labels.unsqueeze(2).expand_as(weighted), weighted)
    weight_sum = torch.ones_like(centres[..., 0]).scatter_add(1, labels, weights)
    return sums / weight_sum.unsqueeze(2)


def _image(tokens: torch.Tensor, hw: Sequence[int]) -> torch.Tensor:
    """[B, N, C] -> [B, C, H, W]."""
    return tokens.transpose(1, 2).unflatten(2, tuple(hw))
