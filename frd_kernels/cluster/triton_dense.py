"""Triton kernels behind the last round of `icm`: the last centres dispatched back to the tokens.

Variant paper: S [N, J], the product of the rounds' cosines, is x . projected + offset times the inverse norm of the
key, with projected [J, C] made from the later rounds: neither S nor a matrix of cosines of the tokens is stored.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from .._triton_ops import compute_type, matmul_add, widen
from .triton_pool import project_rows
from .triton_tiles import (
    load_rows,
    load_tokens,
    load_turned,
    pieces,
    sigmoid,
    store_rows,
    store_tokens,
    token_weight,
)


@triton.jit
def _round_product(
    result,  # tokens [N, C]
    scale,  # [N]
    projected,  # [J, C]
    offset,  # [J]
    product,  # [N, J]
    column,
    tokens,
    columns,
    channels,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the columns `column` of the product of the cosines of this round and of those behind it."""
    moved = tl.load(offset + column, mask=column < columns, other=0.0)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        total = tl.zeros((TOKENS, column.shape[0]), moved.dtype)
        for inner in range(0, channels, CHANNELS):
            channel = inner + tl.arange(0, CHANNELS)
            some = load_rows(result, token, tokens, channel, channels)
            factors = load_turned(projected, column, columns, channel, channels)
            total = matmul_add(some, factors, total, PRECISION)
        inverse = tl.load(scale + token, mask=token < tokens, other=0.0)
        store_rows(product, token, tokens, column, columns, inverse[:, None] * (total + moved[None, :]))


