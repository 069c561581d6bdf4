"""How a photo is split for the network: the size policies, and overlapping tiles whose weights sum to one."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

POLICIES = ("auto", "whole", "tiles", "resize")
WHOLE_LIMIT = 1024 * 1024
TILE = 512
OVERLAP = 64
RESIZE = 512
MIN_SIDE = 32


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of evenly spaced tiles that cover `length` and overlap by at least `overlap`."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def blend_windows(length: int, tile: int, overlap: int) -> list[tuple[int, npt.NDArray[np.float32]]]:
    """(start, weights) of each tile along one axis; the weights of all tiles sum to one at every pixel.

    Ramps across the overlap; the product of a row's and a column's weights is the weight of a 2-D tile, so no
    image of weights is ever in memory.
    """
    starts = tile_starts(length, tile, overlap)
    extent = min(tile, length)
    distance = np.minimum(np.arange(extent), np.arange(extent)[::-1]) + 1.0
    ramp = np.minimum(distance / (overlap + 1.0), 1.0)
    total = np.zeros(length)
    for start in starts:
        total[start : start + extent] += ramp
    return [(s, (ramp / total[s : s + extent]).astype(np.float32)) for s in starts]
