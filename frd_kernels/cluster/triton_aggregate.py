"""From labels to centres: sums of each cluster's tokens, chunk by chunk, then their means.

A tile of tokens adds to its clusters as a one-hot matrix times the tile. A NaN or an infinity would spread from there
to every cluster: sums that come out not finite are made again token by token.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from .._triton_ops import compute_type, matmul_add, narrow, widen
from .triton_tiles import load_rows, load_tokens, load_turned, next_part, pieces, store_rows, token_weight


@triton.jit
def _add_clusters(
    total, hot, weight, values, WEIGHTED: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr
):
    """total [centre, channel] plus the sums over the tokens of hot [centre, token] of weight [token] * values."""
    if WEIGHTED:
        rest = weight
        for _ in tl.static_range(PARTS):
            part, rest = next_part(rest, values.dtype)
            total = matmul_add(
                tl.where(hot, part[None, :], tl.zeros_like(part)[None, :]), values, total, PRECISION
            )
    else:
        total = matmul_add(narrow(tl.where(hot, 1.0, 0.0), values.dtype), values, total, PRECISION)
    return total


@triton.jit
def _cluster_sums(
    item,
    steps,
    labels,
    cosines,
    slope,
    shift,
    begin,
    end,
    centre,
    channel,
    channels,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(sums [centre, channel], weights [centre], tokens [centre]) of the tokens begin .. end of an item."""
    dtype: tl.constexpr = compute_type(item.dtype.element_ty)
    total = tl.zeros((centre.shape[0], channel.shape[0]), dtype)
    mass = tl.zeros((centre.shape[0],), dtype)
    number = tl.zeros((centre.shape[0],), tl.int32)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        label = tl.load(labels + token, mask=token < end, other=-1)
        weight = tl.load(cosines + token, mask=token < end, other=0.0)
        weight = token_weight(weight, slope, shift, WEIGHTED)
        values = load_tokens(item, steps, token, label >= 0, channel, channels)
        hot = label[None, :] == centre[:, None]
        number += tl.sum(hot.to(tl.int32), axis=1)
        if WEIGHTED:
            mass += tl.sum(tl.where(hot, weight[None, :], 0.0), axis=1)
        total = _add_clusters(total, hot, weight, values, WEIGHTED, PARTS, PRECISION)
    if not WEIGHTED:
        mass = number.to(dtype)
    return total, mass, number


@triton.jit
def _careful_sums(
    item, steps, labels, cosines, slope, shift, begin, end, centre, channel, channels, WEIGHTED: tl.constexpr
):
    """The sums of `_cluster_sums`, token by token: what is not finite stays in its cluster and channel."""
    dtype: tl.constexpr = compute_type(item.dtype.element_ty)
    total = tl.zeros((centre.shape[0], channel.shape[0]), dtype)
    for first in range(begin, end):
        token = first + tl.arange(0, 1)
        label = tl.load(labels + token)
        weight = token_weight(tl.load(cosines + token), slope, shift, WEIGHTED)
        values = widen(load_tokens(item, steps, token, label >= 0, channel, channels))
        total = tl.where(centre[:, None] == label[None, :], total + weight[:, None] * values, total)
    return total