@triton.jit
def _round_query(
    product,  # [N, J]
    unit,  # [N, C]
    bias,
    query,  # [J, C]
    offset,  # [J]
    column,
    tokens,
    columns,
    channels,
    PROJECTED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the rows `column` of query = product^T unit, and their products with the bias."""
    moved = tl.zeros((column.shape[0],), query.dtype.element_ty)
    for inner in range(0, channels, CHANNELS):
        channel = inner + tl.arange(0, CHANNELS)
        total = tl.zeros((column.shape[0], CHANNELS), moved.dtype)
        for first in range(0, tokens, TOKENS):
            token = first + tl.arange(0, TOKENS)
            some = tl.trans(load_rows(product, token, tokens, column, columns))
            total = matmul_add(some, load_rows(unit, token, tokens, channel, channels), total, PRECISION)
        store_rows(query, column, columns, channel, channels, total)
        if PROJECTED:
            factors = widen(tl.load(bias + channel, mask=channel < channels, other=0.0)).to(moved.dtype)
            moved += tl.sum(total * factors[None, :], axis=1)
    tl.store(offset + column, moved, mask=column < columns)


@triton.jit
def queries(
    saved,  # [B, length]
    records,  # of each round: where its parts of `saved` begin
    query_at,
    projected_at,
    offset_at,
    product_at,
    tokens,  # of each round
    weights,  # Wk [C, C] of each round
    biases,  # bk [C]
    length,
    columns,
    channels,
    ROUNDS: tl.constexpr,
    PROJECTED: tl.constexpr,  # bit t: whether round t has projections
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """product of the rounds from the last to the second, query, projected and offset of those before the last, which
    has its own already. Grid: (items * blocks of columns,)."""
    blocks = tl.cdiv(columns, COLUMNS)
    item = saved + (tl.program_id(0) // blocks).to(tl.int64) * length
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    for t in tl.static_range(ROUNDS - 1, 0, -1):
        count = tokens[t]
        _, scale, _, _, _, _, _, _, _ = pieces(item + records[t], count, 0, channels)
        _, _, _, unit, _, result, _, _, _ = pieces(item + records[t - 1], tokens[t - 1], count, channels)
        product = item + product_at[t]
        query = item + query_at[t - 1]
        projected = item + projected_at[t - 1]
        # fmt: off
        _round_product(
            result, scale, item + projected_at[t], item + offset_at[t], product, column, count, columns, channels,
            TOKENS, CHANNELS, PRECISION,
        )
        tl.debug_barrier()  # what a step writes, other threads read in the next
        _round_query(
            product, unit, biases[t - 1], query, item + offset_at[t - 1], column, count, columns, channels,
            (PROJECTED >> (t - 1)) & 1, TOKENS, CHANNELS, PRECISION,
        )
        tl.debug_barrier()
        if (PROJECTED >> (t - 1)) & 1:
            project_rows(query, weights[t - 1], projected, column, columns, channels, CHANNELS, PRECISION)
        else:
            for first in range(0, channels, CHANNELS):
                channel = first + tl.arange(0, CHANNELS)
                value = load_rows(query, column, columns, channel, channels)
                store_rows(projected, column, columns, channel, channels, value)
        tl.debug_barrier()
        # fmt: on


@triton.jit
def _gate(
    item,
    steps,
    token,
    held,
    scale,
    projected,
    offset,
    alpha,
    beta,
    column,
    columns,
    channels,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sigmoid(alpha * S + beta) [token, column]."""
    product = tl.zeros((token.shape[0], column.shape[0]), scale.dtype)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        x = widen(load_tokens(item, steps, token, held, channel, channels))
        factors = load_turned(projected, column, columns, channel, channels)
        product = matmul_add(x, factors, product, PRECISION)
    moved = tl.load(offset + column, mask=column < columns, other=0.0)
    gate = sigmoid(alpha * (scale[:, None] * (product + moved[None, :])) + beta)
    return tl.where((column < columns)[None, :], gate, 0.0)


@triton.jit
def dense_dispatch(
    x,
    saved,  # [B, length], the first round's record at its start
    alpha,
    beta,
    out,
    x_batch,
    x_token,
    x_channel,
    out_batch,
    out_token,
    out_channel,
    length,
    projected_at,
    offset_at,
    last_at,  # result of the last round [J, C]
    tokens,
    columns,
    channels,
    tiles,  # of an item
    WHOLE: tl.constexpr,  # COLUMNS holds all
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = sigmoid(alpha * S + beta) R. Grid: (items * tiles of tokens,)."""
    item = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    held = token < tokens
    record = saved + item * length
    dtype: tl.constexpr = compute_type(x.dtype.element_ty)
    scale = tl.load(record + tokens + token, mask=held, other=0.0)
    slope = tl.load(alpha)
    shift = tl.load(beta)
    own = x + item * x_batch
    # fmt: off
    if WHOLE:
        gate = _gate(
            own, (x_token, x_channel), token, held, scale, record + projected_at, record + offset_at, slope, shift,
            tl.arange(0, COLUMNS), columns, channels, CHANNELS, PRECISION,
        )
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        total = tl.zeros((TOKENS, CHANNELS), dtype)
        if WHOLE:
            last = load_rows(record + last_at, tl.arange(0, COLUMNS), columns, channel, channels)
            total = matmul_add(gate, last, total, PRECISION)
        else:
            for begin in range(0, columns, COLUMNS):
                column = begin + tl.arange(0, COLUMNS)
                gate = _gate(
                    own, (x_token, x_channel), token, held, scale, record + projected_at, record + offset_at,
                    slope, shift, column, columns, channels, CHANNELS, PRECISION,
                )
                last = load_rows(record + last_at, column, columns, channel, channels)
                total = matmul_add(gate, last, total, PRECISION)
        store_tokens(out + item * out_batch, (out_token, out_channel), token, held, channel, channels, total)
    # fmt: on


@triton.jit
def chain_dispatch(
    saved,  # [B, length]
    labels,  # [B, label_step]
    alpha,  # [T]
    beta,  # [T]
    out,
    records,  # of each round: where its parts of `saved`, of the labels begin
    labels_at,
    out_batch,
    out_token,
    out_channel,
    length,
    label_step,
    last_at,  # result of the last round [J, C]
    tokens,
    channels,
    tiles,  # of an item
    ROUNDS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = product of the weights along a token's chain of centres, times its last centre. Grid: (items * tiles of
    tokens,)."""
    item = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    held = token < tokens
    record = saved + item * length
    at = token
    weight = tl.full((TOKENS,), 1.0, saved.dtype.element_ty)
    for t in tl.static_range(ROUNDS):
        cosine = tl.load(record + records[t] + at, mask=held, other=0.0)
        weight *= token_weight(cosine, tl.load(alpha + t), tl.load(beta + t), True)
        at = tl.load(labels + item * label_step + labels_at[t] + at, mask=held, other=0)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        real = held[:, None] & (channel < channels)[None, :]
        centre = tl.load(record + last_at + at[:, None] * channels + channel[None, :], mask=real, other=0.0)
        value = weight[:, None] * centre
        store_tokens(out + item * out_batch, (out_token, out_channel), token, held, channel, channels, value)
