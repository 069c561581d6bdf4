"""Device functions that every Triton kernel with a difference stencil shares.

A tile of positions x channels is a block of any shape: position indices broadcast along its channels, channel
indices along its positions, in whichever order the memory is contiguous. What a position reads is its
*window*, a tuple of tiles in the compute type (float32, float64 for float64), zero outside the image; slot i
of it stands at `slot_y(KIND, i)`, `slot_x(KIND, i)` steps of the dilation from the first tap. 3x3 kinds: the 9
pixels, row-major. Radial: the centre, the outer ring, the inner ring. A kernel with a stencil as prologue:

    window = load_window(image, top, left, height, width, stride_y, stride_x, dilation_y, dilation_x, inside, KIND)
    hidden = combine(window, load_weights(weight, 1, real), bias, KIND, THETA)

The taps come from `taps.pairs`. KIND is an int (`kinds.Kind`) and THETA a float, both compile-time constants:
a program knows which terms are x - x.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .._triton_ops import widen_all
from .kinds import Kind
from .taps import Offset, pairs

WEIGHTS = tl.constexpr(9)


def _slots(kind: Kind) -> list[Offset]:
    read = [offset for pair in pairs(kind) for offset in pair[1:] if offset is not None]
    if kind != Kind.RADIAL:
        return sorted(set(read))  # row-major
    return list(dict.fromkeys(sorted(read, key=lambda offset: (offset != (0, 0), -max(map(abs, offset))))))


def _table(kind: Kind) -> dict[str, Any]:
    slots = _slots(kind)
    reach = max(dy for dy, _ in slots)
    return {
        "offsets": [(dy + reach, dx + reach) for dy, dx in slots],
        "rotated": [slots.index((-dy, -dx)) for dy, dx in slots],
        "plus": [slots.index(plus) for _, plus, _ in pairs(kind)],
        "minus": [-1 if minus is None else slots.index(minus) for _, _, minus in pairs(kind)],
        "reach": reach,
    }


_TABLES = [_table(kind) for kind in Kind]


@triton.constexpr_function
def slot_count(kind: int) -> int:
    return len(_TABLES[kind]["offsets"])


@triton.constexpr_function
def slot_y(kind: int, slot: int) -> int:
    return _TABLES[kind]["offsets"][slot][0]


@triton.constexpr_function
def slot_x(kind: int, slot: int) -> int:
    return _TABLES[kind]["offsets"][slot][1]


@triton.constexpr_function
def rotated_slot(kind: int, slot: int) -> int:
    """Where the window rotated by 180 degrees has the pixel of `slot`."""
    return _TABLES[kind]["rotated"][slot]


@triton.constexpr_function
def plus_slot(kind: int, k: int) -> int:
    return _TABLES[kind]["plus"][k]


@triton.constexpr_function
def minus_slot(kind: int, k: int) -> int:
    """-1: nothing is subtracted."""
    return _TABLES[kind]["minus"][k]


@triton.constexpr_function
def reach(kind: int) -> int:
    """Steps of the dilation from the centre of the window to its edge: the first tap of output row r stands at
    r * stride - padding for a padding as for a kernel of side 2 * reach + 1."""
    return _TABLES[kind]["reach"]


@triton.constexpr_function
def is_zero_term(kind: int, theta: float, k: int) -> bool:
    """Weight k multiplies x - x, which counts as 0 whatever x."""
    table = _TABLES[kind]
    return theta == 1.0 and table["plus"][k] == table["minus"][k]


@triton.jit
def load_window(
    image,
    top,
    left,
    height,
    width,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    inside,
    KIND: tl.constexpr,
):
    """The window of each position.

    image: pointers to pixel (0, 0) of each channel (the base offset of the image, 64 bit, is in them);
    top, left: int32, the row and the column of the first tap (outside the image is fine);
    height, width, stride_y, stride_x: of the image, offsets inside it fit 32 bits;
    inside: mask of what exists of the tile. The arguments broadcast to the tile.
    """
    corner = image + (top * stride_y + left * stride_x)
    window = ()
    for slot in tl.static_range(slot_count(KIND)):
        below = slot_y(KIND, slot) * dilation_y
        beside = slot_x(KIND, slot) * dilation_x
        row = top + below
        column = left + beside
        mask = inside & ((row >= 0) & (row < height)) & ((column >= 0) & (column < width))
        window += (tl.load(corner + (below * stride_y + beside * stride_x), mask=mask, other=0.0),)
    return widen_all(window, slot_count(KIND))


@triton.jit
def load_spread_window(
    image,
    top,
    left,
    height,
    width,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    spread_y,
    spread_x,
    inside,
    KIND: tl.constexpr,
):
    """`load_window` of the image with spread - 1 zeros put between its pixels: the stride of a gradient."""
    window = ()
    for slot in tl.static_range(slot_count(KIND)):
        row = top + slot_y(KIND, slot) * dilation_y
        column = left + slot_x(KIND, slot) * dilation_x
        mask = inside & ((row >= 0) & (row < height * spread_y) & (row % spread_y == 0))
        mask = mask & ((column >= 0) & (column < width * spread_x) & (column % spread_x == 0))
        at = (row // spread_y) * stride_y + (column // spread_x) * stride_x
        window += (tl.load(image + at, mask=mask, other=0.0),)
    return widen_all(window, slot_count(KIND))


@triton.jit
def load_weights(weight, stride, mask):
    """The 9 weights of each channel in the compute type. weight: pointers to the first one, stride: to the next
    (1 for a parameter [C, 1, 3, 3], the pitch for one that is packed [9, C])."""
    weights = ()
    for k in tl.static_range(WEIGHTS):
        weights += (tl.load(weight + k * stride, mask=mask, other=0.0),)
    return widen_all(weights, WEIGHTS)


@triton.jit
def differences(window, KIND: tl.constexpr, THETA: tl.constexpr):
    """x_plus - theta x_minus of each weight; nothing is computed of one that is x - x."""
    found = ()
    for k in tl.static_range(WEIGHTS):
        if minus_slot(KIND, k) < 0 or is_zero_term(KIND, THETA, k):
            found += (window[plus_slot(KIND, k)],)
        elif THETA == 1.0:
            found += (window[plus_slot(KIND, k)] - window[minus_slot(KIND, k)],)
        else:
            found += (window[plus_slot(KIND, k)] - THETA * window[minus_slot(KIND, k)],)
    return found


@triton.jit
def combine(window, weights, start, KIND: tl.constexpr, THETA: tl.constexpr):
    """start + sum_k w_k (x_plus - theta x_minus), in the compute type; start: a tile, or what broadcasts to it
    (the bias), or 0.0."""
    factors = differences(window, KIND, THETA)
    total = start
    for k in tl.static_range(WEIGHTS):
        if not is_zero_term(KIND, THETA, k):
            total = total + weights[k] * factors[k]
    return total


@triton.jit
def correlate(sums, window, grad, KIND: tl.constexpr, THETA: tl.constexpr):
    """The 9 tiles of sums of dw, each plus grad * (x_plus - theta x_minus)."""
    factors = differences(window, KIND, THETA)
    added = ()
    for k in tl.static_range(WEIGHTS):
        if is_zero_term(KIND, THETA, k):
            added += (sums[k],)
        else:
            added += (sums[k] + grad * factors[k],)
    return added


@triton.jit
def rotate(window, KIND: tl.constexpr):
    """The window rotated by 180 degrees."""
    rotated = ()
    for slot in tl.static_range(slot_count(KIND)):
        rotated += (window[rotated_slot(KIND, slot)],)
    return rotated


@triton.jit
def plain_weights(weights, KIND: tl.constexpr, THETA: tl.constexpr):
    """For the 3x3 kinds, the weights of the plain kernel; radial stays a sum of differences."""
    plain = ()
    for tap in tl.static_range(WEIGHTS):
        total = weights[tap]
        for k in tl.static_range(WEIGHTS):
            if minus_slot(KIND, k) == tap:
                total = total - THETA * weights[k]
        plain += (total,)
    return plain


@triton.jit
def combine_transposed(window, weights, KIND: tl.constexpr, THETA: tl.constexpr):
    """dx from the window of dy: sum_k w_k (dy(p - plus_k) - theta dy(p - minus_k)). weights: radial: the
    parameter's; 3x3 kinds: `plain_weights` of them."""
    rotated = rotate(window, KIND)
    if KIND == 3:
        total = combine(rotated, weights, 0.0, KIND, THETA)
    else:
        total = tl.zeros_like(rotated[0])
        for k in tl.static_range(WEIGHTS):
            # The centre tap of angular is w - theta w; central's is the sum of all the others.
            if KIND != 2 or not is_zero_term(KIND, THETA, k):
                total += weights[k] * rotated[k]
    return total
