"""One round of clustering and the way back to the tokens, as in a block of Context-Cluster, against eager PyTorch.

Keys and values are given; what the block's 1x1 convolutions take is not part of it. The tokens come in clusters that
lie far apart, as those of the ICM (`icm.py` says why).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import frd_kernels as fk

from . import eager
from .cases import MODES, Case, Providers, normal
from .gate import one_line
from .icm import clustered
from .providers import installed, providers

# Regions of 7 x 7 pixels in four heads, and one whole image.
SHAPES: dict[tuple[int, ...], tuple[int, int]] = {(256, 24, 7, 7): (2, 2), (4, 64, 64, 64): (8, 8)}
GPU_SHAPES: dict[tuple[int, ...], tuple[int, int]] = {(8, 64, size, size): (8, 8) for size in (16, 64, 128)}
GRIDS = SHAPES | GPU_SHAPES  # of centres


def build_cluster(case: Case) -> Providers:
    grid = GRIDS.get(case.shape, (2, 2))
    gates = [torch.full((1,), value, dtype=case.dtype, device=case.device) for value in (1.0, 0.1)]
    sides = providers(
        case,
        inputs=(clustered(case, grid), normal(case.shape, case, seed=3), *gates),
        ours=functools.partial(cluster_and_dispatch, fk, grid),
        rivals={
            "eager, [B,O,N,C] products": functools.partial(eager.cluster_products, grid),
            "eager, gather and scatter_add": functools.partial(eager.cluster_gather, grid),
        },
        reference=functools.partial(cluster_and_dispatch, fk.reference, grid),
        ops=("cluster", "cluster_dispatch"),
        squared=True,
        convolves=False,
    )
    if case.device == "cuda" and not case.backward:
        add_flash_kmeans(sides, clustered(case, grid), grid)
    return sides


def add_flash_kmeans(sides: Providers, keys: torch.Tensor, grid: tuple[int, int]) -> None:
    """One iteration of flash-kmeans by cosine, where it is installed: assignment and new centres of the keys alone.

    It computes less than ours (no values, no similarity, no way back) and reads its stopping rule on the host, so it
    stands among the floors and has no graph. Its labels have to be ours.
    """
    if not installed("flash_kmeans"):
        sides.left_out["flash-kmeans"] = "not installed"
        return
    tokens = keys.flatten(2).transpose(1, 2).contiguous()
    centres = F.adaptive_avg_pool2d(keys, grid).flatten(2).transpose(1, 2).contiguous()
    try:
        from flash_kmeans import batch_kmeans_Cosine

        def call() -> tuple[torch.Tensor, ...]:
            found = batch_kmeans_Cosine(tokens, centres.shape[1], max_iters=1, init_centroids=centres)
            return tuple(found[:2])

        labels = call()[0]
    except Exception as error:  # another library, of whatever version
        sides.left_out["flash-kmeans"] = one_line(error)
        return
    hw = (keys.shape[2], keys.shape[3])
    same = (labels == fk.reference.cluster(tokens.double(), tokens.double(), grid, hw).labels).float().mean()
    if same < 0.99:
        sides.left_out["flash-kmeans"] = f"only {100 * float(same):.1f} % of its labels are the oracle's"
        return
    sides.floors["flash-kmeans"] = call
    sides.timings["flash-kmeans"] = ("wall",)


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
    for mode in MODES:
        for shape in SHAPES:
            yield Case("cluster", shape, mode, build_cluster)


def gpu_cases() -> Iterator[Case]:
    """In bfloat16: 256, 4096 and 16384 tokens."""
    for index, shape in enumerate(GPU_SHAPES):
        case = Case("cluster", shape, MODES[0], build_cluster, dtype=torch.bfloat16, device="cuda")
        for mode in MODES:
            yield dataclasses.replace(case, mode=mode, short=index == 1)


CASES = list(cases())
GPU_CASES = list(gpu_cases())
