"""One round of clustering and the way back to the tokens, as in a block of Context-Cluster, against eager PyTorch.

Keys and values are given; what the block's 1x1 convolutions take is not part of it. The tokens come in clusters that
lie far apart, as those of the ICM (`icm.py` says why).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

import frd_kernels as fk

from . import eager
from .harness import Case, Providers, normal, providers
from .icm import clustered

# Regions of 7 x 7 pixels in four heads, and one whole image.
SHAPES = {(256, 24, 7, 7): (2, 2), (4, 64, 64, 64): (8, 8)}


def build_cluster(case: Case) -> Providers:
    grid = SHAPES.get(case.shape, (2, 2))  # of centres
    gates = [torch.full((1,), value, dtype=case.dtype) for value in (1.0, 0.1)]
    return providers(
        case,
        inputs=(clustered(case, grid), normal(case.shape, case, seed=3), *gates),
        ours=functools.partial(cluster_and_dispatch, fk, grid),
        rivals={
            "eager, [B,O,N,C] products": functools.partial(eager.cluster_products, grid),
            "eager, gather and scatter_add": functools.partial(eager.cluster_gather, grid),
        },
        reference=functools.partial(cluster_and_dispatch, fk.reference, grid),
        squared=True,
    )


def cluster_and_dispatch(
    module: Any,
    grid: tuple[int, int],
    keys: torch.Tensor,
    values: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """keys, values [B, C, H, W] -> [B, C, H, W] by `module`: frd_kernels, or its reference."""
    k, v = (image.flatten(2).transpose(1, 2) for image in (keys, values))
    hw = tuple(keys.shape[2:])
    found = module.cluster(k, v, grid, hw, aggregate="similarity", alpha=alpha, beta=beta)
    out = module.dispatch(found.centres, found.labels, found.similarity, channels_first=True)
    return out.transpose(1, 2).unflatten(2, hw)


def cases() -> Iterator[Case]:
    for mode in ("forward", "forward+backward"):
        for shape in SHAPES:
            yield Case("cluster", shape, mode, build_cluster)


CASES = list(cases())
