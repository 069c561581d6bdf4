"""Launches of the clustering's kernels for `triton_aot.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from frd_kernels.cluster.triton import backward, forward, layout

Launch = Callable[[], Any]
LARGE, SMALL = (8, 64, 256), (16, 16, 256)  # batch, side, channels
ROUNDS = [8, 8, 4, 4, 2, 1]


def tokens(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    batch, side, channels = shape
    if layout == "image":
        return torch.empty((batch, channels, side * side), dtype=dtype, device="meta").transpose(1, 2)
    return torch.empty((batch, side * side, channels), dtype=dtype, device="meta")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cluster(
    dtype: torch.dtype,
    layout: str,
    shape: tuple[int, int, int] = LARGE,
    grid: tuple[int, int] = (8, 8),
    aggregate: int = 1,
    masked: bool = False,
) -> Launch:
    k, v = tokens(shape, dtype, layout), tokens(shape, dtype, layout)
    mask = empty(*k.shape[:2], dtype=torch.bool) if masked else None
    hw = [shape[1], shape[1]]
    return lambda: forward.cluster(k, v, mask, empty(1), empty(1), list(grid), hw, aggregate)


def cluster_backward(dtype: torch.dtype, memory: str, aggregate: int) -> Launch:
    k, (batch, side, channels), grid = tokens(LARGE, dtype, memory), LARGE, [8, 8]
    grads = empty(batch, 64, channels, dtype=dtype), empty(batch, side * side)
    labels = empty(batch, side * side, dtype=torch.int32)
    saved = empty(batch, layout.saved_size(dtype, side * side, 64, channels))
    kept = labels, saved, grid, [side, side], aggregate
    return lambda: backward.cluster_backward(*grads, k, k, empty(1), empty(1), *kept)


def projections(channels: int, dtype: torch.dtype, projected: bool) -> list[torch.Tensor]:
    sizes = [(channels, channels), (channels,)] * 2 if projected else [(0,)] * 4
    return [empty(*size, dtype=dtype) for size in sizes] * (len(ROUNDS) // 2)


def icm(
    dtype: torch.dtype,
    layout: str,
    shape: tuple[int, int, int] = LARGE,
    variant: int = 0,
    projected: bool = True,
) -> Launch:
    x, maps = tokens(shape, dtype, layout), projections(shape[2], dtype, projected)
    gates = [empty(len(ROUNDS) // 2 if variant else 1) for _ in range(2)]
    return lambda: forward.icm(x, maps, *gates, ROUNDS, [shape[1], shape[1]], variant)


def icm_backward(
    dtype: torch.dtype,
    memory: str,
    shape: tuple[int, int, int] = LARGE,
    variant: int = 0,
    projected: bool = True,
) -> Launch:
    x, maps = tokens(shape, dtype, memory), projections(shape[2], dtype, projected)
    gates = [empty(len(ROUNDS) // 2 if variant else 1) for _ in range(2)]
    hw = [shape[1], shape[1]]
    labels, elements = layout.saved_layout(dtype, hw, ROUNDS, shape[2], variant)
    kept = empty(shape[0], labels, dtype=torch.int32), empty(shape[0], elements)
    return lambda: backward.icm_backward(x, x, maps, *gates, *kept, ROUNDS, hw, variant)


def dispatch(dtype: torch.dtype, layout: str) -> Launch:
    grad, (batch, side, channels) = tokens(LARGE, dtype, layout), LARGE
    centres = empty(batch, 64, channels, dtype=dtype)
    chosen = empty(batch, side * side, dtype=torch.int32), empty(batch, side * side)

    def launch() -> None:
        forward.cluster_dispatch(centres, *chosen, layout == "image")
        backward.cluster_dispatch_backward(grad, centres, *chosen)

    return launch


def launches() -> dict[str, Launch]:
    """Name -> a call of a launcher on meta tensors."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    return {
        "cluster bf16 tokens": cluster(bf16, "tokens"),
        "cluster f16 image masked": cluster(f16, "image", masked=True),
        "cluster bf16 tokens count many centres": cluster(bf16, "tokens", grid=(32, 32), aggregate=0),
        "cluster f32 tokens 24 channels": cluster(f32, "tokens", (8, 64, 24), aggregate=0),
        "cluster f16 tokens 320 channels": cluster(f16, "tokens", (8, 16, 320), grid=(4, 4), aggregate=0),
        "icm bf16 tokens": icm(bf16, "tokens"),
        "icm bf16 image small": icm(bf16, "image", SMALL),
        "icm f16 image released": icm(f16, "image", variant=1),
        "icm f32 tokens": icm(f32, "tokens"),
        "icm f32 image small released": icm(f32, "image", SMALL, variant=1),
        "icm bf16 tokens no projections": icm(bf16, "tokens", SMALL, projected=False),
        "cluster backward bf16 tokens": cluster_backward(bf16, "tokens", 1),
        "cluster backward f32 image count": cluster_backward(f32, "image", 0),
        "icm backward bf16 image": icm_backward(bf16, "image"),
        "icm backward f16 tokens released": icm_backward(f16, "tokens", SMALL, 1),
        "icm backward f32 image": icm_backward(f32, "image"),
        "icm backward f32 tokens released no projections": icm_backward(f32, "tokens", SMALL, 1, False),
        "dispatch bf16 image": dispatch(bf16, "image"),
        "dispatch f32 tokens": dispatch(f32, "tokens"),
    }
