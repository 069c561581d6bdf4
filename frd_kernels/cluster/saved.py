"""The layout of `saved`, what a round of the C++ kernels keeps for its backward: the one statement of it in Python, as
csrc/cluster/saved.h is in C++. The CPU reads what CUDA wrote, and the other way around."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, similarities and `saved` for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class SavedRound(NamedTuple):
    """Where the parts of a round begin in a sample's row of `saved`, in elements.

    The round has N tokens, O centres and C channels; J centres has the last round of variant paper. The cosine is that
    of a token and its own centre, an inverse norm is 1 / max(norm, 1e-12), pooled and mean are the bin means and the
    centres before Wv, unit the normalised keys of the pooled tokens, result the centres.
    """

    cosine: int  # [N]
    inv_norm: int  # [N]
    pooled: int  # [O, C]
    unit: int  # [O, C]
    mean: int  # [O, C]
    result: int  # [O, C]
    unit_inv_norm: int  # [O]
    weight_sum: int  # [O]
    inv_bin_count: int  # [O]
    query: int  # [J, C], variant paper alone, as what follows
    projected: int  # [J, C]
    offset: int  # [J]
    product: int  # [N, J], not in the first round
    end: int


def saved_round(
    begin: int, tokens: int, centres: int, channels: int, columns: int = 0, first: bool = True
) -> SavedRound:
    """The layout of a round whose parts begin at `begin`. columns: J, 0 without a dense dispatch."""
    matrix, query = centres * channels, columns * channels
    dense = [query, query, columns, 0 if first else tokens * columns]
    sizes = [tokens, tokens, *[matrix] * 4, *[centres] * 3, *dense]
    return SavedRound(*itertools.accumulate(sizes, initial=begin))


def saved_size(_dtype: torch.dtype, tokens: int, centres: int, channels: int) -> int:
    """Elements of a sample's row of `saved` of the operator `cluster`."""
    return saved_round(0, tokens, centres, channels).end


class RoundLayout(NamedTuple):
    """A round of `icm`: its tokens form an image `hw`, its centres a grid; where its parts of a sample's labels and of
    its row of `saved` begin."""

    hw: tuple[int, int]
    grid: tuple[int, int]
    labels: int
    saved: SavedRound

    @property
    def tokens(self) -> int:
        return self.hw[0] * self.hw[1]

    @property
    def centres(self) -> int:
        return self.grid[0] * self.grid[1]


def round_layouts(
    hw: Sequence[int], grids: Sequence[int], channels: int, variant: int
) -> tuple[list[RoundLayout], int, int]:
    """(rounds, labels, elements of `saved`) of a sample of `icm`. variant: 0 paper, 1 released."""
    columns = grids[-2] * grids[-1] if variant == 0 else 0
    image, labels, begin = (hw[0], hw[1]), 0, 0
    rounds: list[RoundLayout] = []
    for t in range(len(grids) // 2):
        grid = grids[2 * t], grids[2 * t + 1]
        tokens = image[0] * image[1]
        saved = saved_round(begin, tokens, grid[0] * grid[1], channels, columns, t == 0)
        rounds.append(RoundLayout(image, grid, labels, saved))
        labels += tokens
        begin, image = saved.end, grid
    return rounds, labels, begin


def saved_layout(
    _dtype: torch.dtype, hw: Sequence[int], grids: Sequence[int], channels: int, variant: int
) -> tuple[int, int]:
    """(labels, elements of `saved`) of a sample of `icm`."""
    return round_layouts(hw, grids, channels, variant)[1:]
