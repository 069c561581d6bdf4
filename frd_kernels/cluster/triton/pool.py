"""First Triton kernel of a round: bin means, and from them the matrix that the tokens are multiplied with."""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, block_of, compute_type, matmul_add, widen
from .operands import MAX_REGISTERS, ROWS, Image, Round
from .tiles import (
    bin_bounds,
    inverse_norm,
    is_last,
    load_matrix,
    load_rows,
    load_transposed,
    next_part,
    store_matrix,
)


@triton.jit
def _bin_sums(
    view,
    sample,
    mask,
    first,
    image,
    channel,
    channels,
    MASKED: tl.constexpr,
    BINS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """(sums [bin, channel] over the tokens of the bins first .. first + BINS that take part, their numbers [bin])."""
    lane = tl.arange(0, BINS * TOKENS)
    bin = first + lane // TOKENS
    top, bottom = bin_bounds(bin // image.columns, image.height, image.rows)
    left, right = bin_bounds(bin % image.columns, image.width, image.columns)
    bin_width = right - left
    pixels = tl.where(bin < image.rows * image.columns, (bottom - top) * bin_width, 0)
    total = tl.zeros((BINS, channel.shape[0]), compute_type(view.start.dtype.element_ty))
    number = tl.zeros((BINS,), tl.int32)
    for begin in range(0, tl.max(pixels, axis=0), TOKENS):
        i = begin + lane % TOKENS
        token = (top + i // bin_width) * image.width + left + i % bin_width
        active = i < pixels
        if MASKED:
            at = mask.start + sample * mask.sample + token.to(tl.int64) * mask.token
            active = active & (tl.load(at, mask=active, other=0) != 0)
        number += tl.sum(active.to(tl.int32).reshape(BINS, TOKENS), axis=1)
        values = widen(load_rows(view, sample, token, channel, active, channels))
        total += tl.sum(values.reshape(BINS, TOKENS, channel.shape[0]), axis=1)
    return total, number


@triton.jit
def _key_rows(
    pooled,
    projection,
    keys,
    row,
    rows,
    channels,
    PROJECTED: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """PROJECTED: keys [row, C] = pooled Wk^T + bk. Returns the sums of the keys' squares [row]."""
    square = tl.zeros((row.shape[0],), pooled.dtype.element_ty)
    for first in range(0, channels, CHANNELS):
        column = first + tl.arange(0, CHANNELS)
        if PROJECTED:
            key = tl.zeros((row.shape[0], CHANNELS), square.dtype)
            for inner in range(0, channels, CHANNELS):
                source = inner + tl.arange(0, CHANNELS)
                tile = load_matrix(pooled, row, rows, source, channels)
                weight = load_transposed(projection.key_weight, column, channels, source, channels)
                key = matmul_add(tile, widen(weight).to(square.dtype), key, PRECISION)
            bias = widen(tl.load(projection.key_bias + column, mask=column < channels, other=0.0))
            key += bias.to(square.dtype)[None, :]
            store_matrix(keys, row, rows, column, channels, key)
        else:
            key = load_matrix(pooled, row, rows, column, channels)
        square += tl.sum(key * key, axis=1)
    return square


@triton.jit
def _unit_rows(
    keys,
    inv_norm,
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
    """unit [row, C] = keys * inv_norm. Returns unit . bias [row]."""
    offset = tl.zeros((row.shape[0],), keys.dtype.element_ty)
    for first in range(0, channels, CHANNELS):
        column = first + tl.arange(0, CHANNELS)
        value = load_matrix(keys, row, rows, column, channels) * inv_norm[:, None]
        store_matrix(unit, row, rows, column, channels, value)
        if QUERY:
            store_matrix(query, row, rows, column, channels, value)
        # Without a bias the product with zeros still makes a NaN of a key the offset's.
        factor = tl.zeros((CHANNELS,), offset.dtype)
        if PROJECTED:
            factor = widen(tl.load(bias + column, mask=column < channels, other=0.0)).to(offset.dtype)
        offset += tl.sum(value * factor[None, :], axis=1)
    return offset


@triton.jit
def project_rows(matrix, weight, out, row, rows, channels, CHANNELS: tl.constexpr, PRECISION: tl.constexpr):
    """out [row, C] = matrix [row, C] weight [C, C]."""
    for first in range(0, channels, CHANNELS):
        column = first + tl.arange(0, CHANNELS)
        total = tl.zeros((row.shape[0], CHANNELS), matrix.dtype.element_ty)
        for inner in range(0, channels, CHANNELS):
            source = inner + tl.arange(0, CHANNELS)
            tile = load_matrix(matrix, row, rows, source, channels)
            factors = widen(load_matrix(weight, source, channels, column, channels)).to(total.dtype)
            total = matmul_add(tile, factors, total, PRECISION)
        store_matrix(out, row, rows, column, channels, total)


@triton.jit
def _float16_range(matrix, row, rows, channels, CHANNELS: tl.constexpr):
    """(powers of two that bring the largest element of each row near 2^10, their inverses): float16 then has room
    for two whole parts."""
    peak = tl.zeros((row.shape[0],), tl.float32)
    for first in range(0, channels, CHANNELS):
        column = first + tl.arange(0, CHANNELS)
        peak = tl.maximum(peak, tl.max(tl.abs(load_matrix(matrix, row, rows, column, channels)), axis=1))
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 255
    ordinary = (exponent > 40) & (exponent < 255)
    shift = tl.where(ordinary, 264 - exponent, 127)
    return (shift << 23).to(tl.float32, bitcast=True), ((254 - shift) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store_parts(source, matrix, row_scale, row, rows, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """matrix [PARTS, rows, C]: parts of source [rows, C] times powers of two whose inverses row_scale [rows] takes."""
    dtype: tl.constexpr = matrix.dtype.element_ty
    up = tl.full((row.shape[0],), 1.0, source.dtype.element_ty)
    down = up
    if dtype == tl.float16:
        up, down = _float16_range(source, row, rows, channels, CHANNELS)
    tl.store(row_scale + row, down, mask=row < rows)
    for first in range(0, channels, CHANNELS):
        column = first + tl.arange(0, CHANNELS)
        rest = load_matrix(source, row, rows, column, channels) * up[:, None]
        if PARTS == 1:
            store_matrix(matrix, row, rows, column, channels, rest)
        else:
            for p in tl.static_range(PARTS):
                part, rest = next_part(rest, dtype)
                at = p * rows * channels + row[:, None] * channels + column[None, :]
                tl.store(matrix + at, part, mask=(row < rows)[:, None] & (column < channels)[None, :])


@triton.jit
def _centre_keys(
    pooled,
    sample,
    record,
    layout,
    scores,
    projection,
    first,
    centres,
    channels,
    PROJECTED: tl.constexpr,
    QUERY: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """unit, unit_inv_norm and `scores` of the centres first .. first + GROUP of a sample, from the bin means of the
    keys' tokens `pooled` [O, C]; QUERY: query and projected as well, which for the last round are unit and unit Wk.
    record: the sample's row of `saved`."""
    row = first + tl.arange(0, GROUP)
    unit = record + layout.unit
    # The round writes `mean` and `result` later; until then they hold keys and products.
    keys = record + layout.mean
    square = _key_rows(pooled, projection, keys, row, centres, channels, PROJECTED, CHANNELS, PRECISION)
    inv_norm = inverse_norm(square)
    tl.store(record + layout.unit_inv_norm + row, inv_norm, mask=row < centres)
    tl.debug_barrier()
    keys = keys if PROJECTED else pooled
    query = record + layout.query
    # fmt: off
    offset = _unit_rows(
        keys, inv_norm, projection.key_bias, unit, query, row, centres, channels, PROJECTED, QUERY, CHANNELS
    )
    tl.store(scores.offset + sample * scores.offset_sample + row, offset, mask=row < centres)
    tl.debug_barrier()
    source = unit
    if PROJECTED:
        source = record + layout.result
        project_rows(unit, projection.key_weight, source, row, centres, channels, CHANNELS, PRECISION)
        tl.debug_barrier()
    matrix = scores.matrix + sample * PARTS * centres * channels
    _store_parts(
        source, matrix, scores.row_scale + sample * centres, row, centres, channels, PARTS, CHANNELS
    )
    # fmt: on
    if QUERY:
        for begin in range(0, channels, CHANNELS):
            column = begin + tl.arange(0, CHANNELS)
            value = load_matrix(source, row, centres, column, channels)
            store_matrix(record + layout.projected, row, centres, column, channels, value)


@triton.jit
def pool(
    keys,
    values,
    mask,
    saved,  # Vector
    layout,
    pooled_keys,  # [B, O, C]; unused where SHARED
    scores,
    projection,
    counters,  # [B, groups of bins]
    image,
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
    """pooled_o = mean of the tokens in bin o; unit_o = key(pooled_o) / |key(pooled_o)|, by the last program of GROUP
    bins, whole blocks. SHARED: keys are the values.

    Grid: (samples * blocks of BINS * slices of the channels,), the last fastest.
    """
    slices = tl.cdiv(channels, SLICE)
    centres = image.rows * image.columns
    blocks = tl.cdiv(centres, BINS)
    sample = (tl.program_id(0) // slices // blocks).to(tl.int64)
    first = tl.program_id(0) // slices % blocks * BINS
    record = saved.start + sample * saved.sample
    bin = first + tl.arange(0, BINS)
    channel = tl.program_id(0) % slices * SLICE + tl.arange(0, SLICE)
    source = record + layout.pooled
    total, number = _bin_sums(values, sample, mask, first, image, channel, channels, MASKED, BINS, TOKENS)
    divisor = tl.maximum(number, 1).to(total.dtype)
    store_matrix(source, bin, centres, channel, channels, total / divisor[:, None])
    inv_bin_count = tl.where(number > 0, 1.0 / divisor, 0.0)
    tl.store(record + layout.inv_bin_count + bin, inv_bin_count, mask=bin < centres)
    if not SHARED:
        source = pooled_keys + sample * centres * channels
        total, number = _bin_sums(keys, sample, mask, first, image, channel, channels, MASKED, BINS, TOKENS)
        store_matrix(source, bin, centres, channel, channels, total / divisor[:, None])
    group = first // GROUP
    members = tl.cdiv(tl.minimum(centres - group * GROUP, GROUP), BINS)
    if is_last(counters + sample * tl.cdiv(centres, GROUP) + group, members * slices):
        # fmt: off
        _centre_keys(
            source, sample, record, layout, scores, projection, group * GROUP, centres, channels,
            PROJECTED, QUERY, PARTS, GROUP, CHANNELS, PRECISION,
        )
        # fmt: on


def launch_pool(r: Round) -> None:
    """Writes pooled, unit, unit_inv_norm and inv_bin_count of the round's layout, and its score matrix."""
    shared = r.keys is r.values
    span = block_of(r.channels, 256 if INTERPRETED.value else 128)
    pixels = triton.cdiv(r.hw[0], r.grid[0]) * triton.cdiv(r.hw[1], r.grid[1])
    tokens = max(1, min(256 if INTERPRETED.value else 4096 // span, triton.next_power_of_2(pixels)))
    lanes = 4096 if INTERPRETED.value else 32
    bins = max(1, min(ROWS, triton.next_power_of_2(r.centres), lanes // tokens))
    blocks = triton.cdiv(r.centres, bins) * triton.cdiv(r.channels, span)
    pool[(r.batch * blocks,)](
        r.key_view,
        r.value_view,
        r.mask_view,
        r.saved_vector,
        r.layout,
        r.saved if shared else r.saved.new_empty((r.batch, r.centres, r.channels)),
        r.scores,
        r.weights,
        r.counters,
        Image(*r.hw, *r.grid),
        r.channels,
        SHARED=shared,
        MASKED=r.masked,
        PROJECTED=r.projected,
        QUERY=r.queried,
        PARTS=r.parts,
        BINS=bins,
        GROUP=ROWS,
        TOKENS=tokens,
        SLICE=span,
        CHANNELS=r.centre_channels,
        PRECISION=r.precision,
        num_warps=4,
        num_stages=2,
        maxnreg=MAX_REGISTERS,
    )
