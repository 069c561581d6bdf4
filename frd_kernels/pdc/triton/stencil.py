"""Device functions of the difference stencil, shared by the kernels of the convolution and of the PDC block.

Tiles hold positions x channels in either order: position indices broadcast along the channels, channel indices along
the positions. What a position reads is its *window*, a tuple of tiles in the compute type (float32, float64 for
float64), zero outside the image. Slot i of a window is `slot_y(KIND, i)`, `slot_x(KIND, i)` steps of the dilation from
its first tap. 3x3 kinds: the 9 pixels, row-major. Radial: the centre, the outer ring, the inner ring.

    top, left = window_corner(position, geometry)
    window = load_window(image, top, left, geometry, mask, CHANNELS_FIRST, KIND)
    y = combine(window, load_weights(weight, 1, mask), bias, KIND, THETA)

The taps come from `taps.pairs`. KIND is an int (`kinds.Kind`) and THETA a float, both compile-time constants:
a program knows which terms are x - x.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..._triton_ops import widen_all
from ..kinds import Kind
from ..taps import Offset, pairs

WEIGHTS = tl.constexpr(9)


class Geometry(NamedTuple):
    """Of a convolution of x [B, channels, height, width] to y [B, channels, rows, columns]. pad: the padding as for a
    kernel of the window's size, which for radial is 5."""

    channels: int
    height: int
    width: int
    rows: int
    columns: int
    stride_y: int
    stride_x: int
    pad_y: int
    pad_x: int
    dilation_y: int
    dilation_x: int


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
    """Steps of the dilation from the centre of the window to its edge."""
    return _TABLES[kind]["reach"]


@triton.constexpr_function
def is_zero_term(kind: int, theta: float, k: int) -> bool:
    """Weight k multiplies x - x, which counts as 0 whatever x."""
    table = _TABLES[kind]
    return theta == 1.0 and table["plus"][k] == table["minus"][k]


@triton.jit
def window_corner(position, geometry):
    """Row and column in x of the first tap of output positions."""
    top = position // geometry.columns * geometry.stride_y - geometry.pad_y
    return top, position % geometry.columns * geometry.stride_x - geometry.pad_x


@triton.jit
def load_window(image, top, left, geometry, mask, CHANNELS_FIRST: tl.constexpr, KIND: tl.constexpr):
    """The window of x of each output position.

    image: pointers to pixel (0, 0) of each channel, which contain the 64-bit offset of the image: offsets inside it
    fit 32 bits. top, left: of the first tap, possibly outside the image. All broadcast to the tile.
    """
    pixel_stride = 1 if CHANNELS_FIRST else geometry.channels
    row_stride = geometry.width * pixel_stride
    corner = image + (top * row_stride + left * pixel_stride)
    window = ()
    for slot in tl.static_range(slot_count(KIND)):
        dy = slot_y(KIND, slot) * geometry.dilation_y
        dx = slot_x(KIND, slot) * geometry.dilation_x
        row = top + dy
        column = left + dx
        inside = mask & ((row >= 0) & (row < geometry.height)) & ((column >= 0) & (column < geometry.width))
        window += (tl.load(corner + (dy * row_stride + dx * pixel_stride), mask=inside, other=0.0),)
    return widen_all(window, slot_count(KIND))


@triton.jit
def load_gradient_window(image, top, left, geometry, mask, CHANNELS_FIRST: tl.constexpr, KIND: tl.constexpr):
    """The window of dy that reaches each position of x: `load_window` of dy with stride - 1 zeros between its pixels.

    top, left: of the first tap, in pixels of dy with these zeros.
    """
    pixel_stride = 1 if CHANNELS_FIRST else geometry.channels
    row_stride = geometry.columns * pixel_stride
    stride_y = geometry.stride_y
    stride_x = geometry.stride_x
    window = ()
    for slot in tl.static_range(slot_count(KIND)):
        row = top + slot_y(KIND, slot) * geometry.dilation_y
        column = left + slot_x(KIND, slot) * geometry.dilation_x
        inside = mask & ((row >= 0) & (row < geometry.rows * stride_y) & (row % stride_y == 0))
        inside = inside & ((column >= 0) & (column < geometry.columns * stride_x) & (column % stride_x == 0))
        at = (row // stride_y) * row_stride + (column // stride_x) * pixel_stride
        window += (tl.load(image + at, mask=inside, other=0.0),)
    return widen_all(window, slot_count(KIND))


@triton.jit
def load_weights(weight, stride, mask):
    """The 9 weights of each channel in the compute type. weight: pointers to the first one; stride: from one to the
    next, 1 of a parameter [C, 1, 3, 3], C of one that is packed as [9, C]."""
    weights = ()
    for k in tl.static_range(WEIGHTS):
        weights += (tl.load(weight + k * stride, mask=mask, other=0.0),)
    return widen_all(weights, WEIGHTS)


@triton.jit
def differences(window, KIND: tl.constexpr, THETA: tl.constexpr):
    """x_plus_k - theta x_minus_k for each weight k; the terms x - x are not computed."""
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
    """start + sum_k w_k (x_plus_k - theta x_minus_k), in the compute type. start: broadcasts to the tile, as the bias
    or 0.0 do."""
    factors = differences(window, KIND, THETA)
    total = start
    for k in tl.static_range(WEIGHTS):
        if not is_zero_term(KIND, THETA, k):
            total = total + weights[k] * factors[k]
    return total


@triton.jit
def correlate(sums, window, grad, KIND: tl.constexpr, THETA: tl.constexpr):
    """dw_k + dy (x_plus_k - theta x_minus_k) for the 9 tiles of sums dw_k."""
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
    """3x3 kinds: the weights of the equivalent plain kernel, sum_{k: plus_k = tap} w_k - theta sum_{k: minus_k = tap}
    w_k for each tap."""
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
    """dx(p) = sum_k w_k (dy(p - plus_k) - theta dy(p - minus_k)) from the window of dy. weights: of radial the
    parameter's, of the 3x3 kinds their `plain_weights`."""
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
