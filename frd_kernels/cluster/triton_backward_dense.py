"""Triton kernels of the backward of Eq. 4: the dispatch by the product of the rounds' cosines, and its chain.

`dense`, of the first round: (views of x's output gradient, of `projected` [J, C], of the last centres [J, C] and of the
query [J, C]; vector `offset` [J]; pointers alpha, beta; J). Of a later round: (view of the query, vectors `product` and
its gradient [N, J], J).
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from .._triton_ops import widen
from .triton_backward_tiles import (
    add_product,
    load_rows,
    load_vector,
    multiply,
    store_rows,
    store_vector,
)
from .triton_tiles import sigmoid


@triton.jit
def dense_gate(
    dense,
    tokens_view,
    item,
    token,
    real,
    channels,
    column,
    scale,
    INNER: tl.constexpr,
):
    """[tokens, columns]: the product of the cosines, its sigmoid, and the gradient of the sigmoid's argument."""
    grad, projected, last, _, offset, alpha, beta, columns = dense
    held = column < columns
    shape: tl.constexpr = (token.shape[0], column.shape[0])
    product = tl.zeros(shape, scale.dtype)
    pushed = tl.zeros(shape, scale.dtype)
    for first in range(0, channels, INNER):
        inner = first + tl.arange(0, INNER)
        rows = load_rows(projected, item, column, inner, held, channels)
        product = multiply(
            load_rows(tokens_view, item, token, inner, real, channels), tl.trans(rows), product
        )
        rows = load_rows(last, item, column, inner, held, channels)
        pushed = multiply(load_rows(grad, item, token, inner, real, channels), tl.trans(rows), pushed)
    product = scale[:, None] * (product + load_vector(offset, item, column, held)[None, :])
    gate = sigmoid(tl.load(alpha) * product + tl.load(beta))
    inside = real[:, None] & held[None, :]
    argument = tl.where(inside, pushed * gate * (1.0 - gate), 0.0)
    return product, tl.where(inside, gate, 0.0), argument


