"""What the Triton operators keep for their backward, in one tensor `saved` [B, *]. The fakes use it without triton.

B counts samples, N tokens, O centres, C channels, T rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Saved(NamedTuple):
    """What a round keeps, views of `saved`. W: as many times C as later products need of the values."""

    inv_norm: Tensor  # [B, N], 1 / max(norm, 1e-12) of the keys
    cosine: Tensor  # [B, N], of a token and its own centre
    pooled: Tensor  # [B, O, C], bin means of the keys
    pooled_inv_norm: Tensor  # [B, O]
    inv_bin_count: Tensor  # [B, O], 1 / tokens of the bin
    weight_sum: Tensor  # [B, O], 1 + the weights of the centre's tokens
    centres: Tensor  # [B, O, W]
    folded: Tensor  # [B, O, T * C], keys of all later rounds and the last values; of the first round
    matrix: Tensor  # [B, N, O], all cosines; of variant paper


class Image(NamedTuple):
    """Tokens [height, width], bins [rows, columns]."""

    height: int
    width: int
    rows: int
    columns: int


def layouts(
    hw: Sequence[int], grids: Sequence[int], channels: int, variant: int
) -> list[tuple[Image, list[tuple[int, ...]]]]:
    """By round, its image and the shapes of a sample's `Saved`. variant: 0 paper, 1 released."""
    sizes, found = [*hw, *grids], []
    for t in range(len(grids) // 2):
        image = Image(*sizes[2 * t : 2 * t + 4])
        n, o = image.height * image.width, image.rows * image.columns
        left = len(grids) // 2 - t  # rounds
        width, folded = (1, left) if t == 0 else (left, 0)
        per_centre = (o, channels), (o,), (o,), (o,), (o, channels * width), (o, channels * folded)
        found.append((image, [(n,), (n,), *per_centre, (n, 0 if variant else o)]))
    return found


def views(saved: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Saved, Tensor]:
    """(of the first columns of `saved` [B, *], the other columns)."""
    parts = []
    for shape in shapes:
        parts.append(saved[:, : math.prod(shape)].unflatten(1, shape))
        saved = saved[:, _size(shape) :]
    return Saved(*parts), saved


def _size(shape: tuple[int, ...]) -> int:
    """Whole vectors of 16 bytes."""
    return -(-math.prod(shape) // 4) * 4


def saved_size(dtype: torch.dtype, tokens: int, centres: int, channels: int) -> int:
    """Elements of a sample's row of `saved` of the operator `cluster`."""
    return saved_layout(dtype, (1, tokens), (1, centres), channels, 1)[1]


def saved_layout(
    _dtype: torch.dtype, hw: Sequence[int], grids: Sequence[int], channels: int, variant: int
) -> tuple[int, int]:
    """(labels, elements of `saved`) of a sample of `icm`."""
    found = [shapes for _, shapes in layouts(hw, grids, channels, variant)]
    return sum(shapes[0][0] for shapes in found), sum(_size(shape) for shapes in found for shape in shapes)
