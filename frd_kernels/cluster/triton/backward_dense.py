"""Backward of Eq. 4 on Triton: the dispatch by the product S of the rounds' cosines, and the chain of its factors."""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton_ops import widen
from .backward_operands import WALK_CENTRES, FirstProduct, Round, chunks_of
from .tiles import (
    Vector,
    View,
    add_product,
    load_rows,
    load_vector,
    multiply,
    rows_of,
    sigmoid,
    store_rows,
    store_vector,
    vector_of,
    view_of,
)

Tensor = torch.Tensor


@triton.jit
def _gate_gradient(source, tokens_view, sample, token, mask, channels, column, inv_norm, INNER: tl.constexpr):
    """[tokens, columns]: S, G = sigmoid(alpha * S + beta), and dA = (grad . last) G (1 - G), the gradient of the
    sigmoid's argument. source: `FirstProduct`."""
    in_range = column < source.columns
    shape: tl.constexpr = (token.shape[0], column.shape[0])
    product = tl.zeros(shape, inv_norm.dtype)
    gate_grad = tl.zeros(shape, inv_norm.dtype)
    for first in range(0, channels, INNER):
        inner = first + tl.arange(0, INNER)
        x = load_rows(tokens_view, sample, token, inner, mask, channels)
        projected = load_rows(source.projected, sample, column, inner, in_range, channels)
        product = multiply(x, tl.trans(projected), product)
        grad = load_rows(source.grad, sample, token, inner, mask, channels)
        last = load_rows(source.last, sample, column, inner, in_range, channels)
        gate_grad = multiply(grad, tl.trans(last), gate_grad)
    offset = load_vector(source.offset, sample, column, in_range)
    product = inv_norm[:, None] * (product + offset[None, :])
    gate = sigmoid(tl.load(source.alpha) * product + tl.load(source.beta))
    inside = mask[:, None] & in_range[None, :]
    argument = tl.where(inside, gate_grad * gate * (1.0 - gate), 0.0)
    return product, tl.where(inside, gate, 0.0), argument


