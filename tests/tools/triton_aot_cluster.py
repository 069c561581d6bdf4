"""Launches of the clustering's forward kernels for `triton_aot.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from frd_kernels.cluster.triton import forward as icm

Launch = Callable[[], Any]
LARGE, SMALL = (8, 64, 256), (16, 16, 256)  # batch, side, channels


def tokens(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    batch, side, channels = shape
    if layout == "image":
        return torch.empty((batch, channels, side * side), dtype=dtype, device="meta").transpose(1, 2)
    return torch.empty((batch, side * side, channels), dtype=dtype, device="meta")


def gate(dtype: torch.dtype, size: int = 1) -> torch.Tensor:
    return torch.empty(size, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="meta")


def cluster(
    dtype: torch.dtype,
    layout: str,
    shape: tuple[int, int, int] = LARGE,
    grid: tuple[int, int] = (8, 8),
    aggregate: int = 1,
    masked: bool = False,
) -> Launch:
    k, v = tokens(shape, dtype, layout), tokens(shape, dtype, layout)
    mask = torch.empty(k.shape[:2], dtype=torch.bool, device="meta") if masked else None
    hw = [shape[1], shape[1]]
    return lambda: icm.cluster(k, v, mask, gate(dtype), gate(dtype), list(grid), hw, aggregate)


def all_rounds(
    dtype: torch.dtype,
    layout: str,
    shape: tuple[int, int, int] = LARGE,
    grids: tuple[int, ...] = (8, 8, 4, 4, 2, 1),
    variant: int = 0,
    projected: bool = True,
) -> Launch:
    x, channels, rounds = tokens(shape, dtype, layout), shape[2], len(grids) // 2
    sizes = [(channels, channels), (channels,)] * 2 if projected else [(0,)] * 4
    maps = [torch.empty(size, dtype=dtype, device="meta") for size in sizes] * rounds
    gates = [gate(dtype, 1 if variant == 0 else rounds) for _ in range(2)]
    return lambda: icm.icm(x, maps, *gates, list(grids), [shape[1], shape[1]], variant)


def launches() -> dict[str, Launch]:
    """Name -> a call of a launcher on meta tensors."""
    bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    return {
        "cluster bf16 tokens": cluster(bf16, "tokens"),
        "cluster f16 image masked": cluster(f16, "image", masked=True),
        "cluster f32 image": cluster(f32, "image"),
        "cluster f64 tokens": cluster(f64, "tokens"),
        "cluster f64 tokens masked": cluster(f64, "tokens", SMALL, masked=True),
        "cluster bf16 tokens count many centres": cluster(bf16, "tokens", grid=(32, 32), aggregate=0),
        "cluster f32 tokens 24 channels": cluster(f32, "tokens", (8, 64, 24), aggregate=0),
        "cluster f16 tokens 320 channels": cluster(f16, "tokens", (8, 16, 320), grid=(4, 4), aggregate=0),
        "icm bf16 tokens": all_rounds(bf16, "tokens"),
        "icm bf16 image small": all_rounds(bf16, "image", SMALL),
        "icm f16 image released": all_rounds(f16, "image", variant=1),
        "icm f16 tokens one round": all_rounds(f16, "tokens", grids=(8, 8)),
        "icm f32 tokens": all_rounds(f32, "tokens"),
        "icm f32 image small released": all_rounds(f32, "image", SMALL, variant=1),
        "icm bf16 tokens no projections": all_rounds(bf16, "tokens", SMALL, projected=False),
        "icm f64 tokens": all_rounds(f64, "tokens", SMALL, grids=(4, 4, 2, 1)),
    }
