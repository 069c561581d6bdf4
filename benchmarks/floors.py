"""What no implementation can go below: the least bytes it has to move, the arithmetic that it cannot leave out.

Bytes count every image once where it is read and once where it is written, T being the bytes of one image; data that
stays in a cache between calls can beat this floor, cold data cannot. Arithmetic counts matrix products alone, with the
taps that a difference convolution really has (angular and radial: eight).
"""

from __future__ import annotations

import math
from typing import Any

from .calibrate import Rates
from .cases import Case

TAPS = {"angular": 8, "central": 9, "radial": 8, "vanilla": 9}
FIRST_CENTRES = 64  # of the ICM's grids


def least_bytes(case: Case) -> int:
    """In forward+backward the backward pass comes on top: it reads x and dy and writes dx."""
    image = math.prod(case.shape) * case.dtype.itemsize
    op, backward = case.op.split()[0], case.backward
    if op == "pdc_weight":
        outer = 25 if case.op.endswith("radial") else 9
        return math.prod(case.shape[:2]) * case.dtype.itemsize * (9 + outer) * (2 if backward else 1)
    if op == "dpm":  # two blocks: the second one needs its neighbours' results of the first
        return image * (10 if backward else 4)
    if op == "cluster":  # keys and values are read, the dispatched image is written
        return image * (8 if backward else 3)
    return image * (5 if backward else 2)


def least_flops(case: Case) -> int:
    """Of the matrix products; 0 where there are none. For the clustering those of the forward pass alone, as the
    backward pass can be put together from few more."""
    words = case.op.split()
    passes = 3 if case.backward else 1
    if words[0] == "pdc_weight" or words[-1] == "depthwise":
        return 0
    batch, channels, height, width = case.shape
    pixels = batch * height * width
    square = 2 * pixels * channels * channels
    if words[0] == "pdc":
        return passes * TAPS[words[1]] * square
    if words[0] == "pdc_block":
        return passes * (TAPS[words[1]] + 1) * square
    if words[0] == "dpm":
        return passes * 2 * square
    centres = FIRST_CENTRES if words[0] == "icm" else 0
    norms = square if words[0] == "icm" else 0  # of the keys
    return norms + 4 * pixels * channels * centres


def numbers(case: Case, rates: Rates, ours_ms: float) -> dict[str, dict[str, Any]]:
    """Floors by the machine's measured rates, `of_ours` as a part of our time (also under `ratio`, as for timed
    floors)."""
    found = {}
    times = {"memory": 1e3 * least_bytes(case) / rates.copy_bytes_per_s}
    rate = rates.matrix_flops_per_s.get(case.dtype_name)
    if rate and (flops := least_flops(case)):
        times["arithmetic"] = 1e3 * flops / rate
    for kind, milliseconds in times.items():
        part = milliseconds / ours_ms
        found[f"{kind} floor"] = {"ms": milliseconds, "of_ours": part, "ratio": part, "kind": kind}
    return found
