"""The size of `saved` of the chain of launches on CUDA; csrc/cluster/cuda/chain.h states its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def _aligned(floats: int) -> int:
    return (floats + 3) // 4 * 4


def _round(tokens: int, centres: int, channels: int) -> int:
    per_token, per_centre = 2 * _aligned(tokens), 2 * _aligned(centres)
    return per_token + per_centre + _aligned(centres * channels)


def saved_size(_dtype: torch.dtype, tokens: int, centres: int, channels: int) -> int:
    """Elements of a sample's row of `saved` of the operator `cluster`."""
    return _round(tokens, centres, channels) + _aligned(centres * channels)


def saved_layout(
    _dtype: torch.dtype, hw: Sequence[int], grids: Sequence[int], channels: int, variant: int
) -> tuple[int, int]:
    """(labels, elements of `saved`) of a sample of `icm`."""
    count, dense = len(grids) // 2, variant == 0
    last = grids[-2] * grids[-1]
    tokens, labels, size, links = hw[0] * hw[1], 0, 0, 0
    for t in range(count):
        centres = grids[2 * t] * grids[2 * t + 1]
        size += _round(tokens, centres, channels) + _aligned(centres * (count - t) * channels)
        if dense:
            size += _aligned(tokens * centres)
            links += tokens * last if t > 0 else 0
        labels += tokens
        tokens = centres
    return labels, size + _aligned(grids[0] * grids[1] * channels) + _aligned(links)
