"""The ICM's dispatch to tokens on Triton kernels, behind its last round.

Variant paper: S [N, J], the product of the rounds' cosines, is (x . projected + offset) * inverse norm of the key, with
projected [J, C] made from the later rounds: neither S nor a matrix of cosines of the tokens is stored.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, block_of, compute_type, matmul_add, widen
from ..saved import RoundLayout
from .operands import MAX_REGISTERS
from .pool import project_rows
from .tiles import (
    Gate,
    Vector,
    gate_weight,
    load_matrix,
    load_rows,
    load_transposed,
    precision,
    sigmoid,
    store_matrix,
    store_rows,
    view_of,
)

Tensor = torch.Tensor


@triton.jit
def _round_product(
    result,  # tokens [N, C]
    inv_norm,  # [N]
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
    """Columns `column` of product = (result . projected + offset) * inv_norm: of the cosines from this round on."""
    column_offset = tl.load(offset + column, mask=column < columns, other=0.0)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        total = tl.zeros((TOKENS, column.shape[0]), column_offset.dtype)
        for inner in range(0, channels, CHANNELS):
            channel = inner + tl.arange(0, CHANNELS)
            tile = load_matrix(result, token, tokens, channel, channels)
            factors = load_transposed(projected, column, columns, channel, channels)
            total = matmul_add(tile, factors, total, PRECISION)
        inverse = tl.load(inv_norm + token, mask=token < tokens, other=0.0)
        value = inverse[:, None] * (total + column_offset[None, :])
        store_matrix(product, token, tokens, column, columns, value)


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
    """Rows `column` of query = product^T unit, and offset = query . bias."""
    column_offset = tl.zeros((column.shape[0],), query.dtype.element_ty)
    for inner in range(0, channels, CHANNELS):
        channel = inner + tl.arange(0, CHANNELS)
        total = tl.zeros((column.shape[0], CHANNELS), column_offset.dtype)
        for first in range(0, tokens, TOKENS):
            token = first + tl.arange(0, TOKENS)
            tile = tl.trans(load_matrix(product, token, tokens, column, columns))
            total = matmul_add(tile, load_matrix(unit, token, tokens, channel, channels), total, PRECISION)
        store_matrix(query, column, columns, channel, channels, total)
        if PROJECTED:
            factors = widen(tl.load(bias + channel, mask=channel < channels, other=0.0))
            column_offset += tl.sum(total * factors.to(column_offset.dtype)[None, :], axis=1)
    tl.store(offset + column, column_offset, mask=column < columns)


@triton.jit
def queries(
    saved,  # Vector
    inv_norm,  # of each round: where the part begins, as in `SavedRound`
    unit,
    result,
    query,
    projected,
    offset,
    product,
    tokens,  # of each round
    weights,  # Wk [C, C] of each round
    biases,  # bk [C]
    columns,
    channels,
    ROUNDS: tl.constexpr,
    PROJECTED: tl.constexpr,  # bit t: whether round t has projections
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the last round to the second: product_t = (result_(t-1) . projected_t + offset_t) * inv_norm_t, then
    query_(t-1) = product_t^T unit_(t-1), projected_(t-1) = query_(t-1) Wk, offset_(t-1) = query_(t-1) . bk. The last
    round has its own already.

    Grid: (samples * blocks of columns,).
    """
    blocks = tl.cdiv(columns, COLUMNS)
    record = saved.start + (tl.program_id(0) // blocks).to(tl.int64) * saved.sample
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    for t in tl.static_range(ROUNDS - 1, 0, -1):
        own_query = record + query[t - 1]
        own_projected = record + projected[t - 1]
        # fmt: off
        _round_product(
            record + result[t - 1], record + inv_norm[t], record + projected[t], record + offset[t],
            record + product[t], column, tokens[t], columns, channels, TOKENS, CHANNELS, PRECISION,
        )
        # What a step writes, other threads read in the next.
        tl.debug_barrier()
        _round_query(
            record + product[t], record + unit[t - 1], biases[t - 1], own_query, record + offset[t - 1],
            column, tokens[t], columns, channels, (PROJECTED >> (t - 1)) & 1, TOKENS, CHANNELS, PRECISION,
        )
        # fmt: on
        tl.debug_barrier()
        if (PROJECTED >> (t - 1)) & 1:
            weight = weights[t - 1]
            project_rows(own_query, weight, own_projected, column, columns, channels, CHANNELS, PRECISION)
        else:
            for first in range(0, channels, CHANNELS):
                channel = first + tl.arange(0, CHANNELS)
                value = load_matrix(own_query, column, columns, channel, channels)
                store_matrix(own_projected, column, columns, channel, channels, value)
        tl.debug_barrier()


def launch_queries(
    maps: list[list[Tensor] | None], layouts: list[RoundLayout], channels: int, saved: Tensor
) -> None:
    """Writes product of every round but the first, query, projected and offset of every round but the last."""
    if len(layouts) == 1:
        return  # its pooling has written them
    columns = layouts[-1].centres
    block = max(16, min(triton.next_power_of_2(columns), 256 if INTERPRETED.value else 16))
    wide = 256 if INTERPRETED.value else 16 if saved.dtype == torch.float64 else 32
    parts = ("inv_norm", "unit", "result", "query", "projected", "offset", "product")
    queries[(saved.shape[0] * triton.cdiv(columns, block),)](
        Vector(saved, saved.shape[1]),
        *(tuple(getattr(layout.saved, part) for layout in layouts) for part in parts),
        tuple(layout.tokens for layout in layouts),
        *(tuple(saved if p is None else p[i] for p in maps) for i in (0, 1)),
        columns,
        channels,
        ROUNDS=len(layouts),
        PROJECTED=sum(1 << t for t, p in enumerate(maps) if p is not None),
        TOKENS=64 if INTERPRETED.value else 16,
        COLUMNS=block,
        CHANNELS=block_of(channels, wide),
        PRECISION=precision(saved.dtype),
        num_warps=4,
        num_stages=2,
        maxnreg=MAX_REGISTERS,
    )


@triton.jit
def _dense_gate(
    x,
    sample,
    token,
    mask,
    inv_norm,
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
    product = tl.zeros((token.shape[0], column.shape[0]), inv_norm.dtype)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        tile = widen(load_rows(x, sample, token, channel, mask, channels))
        factors = load_transposed(projected, column, columns, channel, channels)
        product = matmul_add(tile, factors, product, PRECISION)
    column_offset = tl.load(offset + column, mask=column < columns, other=0.0)
    gate = sigmoid(alpha * (inv_norm[:, None] * (product + column_offset[None, :])) + beta)
    return tl.where((column < columns)[None, :], gate, 0.0)


@triton.jit
def dense_dispatch(
    x,
    saved,  # Vector
    gate,
    out,
    inv_norm,  # of the first round: where the part begins
    projected,
    offset,
    result,  # of the last round
    tokens,
    columns,
    channels,
    tiles,  # of a sample
    WHOLE: tl.constexpr,  # COLUMNS holds all
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = sigmoid(alpha * S + beta) R. Grid: (samples * tiles of tokens,)."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    mask = token < tokens
    record = saved.start + sample * saved.sample
    dtype: tl.constexpr = compute_type(x.start.dtype.element_ty)
    token_inv_norm = tl.load(record + inv_norm + token, mask=mask, other=0.0)
    alpha = tl.load(gate.alpha)
    beta = tl.load(gate.beta)
    # fmt: off
    if WHOLE:
        factors = _dense_gate(
            x, sample, token, mask, token_inv_norm, record + projected, record + offset, alpha, beta,
            tl.arange(0, COLUMNS), columns, channels, CHANNELS, PRECISION,
        )
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        total = tl.zeros((TOKENS, CHANNELS), dtype)
        if WHOLE:
            centres = load_matrix(record + result, tl.arange(0, COLUMNS), columns, channel, channels)
            total = matmul_add(factors, centres, total, PRECISION)
        else:
            for begin in range(0, columns, COLUMNS):
                column = begin + tl.arange(0, COLUMNS)
                factors = _dense_gate(
                    x, sample, token, mask, token_inv_norm, record + projected, record + offset, alpha, beta,
                    column, columns, channels, CHANNELS, PRECISION,
                )
                centres = load_matrix(record + result, column, columns, channel, channels)
                total = matmul_add(factors, centres, total, PRECISION)
        store_rows(out, sample, token, channel, total, mask, channels)
    # fmt: on


def launch_dense(x: Tensor, gate: Gate, layouts: list[RoundLayout], saved: Tensor, out: Tensor) -> None:
    """Variant paper: out [B, N, C] from x [B, N, C] and what the rounds saved."""
    batch, tokens, channels = x.shape
    first, last = layouts[0], layouts[-1]
    columns = last.centres
    wide = saved.dtype == torch.float64
    block = 256 if INTERPRETED.value else 16 if wide else 64
    column_block = max(16, min(triton.next_power_of_2(columns), block))
    token_block = max(16, min(triton.next_power_of_2(tokens), block))
    tiles = triton.cdiv(tokens, token_block)
    dense_dispatch[(batch * tiles,)](
        view_of(x),
        Vector(saved, saved.shape[1]),
        gate,
        view_of(out),
        first.saved.inv_norm,
        first.saved.projected,
        first.saved.offset,
        last.saved.result,
        tokens,
        columns,
        channels,
        tiles,
        WHOLE=columns <= column_block,
        TOKENS=token_block,
        COLUMNS=column_block,
        CHANNELS=block_of(channels, 256 if INTERPRETED.value else 16 if wide else 32),
        PRECISION=precision(saved.dtype),
        num_warps=4,
        num_stages=2,
        maxnreg=MAX_REGISTERS,
    )


@triton.jit
def chain_dispatch(
    saved,  # Vector
    labels,  # Vector
    gate,
    out,
    cosines,  # of each round: where they begin in `saved`
    label_starts,  # likewise in the labels
    result,  # of the last round
    tokens,
    channels,
    tiles,  # of a sample
    ROUNDS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out = (product over the rounds of sigmoid(alpha_t * cosine_t + beta_t)) * R of a token's last centre, along its
    chain of own centres. Grid: (samples * tiles of tokens,)."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    mask = token < tokens
    record = saved.start + sample * saved.sample
    own_labels = labels.start + sample * labels.sample
    centre = token
    weight = tl.full((TOKENS,), 1.0, saved.start.dtype.element_ty)
    for t in tl.static_range(ROUNDS):
        cosine = tl.load(record + cosines[t] + centre, mask=mask, other=0.0)
        weight *= gate_weight(cosine, gate, t, True)
        centre = tl.load(own_labels + label_starts[t] + centre, mask=mask, other=0)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = mask[:, None] & (channel < channels)[None, :]
        at = centre[:, None] * channels + channel[None, :]
        value = weight[:, None] * tl.load(record + result + at, mask=inside, other=0.0)
        store_rows(out, sample, token, channel, value, mask, channels)


def launch_chains(gate: Gate, layouts: list[RoundLayout], labels: Tensor, saved: Tensor, out: Tensor) -> None:
    """Variant released: out [B, N, C] from labels and what the rounds saved."""
    batch, tokens, channels = out.shape
    token_block = max(16, min(triton.next_power_of_2(tokens), 256 if INTERPRETED.value else 32))
    tiles = triton.cdiv(tokens, token_block)
    chain_dispatch[(batch * tiles,)](
        Vector(saved, saved.shape[1]),
        Vector(labels, labels.shape[1]),
        gate,
        view_of(out),
        tuple(layout.saved.cosine for layout in layouts),
        tuple(layout.labels for layout in layouts),
        layouts[-1].saved.result,
        tokens,
        channels,
        tiles,
        ROUNDS=len(layouts),
        TOKENS=token_block,
        CHANNELS=block_of(channels, 256 if INTERPRETED.value else 64),
        num_warps=4,
    )