@triton.jit
def dense_gradient(
    dense,
    tokens_view,
    item,
    token,
    real,
    channel,
    channels,
    scale,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """First round: product . its gradient [tokens], and the gradient times the query [tokens, channels]."""
    query, alpha, columns = dense[3], dense[5], dense[7]
    along = tl.zeros((token.shape[0],), scale.dtype)
    total = tl.zeros((token.shape[0], channel.shape[0]), scale.dtype)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        product, _, argument = dense_gate(
            dense, tokens_view, item, token, real, channels, column, scale, INNER
        )
        argument *= tl.load(alpha)
        along += tl.sum(product * argument, axis=1)
        rows = load_rows(query, item, column, channel, column < columns, channels)
        total = multiply(argument, rows, total)
    return along, total


@triton.jit
def product_gradient(dense, item, token, real, channel, channels, COLUMNS: tl.constexpr):
    """The same in a later round."""
    query, product, product_grad, columns = dense
    compute: tl.constexpr = product_grad[0].dtype.element_ty
    along = tl.zeros((token.shape[0],), compute)
    total = tl.zeros((token.shape[0], channel.shape[0]), compute)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        at = token[:, None] * columns + column[None, :]
        inside = real[:, None] & (column < columns)[None, :]
        grad = load_vector(product_grad, item, at, inside)
        along += tl.sum(load_vector(product, item, at, inside) * grad, axis=1)
        rows = load_rows(query, item, column, channel, column < columns, channels)
        total = multiply(grad, rows, total)
    return along, total


@triton.jit
def dense_sums(
    tokens_view,
    dense,
    scale,
    partial,  # [items, chunks, 2, J, C]: sums of gate * gradient, of pull * token
    pulls,  # [items, chunks, J]
    gates,  # [items, chunks * blocks of columns, 2]
    tokens,
    channels,
    chunks,
    span,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Grid: (items * chunks * blocks of columns * blocks of channels,)."""
    dense = dense[:]  # made anew, see triton_backward_tiles
    columns = dense[7]
    blocks = tl.cdiv(channels, CHANNELS)
    column_blocks = tl.cdiv(columns, COLUMNS)
    block = tl.program_id(0) % blocks
    column_block = tl.program_id(0) // blocks % column_blocks
    piece = tl.program_id(0) // (blocks * column_blocks)  # chunks of all items
    item = piece // chunks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    held = column < columns
    compute: tl.constexpr = partial.dtype.element_ty
    sums = tl.zeros((COLUMNS, CHANNELS), compute)
    query_sums = tl.zeros((COLUMNS, CHANNELS), compute)
    pull_sums = tl.zeros((COLUMNS,), compute)
    alpha_grad = tl.zeros((COLUMNS,), compute)
    beta_grad = tl.zeros((COLUMNS,), compute)
    begin = piece % chunks * span
    end = tl.minimum(begin + span, tokens)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        real = token < end
        own_scale = load_vector(scale, item, token, real)
        product, gate, argument = dense_gate(
            dense, tokens_view, item, token, real, channels, column, own_scale, INNER
        )
        pull = own_scale[:, None] * (tl.load(dense[5]) * argument)
        rows = load_rows(dense[0], item, token, channel, real, channels)
        sums = multiply(tl.trans(gate), rows, sums)
        rows = load_rows(tokens_view, item, token, channel, real, channels)
        query_sums = multiply(tl.trans(pull), rows, query_sums)
        pull_sums += tl.sum(pull, axis=0)
        alpha_grad += tl.sum(argument * product, axis=0)
        beta_grad += tl.sum(argument, axis=0)
    out = (partial, 2 * columns * channels, channels, 1)
    store_rows(out, piece, column, channel, sums, held, channels)
    store_rows(out, piece, columns + column, channel, query_sums, held, channels)
    if block == 0:
        store_vector((pulls, columns), piece, column, pull_sums, held)
        at = gates + (piece.to(tl.int64) * column_blocks + column_block) * 2
        tl.store(at, tl.sum(alpha_grad, axis=0))
        tl.store(at + 1, tl.sum(beta_grad, axis=0))


@triton.jit
def query_gradients(
    partial,
    pulls,
    chunks,
    last_grad,
    tokens_view,
    scale,
    product_grad,
    sums,
    out,
    weight,
    bias,
    tokens,
    channels,
    columns,
    FIRST: tl.constexpr,
    PROJECTED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradient of a round's query [J, C]; FIRST: from the chunks of `dense_sums`, which give `last_grad` as well.
    Grid: (items * blocks of columns,)."""
    blocks = tl.cdiv(columns, COLUMNS)
    item = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    held = column < columns
    compute: tl.constexpr = out[0].dtype.element_ty
    pull = tl.zeros((COLUMNS,), compute)
    if FIRST:
        for chunk in range(chunks):
            pull += load_vector((pulls, columns), item * chunks + chunk, column, held)
    else:
        for first in range(0, tokens, TOKENS):
            part = _pulls(product_grad, scale, item, first + tl.arange(0, TOKENS), tokens, column, columns)
            pull += tl.sum(part, axis=0)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        total = tl.zeros((COLUMNS, CHANNELS), compute)
        if FIRST:
            last = tl.zeros((COLUMNS, CHANNELS), compute)
            rows = (partial, 2 * columns * channels, channels, 1)
            for chunk in range(chunks):
                piece = item * chunks + chunk
                last += load_rows(rows, piece, column, channel, held, channels)
                total += load_rows(rows, piece, columns + column, channel, held, channels)
            store_rows(last_grad, item, column, channel, last, held, channels)
        else:
            for token in range(0, tokens, TOKENS):
                index = token + tl.arange(0, TOKENS)
                part = _pulls(product_grad, scale, item, index, tokens, column, columns)
                rows = load_rows(tokens_view, item, index, channel, index < tokens, channels)
                total = multiply(tl.trans(part), rows, total)
        store_rows(sums if PROJECTED else out, item, column, channel, total, held, channels)
    if PROJECTED:
        tl.debug_barrier()
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            offset = widen(tl.load(bias + channel, mask=channel < channels, other=0.0))
            total = pull[:, None] * offset[None, :]
            total = add_product(total, sums, item, column, held, channel, weight, channels, True, INNER)
            store_rows(out, item, column, channel, total, held, channels)


@triton.jit
def _pulls(product_grad, scale, item, token, tokens, column, columns):
    """[tokens, columns]: gradients of the products, times the tokens' scales."""
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    grad = load_vector(product_grad, item, token[:, None] * columns + column[None, :], inside)
    return load_vector(scale, item, token, token < tokens)[:, None] * grad


@triton.jit
def chain_gradients(
    product,
    query_grad,
    unit,
    unit_grad,
    product_grad,
    channels,
    centres,
    columns,
    CENTRES: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From the gradient of a round's query [J, C] to that of its unit keys [O, C], through the next round's product
    [O, J], and to that of this product. Grid: (items * blocks of centres,)."""
    blocks = tl.cdiv(centres, CENTRES)
    item = tl.program_id(0) // blocks
    centre = tl.program_id(0) % blocks * CENTRES + tl.arange(0, CENTRES)
    real = centre < centres
    compute: tl.constexpr = unit_grad[0].dtype.element_ty
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        held = column < columns
        total = tl.zeros((CENTRES, COLUMNS), compute)
        for start in range(0, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            rows = load_rows(query_grad, item, column, channel, held, channels)
            total = multiply(load_rows(unit, item, centre, channel, real, channels), tl.trans(rows), total)
        at = centre[:, None] * columns + column[None, :]
        store_vector(product_grad, item, at, total, real[:, None] & held[None, :])
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        total = tl.zeros((CENTRES, CHANNELS), compute)
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            held = column < columns
            at = centre[:, None] * columns + column[None, :]
            factors = load_vector(product, item, at, real[:, None] & held[None, :])
            total = multiply(factors, load_rows(query_grad, item, column, channel, held, channels), total)
        store_rows(unit_grad, item, centre, channel, total, real, channels)
