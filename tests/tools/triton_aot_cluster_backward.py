"""Launches of the clustering's backward for `triton_aot`: on meta tensors, as the operators would start them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from frd_kernels.cluster import saved as layouts
from frd_kernels.cluster.saved import compute_dtype
from frd_kernels.cluster.triton import backward
from frd_kernels.cluster.triton import dispatch as dispatch_module

Launch = Callable[[], Any]
# batch, image, grid of one round; grids and projections of an ICM
LARGE: tuple[int, list[int], list[int]] = (8, [64, 64], [8, 8])
SMALL: tuple[int, list[int], list[int]] = (16, [16, 16], [8, 8])
ROUNDS = [8, 8, 4, 4, 2, 1]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tokens(batch: int, count: int, channels: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """[B, N, C], a permuted image [B, C, N] where the layout is "image"."""
    if layout == "image":
        return empty(batch, channels, count, dtype=dtype).transpose(1, 2)
    return empty(batch, count, channels, dtype=dtype)


def cluster_backward(
    dtype: torch.dtype,
    layout: str,
    aggregate: int,
    sizes: tuple[int, list[int], list[int]] = LARGE,
    channels: int = 256,
) -> Launch:
    batch, hw, grid = sizes
    count, centres = hw[0] * hw[1], grid[0] * grid[1]
    sums = compute_dtype(dtype)
    k = tokens(batch, count, channels, dtype, layout)
    grads = empty(batch, centres, channels, dtype=dtype), empty(batch, count, dtype=sums)
    gate = empty(1, dtype=sums)
    labels = empty(batch, count, dtype=torch.int32)
    saved = empty(batch, layouts.saved_size(dtype, count, centres, channels), dtype=sums)
    return lambda: backward.cluster_backward(*grads, k, k, gate, gate, labels, saved, grid, hw, aggregate)


def icm_backward(
    dtype: torch.dtype,
    layout: str,
    variant: int,
    projected: bool = True,
    sizes: tuple[int, list[int], list[int]] = LARGE,
    channels: int = 256,
) -> Launch:
    batch, hw, _ = sizes
    rounds = len(ROUNDS) // 2
    x = tokens(batch, hw[0] * hw[1], channels, dtype, layout)
    maps = [empty(channels, channels, dtype=dtype), empty(channels, dtype=dtype)] * 2 * rounds
    if not projected:
        maps = [empty(0, dtype=dtype)] * 4 * rounds
    label_count, saved_count = layouts.saved_layout(dtype, hw, ROUNDS, channels, variant)
    labels = empty(batch, label_count, dtype=torch.int32)
    sums = compute_dtype(dtype)
    saved = empty(batch, saved_count, dtype=sums)
    gate = empty(rounds if variant else 1, dtype=sums)
    return lambda: backward.icm_backward(x, x, maps, gate, gate, labels, saved, ROUNDS, hw, variant)


def dispatch(dtype: torch.dtype, layout: str, channels: int = 256) -> Launch:
    batch, hw, grid = LARGE
    count = hw[0] * hw[1]
    centres = empty(batch, grid[0] * grid[1], channels, dtype=dtype)
    labels, similarity = (empty(batch, count, dtype=d) for d in (torch.int32, compute_dtype(dtype)))
    grad = tokens(batch, count, channels, dtype, layout)

    def launch() -> None:
        dispatch_module.cluster_dispatch(centres, labels, similarity, layout == "image")
        dispatch_module.cluster_dispatch_backward(grad, centres, labels, similarity)

    return launch


def launches() -> dict[str, Launch]:
    """Name -> a call of a launcher on meta tensors."""
    bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    return {
        "cluster backward bf16 tokens similarity": cluster_backward(bf16, "tokens", 1),
        "cluster backward bf16 image similarity": cluster_backward(bf16, "image", 1),
        "cluster backward bf16 image count": cluster_backward(bf16, "image", 0, SMALL),
        "cluster backward f32 tokens similarity": cluster_backward(f32, "tokens", 1),
        "cluster backward f32 image count": cluster_backward(f32, "image", 0, SMALL),
        "cluster backward f16 tokens 24 channels": cluster_backward(f16, "tokens", 1, channels=24),
        "icm backward bf16 tokens paper": icm_backward(bf16, "tokens", 0),
        "icm backward bf16 image paper plain": icm_backward(bf16, "image", 0, False),
        "icm backward bf16 image released": icm_backward(bf16, "image", 1, True, SMALL),
        "icm backward f16 tokens paper": icm_backward(f16, "tokens", 0, True, SMALL),
        "icm backward f32 image paper": icm_backward(f32, "image", 0),
        "icm backward f32 tokens released plain": icm_backward(f32, "tokens", 1, False, SMALL),
        "icm backward f64 tokens paper": icm_backward(f64, "tokens", 0, True, SMALL),
        "icm backward f64 tokens released": icm_backward(f64, "tokens", 1, True, SMALL),
        "dispatch bf16 image": dispatch(bf16, "image"),
        "dispatch f32 tokens": dispatch(f32, "tokens"),
    }