@triton.jit
def chunk_sums(
    item,
    steps,
    labels,
    cosines,
    slope,
    shift,
    begin,
    end,
    partial,  # [O, C] of the chunk
    masses,  # [O] likewise
    numbers,  # [O] likewise
    first,
    last,
    centres,
    channels,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
    CENTRES: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes a chunk's sums: blocks first .. last of CENTRES x SLICE, the last axis the fastest."""
    slices = tl.cdiv(channels, SLICE)
    for block in range(first, last):
        centre = block // slices * CENTRES + tl.arange(0, CENTRES)
        channel = block % slices * SLICE + tl.arange(0, SLICE)
        # fmt: off
        total, mass, number = _cluster_sums(
            item, steps, labels, cosines, slope, shift, begin, end, centre, channel, channels,
            WEIGHTED, PARTS, TOKENS, PRECISION,
        )
        if tl.max(tl.max(((total - total) != 0.0).to(tl.int32), axis=1), axis=0) != 0:
            total = _careful_sums(
                item, steps, labels, cosines, slope, shift, begin, end, centre, channel, channels, WEIGHTED
            )
        # fmt: on
        store_rows(partial, centre, centres, channel, channels, total)
        if block % slices == 0:
            tl.store(masses + centre, mass, mask=centre < centres)
            tl.store(numbers + centre, number, mask=centre < centres)


@triton.jit
def finish_rows(
    record,
    partial,  # [chunks, O, C]
    masses,  # [chunks, O]
    numbers,  # [chunks, O]
    weight,  # Wv [C, C]
    bias,  # bv [C]
    centres_out,  # [O, C], where RESULTS
    counts,  # [O], likewise
    first,
    tokens,
    centres,
    channels,
    chunks,
    PROJECTED: tl.constexpr,
    RESULTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """mass, mean and result of the centres first .. first + ROWS of an item. Every pointer is the item's."""
    _, _, pooled, _, mean, result, _, mass, _ = pieces(record, tokens, centres, channels)
    row = first + tl.arange(0, ROWS)
    total = tl.full((ROWS,), 1.0, record.dtype.element_ty)
    number = tl.zeros((ROWS,), tl.int32)
    for k in range(chunks):
        total += tl.load(masses + k * centres + row, mask=row < centres, other=0.0)
        if RESULTS:
            number += tl.load(numbers + k * centres + row, mask=row < centres, other=0)
    tl.store(mass + row, total, mask=row < centres)
    if RESULTS:
        tl.store(counts + row, number, mask=row < centres)
    for begin in range(0, channels, CHANNELS):
        column = begin + tl.arange(0, CHANNELS)
        sums = load_rows(pooled, row, centres, column, channels)
        for k in range(chunks):
            sums += load_rows(partial + k * centres * channels, row, centres, column, channels)
        value = sums / total[:, None]
        store_rows(mean, row, centres, column, channels, value)
        if not PROJECTED:
            store_rows(result, row, centres, column, channels, value)
            if RESULTS:
                store_rows(centres_out, row, centres, column, channels, value)
    if PROJECTED:
        tl.debug_barrier()
        for begin in range(0, channels, CHANNELS):
            column = begin + tl.arange(0, CHANNELS)
            value = tl.zeros((ROWS, CHANNELS), record.dtype.element_ty)
            for inner in range(0, channels, CHANNELS):
                source = inner + tl.arange(0, CHANNELS)
                some = load_rows(mean, row, centres, source, channels)
                factors = widen(load_turned(weight, column, channels, source, channels)).to(value.dtype)
                value = matmul_add(some, factors, value, PRECISION)
            value += widen(tl.load(bias + column, mask=column < channels, other=0.0)).to(value.dtype)[None, :]
            store_rows(result, row, centres, column, channels, value)


@triton.jit
def aggregate(
    values,
    saved,  # [B, length], this round's record at `record_at`
    labels,  # [B, label_step]
    alpha,
    beta,
    partial,  # [B, O, C]
    masses,  # [B, O]
    numbers,  # [B, O]
    value_batch,
    value_token,
    value_channel,
    length,
    record_at,
    label_step,
    label_at,
    tokens,
    centres,
    channels,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
    CENTRES: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over all tokens of an item as its only chunk. Grid: (items * blocks of centres * slices of channels,)."""
    blocks = tl.cdiv(centres, CENTRES) * tl.cdiv(channels, SLICE)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    cosines, _, _, _, _, _, _, _, _ = pieces(saved + item * length + record_at, tokens, centres, channels)
    # fmt: off
    chunk_sums(
        values + item * value_batch, (value_token, value_channel), labels + item * label_step + label_at, cosines,
        tl.load(alpha), tl.load(beta), 0, tokens,
        partial + item * centres * channels, masses + item * centres, numbers + item * centres, block, block + 1,
        centres, channels, WEIGHTED, PARTS, CENTRES, TOKENS, SLICE, PRECISION,
    )
    # fmt: on


@triton.jit
def finish(
    saved,  # [B, length], this round's record at `record_at`
    partial,  # [B, chunks, O, C]
    masses,  # [B, chunks, O]
    numbers,  # [B, chunks, O]
    weight,
    bias,
    centres_out,  # [B, O, C], where RESULTS
    counts,  # [B, O], likewise
    length,
    record_at,
    tokens,
    centres,
    channels,
    chunks,
    PROJECTED: tl.constexpr,
    RESULTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Centres from the sums of the chunks, in their order. Grid: (items * blocks of ROWS centres,)."""
    blocks = tl.cdiv(centres, ROWS)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    size = centres * channels
    # fmt: off
    finish_rows(
        saved + item * length + record_at, partial + item * chunks * size, masses + item * chunks * centres,
        numbers + item * chunks * centres, weight, bias, centres_out + item * size, counts + item * centres,
        tl.program_id(0) % blocks * ROWS, tokens, centres, channels, chunks, PROJECTED, RESULTS, ROWS, CHANNELS,
        PRECISION,
    )
    # fmt: on
