"""First Triton kernel of a round: bin means, and from them what the tokens' keys are multiplied with.

With keys Wk x + bk the score of token x and centre o is x . (unit_o Wk) + unit_o . bk: the matrix of scores needs no
keys of tokens. `matrix` is that unit Wk [O, C] (or unit itself), for 16-bit tokens in exact parts of their dtype.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from .._triton_ops import compute_type, matmul_add, widen
from .triton_tiles import (
    bin_bounds,
    inverse_norm,
    is_last,
    load_rows,
    load_tokens,
    load_turned,
    next_part,
    pieces,
    store_rows,
)


@triton.jit
def bin_sums(
    item,
    steps,
    mask,
    mask_step,
    first,
    image,
    grid,
    channel,
    channels,
    MASKED: tl.constexpr,
    BINS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """(sums [bin, channel] over the tokens of the bins first .. first + BINS that take part, their numbers [bin]).
    image: height, width; grid: rows, columns."""
    spot = tl.arange(0, BINS * TOKENS)
    bin = first + spot // TOKENS
    top, bottom = bin_bounds(bin // grid[1], image[0], grid[0])
    left, right = bin_bounds(bin % grid[1], image[1], grid[1])
    across = right - left
    pixels = tl.where(bin < grid[0] * grid[1], (bottom - top) * across, 0)
    total = tl.zeros((BINS, channel.shape[0]), compute_type(item.dtype.element_ty))
    number = tl.zeros((BINS,), tl.int32)
    for begin in range(0, tl.max(pixels, axis=0), TOKENS):
        i = begin + spot % TOKENS
        token = (top + i // across) * image[1] + left + i % across
        held = i < pixels
        if MASKED:
            held = held & (tl.load(mask + token.to(tl.int64) * mask_step, mask=held, other=0) != 0)
        number += tl.sum(held.to(tl.int32).reshape(BINS, TOKENS), axis=1)
        values = widen(load_tokens(item, steps, token, held, channel, channels))
        total += tl.sum(values.reshape(BINS, TOKENS, channel.shape[0]), axis=1)
    return total, number


@triton.jit
def _key_rows(
    pooled,
    weight,
    bias,
    keys,
    row,
    rows,
    channels,
    PROJECTED: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the keys of pooled tokens where PROJECTED, and returns the sums of their squares [row]."""
    square = tl.zeros((row.shape[0],), pooled.dtype.element_ty)
    for first in range(0, channels, CHANNELS):
        column = first + tl.arange(0, CHANNELS)
        if PROJECTED:
            key = tl.zeros((row.shape[0], CHANNELS), square.dtype)
            for inner in range(0, channels, CHANNELS):
                source = inner + tl.arange(0, CHANNELS)
                some = load_rows(pooled, row, rows, source, channels)
                factors = widen(load_turned(weight, column, channels, source, channels)).to(square.dtype)
                key = matmul_add(some, factors, key, PRECISION)
            key += widen(tl.load(bias + column, mask=column < channels, other=0.0)).to(square.dtype)[None, :]
            store_rows(keys, row, rows, column, channels, key)
        else:
            key = load_rows(pooled, row, rows, column, channels)
        square += tl.sum(key * key, axis=1)
    return square