@triton.jit
def first_product_gradient(
    source,
    tokens_view,
    sample,
    token,
    mask,
    channel,
    channels,
    inv_norm,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """With dS = alpha dA: (S . dS [tokens], dS query [tokens, channels]). source: `FirstProduct`."""
    columns = source.columns
    along = tl.zeros((token.shape[0],), inv_norm.dtype)
    total = tl.zeros((token.shape[0], channel.shape[0]), inv_norm.dtype)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        # fmt: off
        product, _, argument = _gate_gradient(
            source, tokens_view, sample, token, mask, channels, column, inv_norm, INNER
        )
        # fmt: on
        argument *= tl.load(source.alpha)
        along += tl.sum(product * argument, axis=1)
        rows = load_rows(source.query, sample, column, channel, column < columns, channels)
        total = multiply(argument, rows, total)
    return along, total


@triton.jit
def later_product_gradient(source, sample, token, mask, channel, channels, COLUMNS: tl.constexpr):
    """The same of a later round, whose product and its gradient are in memory. source: `LaterProduct`."""
    columns = source.columns
    compute: tl.constexpr = source.product_grad.start.dtype.element_ty
    along = tl.zeros((token.shape[0],), compute)
    total = tl.zeros((token.shape[0], channel.shape[0]), compute)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        at = token[:, None] * columns + column[None, :]
        inside = mask[:, None] & (column < columns)[None, :]
        grad = load_vector(source.product_grad, sample, at, inside)
        along += tl.sum(load_vector(source.product, sample, at, inside) * grad, axis=1)
        rows = load_rows(source.query, sample, column, channel, column < columns, channels)
        total = multiply(grad, rows, total)
    return along, total


@triton.jit
def dense_sums(
    tokens_view,
    source,  # `FirstProduct`
    inv_norm,
    partial,  # [B, chunks, 2, J, C]: sums of gate * gradient, of dcos * token
    sum_dcos,  # [B, chunks, J]
    gate_grads,  # [B, chunks * blocks of columns, 2]
    tokens,
    channels,
    chunks,
    span,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Sums over a chunk of tokens: G^T grad, dcos^T x and dcos for dcos = inv_norm alpha dA; dA S and dA for alpha's
    and beta's gradients. Grid: (samples * chunks * blocks of columns * blocks of channels,)."""
    source = FirstProduct(*source)
    columns = source.columns
    blocks = tl.cdiv(channels, CHANNELS)
    column_blocks = tl.cdiv(columns, COLUMNS)
    block = tl.program_id(0) % blocks
    column_block = tl.program_id(0) // blocks % column_blocks
    piece = tl.program_id(0) // (blocks * column_blocks)  # chunks of all samples
    sample = piece // chunks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    in_range = column < columns
    compute: tl.constexpr = partial.dtype.element_ty
    sums = tl.zeros((COLUMNS, CHANNELS), compute)
    query_sums = tl.zeros((COLUMNS, CHANNELS), compute)
    dcos_sums = tl.zeros((COLUMNS,), compute)
    alpha_grad = tl.zeros((COLUMNS,), compute)
    beta_grad = tl.zeros((COLUMNS,), compute)
    begin = piece % chunks * span
    end = tl.minimum(begin + span, tokens)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        mask = token < end
        token_inv_norm = load_vector(inv_norm, sample, token, mask)
        # fmt: off
        product, gate, argument = _gate_gradient(
            source, tokens_view, sample, token, mask, channels, column, token_inv_norm, INNER
        )
        # fmt: on
        dcos = token_inv_norm[:, None] * (tl.load(source.alpha) * argument)
        rows = load_rows(source.grad, sample, token, channel, mask, channels)
        sums = multiply(tl.trans(gate), rows, sums)
        rows = load_rows(tokens_view, sample, token, channel, mask, channels)
        query_sums = multiply(tl.trans(dcos), rows, query_sums)
        dcos_sums += tl.sum(dcos, axis=0)
        alpha_grad += tl.sum(argument * product, axis=0)
        beta_grad += tl.sum(argument, axis=0)
    out = View(partial, 2 * columns * channels, channels, 1)
    store_rows(out, piece, column, channel, sums, in_range, channels)
    store_rows(out, piece, columns + column, channel, query_sums, in_range, channels)
    if block == 0:
        store_vector(Vector(sum_dcos, columns), piece, column, dcos_sums, in_range)
        at = gate_grads + (piece.to(tl.int64) * column_blocks + column_block) * 2
        tl.store(at, tl.sum(alpha_grad, axis=0))
        tl.store(at + 1, tl.sum(beta_grad, axis=0))


def launch_dense_sums(r: Round, x: Tensor, source: FirstProduct) -> tuple[Tensor, Tensor, Tensor]:
    """(partial [B, chunks, 2, J, C], sum_dcos [B, chunks, J], gate_grads [B, *, 2]) of `dense_sums`; x [B, N, C]."""
    columns = source.columns
    tile = r.tile(128, columns).at_most(tokens=32)
    chunks, span = chunks_of(r.tokens, columns, tile.tokens)
    blocks = triton.cdiv(columns, tile.columns), triton.cdiv(r.channels, tile.channels)
    partial, sum_dcos = r.empty(chunks, 2, columns, r.channels), r.empty(chunks, columns)
    gate_grads = r.empty(chunks * blocks[0], 2)
    dense_sums[(r.batch * chunks * blocks[0] * blocks[1],)](
        view_of(x),
        source,
        r.vector(r.layout.inv_norm),
        partial,
        sum_dcos,
        gate_grads,
        r.tokens,
        r.channels,
        chunks,
        span,
        **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER", stages=1),
    )
    return partial, sum_dcos, gate_grads


@triton.jit
def _product_dcos(product_grad, inv_norm, sample, token, tokens, column, columns):
    """[tokens, columns]: gradients of the products, times the tokens' inverse norms."""
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    grad = load_vector(product_grad, sample, token[:, None] * columns + column[None, :], inside)
    return load_vector(inv_norm, sample, token, token < tokens)[:, None] * grad


@triton.jit
def query_gradients(
    partial,
    sum_dcos,
    chunks,
    last_grad,
    tokens_view,
    inv_norm,
    product_grad,
    sums,  # workspace [J, C]
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
    """Gradient of a round's query [J, C]: dcos^T x, PROJECTED: (dcos^T x) Wk^T + sum(dcos) bk. FIRST: from the chunks
    of `dense_sums`, which give `last_grad` as well. Grid: (samples * blocks of columns,)."""
    blocks = tl.cdiv(columns, COLUMNS)
    sample = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_range = column < columns
    compute: tl.constexpr = out.start.dtype.element_ty
    dcos = tl.zeros((COLUMNS,), compute)
    if FIRST:
        for chunk in range(chunks):
            dcos += load_vector(Vector(sum_dcos, columns), sample * chunks + chunk, column, in_range)
    else:
        for first in range(0, tokens, TOKENS):
            token = first + tl.arange(0, TOKENS)
            part = _product_dcos(product_grad, inv_norm, sample, token, tokens, column, columns)
            dcos += tl.sum(part, axis=0)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        total = tl.zeros((COLUMNS, CHANNELS), compute)
        if FIRST:
            last = tl.zeros((COLUMNS, CHANNELS), compute)
            rows = View(partial, 2 * columns * channels, channels, 1)
            for chunk in range(chunks):
                piece = sample * chunks + chunk
                last += load_rows(rows, piece, column, channel, in_range, channels)
                total += load_rows(rows, piece, columns + column, channel, in_range, channels)
            store_rows(last_grad, sample, column, channel, last, in_range, channels)
        else:
            for start in range(0, tokens, TOKENS):
                token = start + tl.arange(0, TOKENS)
                part = _product_dcos(product_grad, inv_norm, sample, token, tokens, column, columns)
                rows = load_rows(tokens_view, sample, token, channel, token < tokens, channels)
                total = multiply(tl.trans(part), rows, total)
        store_rows(sums if PROJECTED else out, sample, column, channel, total, in_range, channels)
    if PROJECTED:
        tl.debug_barrier()
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            offset = widen(tl.load(bias + channel, mask=channel < channels, other=0.0))
            total = dcos[:, None] * offset[None, :]
            total = add_product(total, sums, sample, column, in_range, channel, weight, channels, True, INNER)
            store_rows(out, sample, column, channel, total, in_range, channels)


def launch_query_gradients(
    r: Round,
    tokens: Tensor,
    partial: Tensor,
    sum_dcos: Tensor,
    product_grad: Tensor | None,
    last_grad: Tensor,
    query_grad: Tensor,
    projection: list[Tensor] | None,
) -> None:
    """Writes query_grad [B, J, C]; for the first round, product_grad [B, N, J] None, last_grad [B, J, C] as well."""
    columns = query_grad.shape[1]
    tile = r.tile(128, columns)
    weight, bias = (projection or [sum_dcos] * 2)[:2]
    query_gradients[(r.batch * triton.cdiv(columns, tile.columns),)](
        partial,
        sum_dcos,
        partial.shape[1],
        rows_of(last_grad),
        view_of(tokens),
        r.vector(r.layout.inv_norm),
        vector_of(sum_dcos if product_grad is None else product_grad),
        rows_of(r.empty(columns, r.channels)),
        rows_of(query_grad),
        weight,
        bias,
        r.tokens,
        r.channels,
        columns,
        FIRST=product_grad is None,
        PROJECTED=projection is not None,
        **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER", stages=1),
    )


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
    """Through query = product^T unit, with the next round's product [O, J]: its gradient = unit query_grad^T, and
    unit_grad [O, C] = product query_grad. Grid: (samples * blocks of centres,)."""
    blocks = tl.cdiv(centres, CENTRES)
    sample = tl.program_id(0) // blocks
    centre = tl.program_id(0) % blocks * CENTRES + tl.arange(0, CENTRES)
    mask = centre < centres
    compute: tl.constexpr = unit_grad.start.dtype.element_ty
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        in_range = column < columns
        total = tl.zeros((CENTRES, COLUMNS), compute)
        for start in range(0, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            rows = load_rows(query_grad, sample, column, channel, in_range, channels)
            own = load_rows(unit, sample, centre, channel, mask, channels)
            total = multiply(own, tl.trans(rows), total)
        at = centre[:, None] * columns + column[None, :]
        store_vector(product_grad, sample, at, total, mask[:, None] & in_range[None, :])
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        total = tl.zeros((CENTRES, CHANNELS), compute)
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            in_range = column < columns
            at = centre[:, None] * columns + column[None, :]
            factors = load_vector(product, sample, at, mask[:, None] & in_range[None, :])
            rows = load_rows(query_grad, sample, column, channel, in_range, channels)
            total = multiply(factors, rows, total)
        store_rows(unit_grad, sample, centre, channel, total, mask, channels)


def launch_chain_gradients(
    r: Round, product: Vector, query_grad: Tensor, unit_grad: Tensor, product_grad: Tensor
) -> None:
    """Writes unit_grad [B, O, C] and the gradient of the next round's product [B, O, J], from query_grad [B, J, C]."""
    columns = query_grad.shape[1]
    tile = r.tile(64, columns).at_most(centres=WALK_CENTRES)
    chain_gradients[(r.batch * triton.cdiv(r.centres, tile.centres),)](
        product,
        rows_of(query_grad),
        r.rows(r.layout.unit),
        rows_of(unit_grad),
        vector_of(product_grad),
        r.channels,
        r.centres,
        columns,
        **tile.options("CENTRES", "CHANNELS", "COLUMNS"),
    )
