"""The layers of Context-Cluster and FEC with the matrix of similarities, region by region, head by head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Case(NamedTuple):
    """A Cluster and its image."""

    size: tuple[int, int]
    proposal: tuple[int, int]
    fold: tuple[int, int]
    heads: int
    head_dim: int
    alpha: float = 1.0


def dense_region(
    k: torch.Tensor, v: torch.Tensor, grid: tuple[int, int], mask: torch.Tensor, gate: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One head of one region [B, C, h, w], mask [B, 1, h, w] of ones and zeros: pooled values [B, O, C],
    values [B, N, C], similarities [B, O, N] and the one-hot mask of the best of them."""
    fraction = F.adaptive_avg_pool2d(mask, grid)
    pooled_k, pooled_v = (
        (F.adaptive_avg_pool2d(t * mask, grid) / fraction.clamp_min(1e-9)).flatten(2).mT for t in (k, v)
    )
    cosine = torch.einsum(
        "boc,bcn->bon", F.normalize(pooled_k, dim=2), F.normalize((k * mask).flatten(2), dim=1)
    )
    similarity = cosine if gate is None else torch.sigmoid(gate[1] + gate[0] * cosine)
    hard = F.one_hot(similarity.argmax(1), similarity.size(1)).mT.to(k.dtype) * mask.flatten(2)
    return pooled_v, v.flatten(2).mT, similarity, hard


def regions(x: torch.Tensor, fold: tuple[int, int]) -> Any:
    """The regions of an image, row by row; none are cut unless both sides are."""
    rows, columns = fold if min(fold) > 1 else (1, 1)
    h, w = x.size(2) // rows, x.size(3) // columns
    return [[x[:, :, i * h : i * h + h, j * w : j * w + w] for j in range(columns)] for i in range(rows)]


def join(parts: Any) -> torch.Tensor:
    return torch.cat([torch.cat(row, 3) for row in parts], 2)


def dense_cluster(kind: str, made: Any, case: Case, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    """Both Clusters with the matrix of similarities, region by region, head by head."""
    mask = torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).to(x.dtype)
    keys, values = made.f(x * mask), made.v(x * mask)

    def head(k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        gate = made.sim_alpha, made.sim_beta
        pooled, rows, similarity, hard = dense_region(k, v, case.proposal, kept, gate)
        own = similarity * hard
        weights = hard if kind == "fec" else own
        centres = (torch.einsum("bon,bnc->boc", weights, rows) + pooled) / (1 + weights.sum(2, keepdim=True))
        if kind == "coc-centres":
            return centres.mT.unflatten(2, case.proposal)
        spread = similarity * kept.flatten(2) if kind == "coc-dense" else own
        return torch.einsum("bon,boc->bcn", spread, centres).unflatten(2, k.shape[2:])

    cut = zip(regions(keys, case.fold), regions(values, case.fold), regions(mask, case.fold), strict=True)
    parts = [
        [
            torch.cat(
                [head(*pair, m) for pair in zip(k.chunk(case.heads, 1), v.chunk(case.heads, 1), strict=True)],
                1,
            )
            for k, v, m in zip(*row, strict=True)
        ]
        for row in cut
    ]
    return made.proj(join(parts))


def dense_pool(
    made: Any, fold: tuple[int, int], x: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    mask = torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).to(x.dtype)
    keys, values = made.conv_f(x * mask), made.conv_v(x * mask)

    def region(k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        grid = k.size(2) // made.stride, k.size(3) // made.stride
        pooled, rows, _cosine, hard = dense_region(k, v, grid, kept, None)
        centres = (hard @ rows + pooled) / (1 + hard.sum(2, keepdim=True))
        return centres.mT.unflatten(2, grid)

    cut = zip(regions(keys, fold), regions(values, fold), regions(mask, fold), strict=True)
    centres = join([[region(*parts) for parts in zip(*row, strict=True)] for row in cut])
    return made.conv_skip(x * mask) + made.norm2(centres)