@triton.jit
def _unit_rows(
    keys,
    scale,
    bias,
    unit,
    query,
    row,
    rows,
    channels,
    PROJECTED: tl.constexpr,
    QUERY: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Writes the keys times their scale, and returns their products with the bias [row]."""
    offset = tl.zeros((row.shape[0],), keys.dtype.element_ty)
    for first in range(0, channels, CHANNELS):
        column = first + tl.arange(0, CHANNELS)
        value = load_rows(keys, row, rows, column, channels) * scale[:, None]
        store_rows(unit, row, rows, column, channels, value)
        if QUERY:
            store_rows(query, row, rows, column, channels, value)
        some = tl.zeros((CHANNELS,), offset.dtype)  # a NaN passes
        if PROJECTED:
            some = widen(tl.load(bias + column, mask=column < channels, other=0.0)).to(offset.dtype)
        offset += tl.sum(value * some[None, :], axis=1)
    return offset


@triton.jit
def project_rows(matrix, weight, out, row, rows, channels, CHANNELS: tl.constexpr, PRECISION: tl.constexpr):
    """out [row, C] = matrix [row, C] weight [C, C]."""
    for first in range(0, channels, CHANNELS):
        column = first + tl.arange(0, CHANNELS)
        total = tl.zeros((row.shape[0], CHANNELS), matrix.dtype.element_ty)
        for inner in range(0, channels, CHANNELS):
            source = inner + tl.arange(0, CHANNELS)
            some = load_rows(matrix, row, rows, source, channels)
            factors = widen(load_rows(weight, source, channels, column, channels)).to(total.dtype)
            total = matmul_add(some, factors, total, PRECISION)
        store_rows(out, row, rows, column, channels, total)


@triton.jit
def _range_of(rows_of, row, rows, channels, CHANNELS: tl.constexpr):
    """(powers of two that bring the largest element of each row near 2^10, their inverses): float16 then has room
    for two whole parts."""
    peak = tl.zeros((row.shape[0],), tl.float32)
    for first in range(0, channels, CHANNELS):
        column = first + tl.arange(0, CHANNELS)
        peak = tl.maximum(peak, tl.max(tl.abs(load_rows(rows_of, row, rows, column, channels)), axis=1))
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 255
    ordinary = (exponent > 40) & (exponent < 255)
    shift = tl.where(ordinary, 264 - exponent, 127)
    return (shift << 23).to(tl.float32, bitcast=True), ((254 - shift) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _write_parts(source, matrix, row_scale, row, rows, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """matrix [PARTS, rows, C]: parts of source [rows, C] times powers of two whose inverses row_scale [rows] takes."""
    dtype: tl.constexpr = matrix.dtype.element_ty
    up = tl.full((row.shape[0],), 1.0, source.dtype.element_ty)
    down = up
    if dtype == tl.float16:
        up, down = _range_of(source, row, rows, channels, CHANNELS)
    tl.store(row_scale + row, down, mask=row < rows)
    for first in range(0, channels, CHANNELS):
        column = first + tl.arange(0, CHANNELS)
        rest = load_rows(source, row, rows, column, channels) * up[:, None]
        if PARTS == 1:
            store_rows(matrix, row, rows, column, channels, rest)
        else:
            for p in tl.static_range(PARTS):
                part, rest = next_part(rest, dtype)
                at = p * rows * channels + row[:, None] * channels + column[None, :]
                tl.store(matrix + at, part, mask=(row < rows)[:, None] & (column < channels)[None, :])


@triton.jit
def centre_keys(
    pooled,  # of the keys' tokens [O, C]
    record,
    weight,
    bias,
    matrix,
    row_scale,
    offset,
    query,
    projected,
    first,
    tokens,
    centres,
    channels,
    PROJECTED: tl.constexpr,
    QUERY: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """unit, unit_scale, matrix, row_scale and offset of the centres first .. first + GROUP of an item; QUERY: query
    and projected as well, which for the last round are unit and unit Wk. Every pointer is the item's."""
    _, _, _, unit, mean, result, unit_scale, _, _ = pieces(record, tokens, centres, channels)
    row = first + tl.arange(0, GROUP)
    # The round writes `mean` and `result` later; until then they hold keys and products.
    square = _key_rows(pooled, weight, bias, mean, row, centres, channels, PROJECTED, CHANNELS, PRECISION)
    scale = inverse_norm(square)
    tl.store(unit_scale + row, scale, mask=row < centres)
    tl.debug_barrier()
    keys = mean if PROJECTED else pooled
    moved = _unit_rows(keys, scale, bias, unit, query, row, centres, channels, PROJECTED, QUERY, CHANNELS)
    tl.store(offset + row, moved, mask=row < centres)
    tl.debug_barrier()
    source = unit
    if PROJECTED:
        project_rows(unit, weight, result, row, centres, channels, CHANNELS, PRECISION)
        tl.debug_barrier()
        source = result
    _write_parts(source, matrix, row_scale, row, centres, channels, PARTS, CHANNELS)
    if QUERY:
        for begin in range(0, channels, CHANNELS):
            column = begin + tl.arange(0, CHANNELS)
            store_rows(
                projected, row, centres, column, channels, load_rows(source, row, centres, column, channels)
            )


@triton.jit
def pool(
    keys,
    values,
    mask,
    saved,  # [B, length], this round's record at `record_at`
    pooled_keys,  # [B, O, C]; unused where SHARED
    matrix,  # [B, PARTS, O, C]
    row_scale,  # [B, O]
    offset,  # [B, offset_step]
    query,  # [B, ...] at the record's step, where QUERY
    projected,
    weight,  # Wk [C, C]
    bias,  # bk [C]
    tickets,  # [B, groups of bins]
    key_batch,
    key_token,
    key_channel,
    value_batch,
    value_token,
    value_channel,
    mask_batch,
    mask_token,
    length,
    record_at,
    offset_step,
    height,
    width,
    rows,
    columns,
    channels,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    PROJECTED: tl.constexpr,
    QUERY: tl.constexpr,
    PARTS: tl.constexpr,
    BINS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Bin means; the last program of GROUP bins, whole blocks, makes their keys. SHARED: keys are the values.

    Grid: (items * blocks of BINS * slices of the channels,), the last fastest.
    """
    slices = tl.cdiv(channels, SLICE)
    centres = rows * columns
    blocks = tl.cdiv(centres, BINS)
    item = (tl.program_id(0) // slices // blocks).to(tl.int64)
    first = tl.program_id(0) // slices % blocks * BINS
    tokens = height * width
    record = saved + item * length + record_at
    _, _, pooled, _, _, _, _, _, share = pieces(record, tokens, centres, channels)
    bin = first + tl.arange(0, BINS)
    channel = tl.program_id(0) % slices * SLICE + tl.arange(0, SLICE)
    held = mask + item * mask_batch
    source = pooled
    # fmt: off
    total, number = bin_sums(
        values + item * value_batch, (value_token, value_channel), held, mask_token, first, (height, width),
        (rows, columns), channel, channels, MASKED, BINS, TOKENS,
    )
    divisor = tl.maximum(number, 1).to(total.dtype)
    store_rows(pooled, bin, centres, channel, channels, total / divisor[:, None])
    tl.store(share + bin, tl.where(number > 0, 1.0 / divisor, 0.0), mask=bin < centres)
    if not SHARED:
        source = pooled_keys + item * centres * channels
        total, number = bin_sums(
            keys + item * key_batch, (key_token, key_channel), held, mask_token, first, (height, width),
            (rows, columns), channel, channels, MASKED, BINS, TOKENS,
        )
        store_rows(source, bin, centres, channel, channels, total / divisor[:, None])
    group = first // GROUP
    members = tl.cdiv(tl.minimum(centres - group * GROUP, GROUP), BINS)
    if is_last(tickets + item * tl.cdiv(centres, GROUP) + group, members * slices):
        centre_keys(
            source, record, weight, bias, matrix + item * PARTS * centres * channels, row_scale + item * centres,
            offset + item * offset_step, query + item * length, projected + item * length, group * GROUP,
            tokens, centres, channels, PROJECTED, QUERY, PARTS, GROUP, CHANNELS, PRECISION,
        )
    # fmt: on
