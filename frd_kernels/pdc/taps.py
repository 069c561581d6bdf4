"""The tap tables: which two pixels each weight of a kind multiplies the difference of.

For the reference and the Triton kernels; the C++ kernels have the same tables in `csrc/pdc/taps.h`. Definitions:
PiDiNet (Su et al., ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Iterator

from .kinds import Kind

# (vertical, horizontal) from the centre of the window, in steps of the dilation.
Offset = tuple[int, int]

# Weight index -> tap, row-major.
WINDOW: list[Offset] = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
CENTRE = 4
# The next neighbour clockwise (y points down) on the ring 0 1 2 5 8 7 6 3.
CLOCKWISE = {0: 1, 1: 2, 2: 5, 5: 8, 8: 7, 7: 6, 6: 3, 3: 0}
# Radial: weight k = 1..8 belongs to DIRECTIONS[k - 1], weight 0 (not 4) to the centre.
DIRECTIONS: list[Offset] = [tap for tap in WINDOW if tap != (0, 0)]


def pairs(kind: Kind) -> Iterator[tuple[int, Offset, Offset | None]]:
    """(weight index k, minuend, subtrahend) of y = sum_k w_k (x[minuend] - theta x[subtrahend])."""
    if kind == Kind.RADIAL:
        yield 0, (0, 0), (0, 0)
        for k, (dy, dx) in enumerate(DIRECTIONS, start=1):
            yield k, (2 * dy, 2 * dx), (dy, dx)
        return
    for k, tap in enumerate(WINDOW):
        if kind == Kind.VANILLA:
            yield k, tap, None
        elif kind == Kind.CENTRAL or k == CENTRE:
            yield k, tap, (0, 0)
        else:
            yield k, tap, WINDOW[CLOCKWISE[k]]
