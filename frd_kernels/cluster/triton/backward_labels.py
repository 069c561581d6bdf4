"""Backward through the own cosine on Triton: its gradient, sums over each centre's tokens, chains of own centres."""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton_ops import widen
from .backward_operands import (
    MAX_CHUNKS,
    CentreKeys,
    Round,
    choose_tile,
    chunks_of,
    saved_rows,
    saved_vector,
)
from .backward_round import centre_rows
from .tiles import (
    Gate,
    Vector,
    View,
    add_selected,
    gate_weight,
    is_last,
    load_labels,
    load_rows,
    load_vector,
    store_rows,
    store_vector,
    vector_of,
    view_of,
)

Tensor = torch.Tensor


@triton.jit
def cosine_gradients(
    values,
    labels,
    saved,
    layout,
    similarity_grad,
    mean_grad,
    gate,
    dcos,
    gate_grads,  # [B, tiles, 2]
    gate_tiles,
    tokens,
    channels,
    DIVIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """With w = sigmoid(a), a = alpha * cosine + beta: da = (similarity_grad + (value - mean) . mean_grad) w (1 - w) and
    dcos = alpha * da * inv_norm; gate_grads: sums over the tile of da * cosine and of da, alpha's and beta's.
    DIVIDE: mean_grad is still to be divided by weight_sum.

    Grid: (samples * tiles of tokens,).
    """
    tiles = tl.cdiv(tokens, TOKENS)
    sample = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    token = tile * TOKENS + tl.arange(0, TOKENS)
    label = load_labels(labels, sample, token, token < tokens)
    active = label >= 0
    cosine = load_vector(saved_vector(saved, layout.cosine), sample, token, active)
    mean = saved_rows(saved, layout.mean, channels)
    dot = tl.zeros((TOKENS,), cosine.dtype)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        value = widen(load_rows(values, sample, token, channel, active, channels))
        value -= load_rows(mean, sample, label, channel, active, channels)
        grad = widen(load_rows(mean_grad, sample, label, channel, active, channels))
        dot += tl.sum(value * grad, axis=1)
    if DIVIDE:
        weight_sum = load_vector(saved_vector(saved, layout.weight_sum), sample, label, active)
        dot /= tl.where(active, weight_sum, 1.0)
    weight = gate_weight(cosine, gate, 0, True)
    argument = (load_vector(similarity_grad, sample, token, active) + dot) * weight * (1.0 - weight)
    argument = tl.where(active, argument, 0.0)
    inv_norm = load_vector(saved_vector(saved, layout.inv_norm), sample, token, active)
    store_vector(dcos, sample, token, tl.load(gate.alpha) * argument * inv_norm, token < tokens)
    at = gate_grads + (sample.to(tl.int64) * gate_tiles + tile) * 2
    tl.store(at, tl.sum(argument * cosine, axis=0))
    tl.store(at + 1, tl.sum(argument, axis=0))


def gate_tile_count(r: Round) -> int:
    return triton.cdiv(r.tokens, r.tile().tokens)


def launch_cosine_gradients(
    r: Round,
    values: Tensor,
    similarity_grad: Vector,
    mean_grad: View,
    gate: Gate,
    gate_grads: Tensor,
    divide: bool,
) -> Vector:
    """dcos [B, N], see `cosine_gradients`; gate_grads [B, tiles, 2], zeros: receives parts of alpha's and beta's."""
    dcos = vector_of(r.empty(r.tokens))
    tile = r.tile()
    cosine_gradients[(r.batch * triton.cdiv(r.tokens, tile.tokens),)](
        view_of(values),
        r.labels,
        r.saved,
        r.layout,
        similarity_grad,
        mean_grad,
        gate,
        dcos,
        gate_grads,
        gate_grads.shape[1],
        r.tokens,
        r.channels,
        DIVIDE=divide,
        **tile.options("TOKENS", "CHANNELS"),
    )
    return dcos


def sum_gate_grads(gate_grads: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients [T] of alpha and beta from their parts [T, B, tiles, 2]."""
    alpha, beta = (
        part.sum((1, 2), dtype=torch.float64).to(gate_grads.dtype) for part in gate_grads.unbind(3)
    )
    return alpha, beta


@triton.jit
def _sums_by_token(
    view, labels, factor, scale, sample, begin, end, centre, channel, channels, SCALED: tl.constexpr
):
    """The sums of `label_sums` without products of zero and another token's element, which may be infinite."""
    compute: tl.constexpr = factor.start.dtype.element_ty
    total = tl.zeros((centre.shape[0], channel.shape[0]), compute)
    for n in range(begin, end):
        token = n + tl.arange(0, 1)
        label = load_labels(labels, sample, token, token < end)
        coefficient = load_vector(factor, sample, token, label >= 0)
        if SCALED:
            coefficient *= load_vector(scale, sample, token, label >= 0)
        row = coefficient[:, None] * widen(load_rows(view, sample, token, channel, label >= 0, channels))
        total += tl.where((centre == label)[:, None], row, 0.0)
    return total


@triton.jit
def label_sums(
    view,
    labels,
    factor,
    scale,
    partial,  # [B, chunks, O, C]
    sum_dcos,  # [B, chunks, O]
    counters,  # [B, blocks of centres, blocks of channels + 1], zeros
    out,
    centre_keys,  # `CentreKeys` where CENTRE_KEYS
    tokens,
    channels,
    centres,
    chunks,
    span,
    SCALED: tl.constexpr,
    CENTRE_KEYS: tl.constexpr,
    SHARED: tl.constexpr,
    PROJECTED: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CENTRES: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out_o = sum over the tokens n of centre o of factor_n * row_n, SCALED: times scale_n as well; CENTRE_KEYS: then
    `centre_rows`. PARTS: of a float32, see `add_selected`; CHUNKS: at least the chunks.

    Grid: (samples * chunks * blocks of centres * blocks of channels,).
    """
    if CENTRE_KEYS:  # built once more, see backward_operands
        centre_keys = CentreKeys(*centre_keys)
    blocks = tl.cdiv(channels, CHANNELS)
    centre_blocks = tl.cdiv(centres, CENTRES)
    block = tl.program_id(0) % blocks
    centre_block = tl.program_id(0) // blocks % centre_blocks
    piece = tl.program_id(0) // (blocks * centre_blocks)  # chunks of all samples
    sample = piece // chunks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    centre = centre_block * CENTRES + tl.arange(0, CENTRES)
    mask = centre < centres
    compute: tl.constexpr = partial.dtype.element_ty
    total = tl.zeros((CENTRES, CHANNELS), compute)
    dcos = tl.zeros((CENTRES,), compute)
    begin = piece % chunks * span
    end = tl.minimum(begin + span, tokens)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        label = load_labels(labels, sample, token, token < end)
        active = label >= 0
        coefficient = load_vector(factor, sample, token, active)
        if SCALED:
            coefficient *= load_vector(scale, sample, token, active)
        rows = coefficient[:, None] * widen(load_rows(view, sample, token, channel, active, channels))
        own = centre[:, None] == label[None, :]
        total = add_selected(total, own, rows, PARTS)
        if CENTRE_KEYS and PROJECTED:
            dcos += tl.sum(tl.where(own, coefficient[None, :], 0.0), axis=1)
    if tl.max(tl.max(tl.where(total - total == 0, 0, 1), axis=1), axis=0) > 0:
        total = _sums_by_token(
            view, labels, factor, scale, sample, begin, end, centre, channel, channels, SCALED
        )
    partial_rows = View(partial, centres * channels, channels, 1)
    store_rows(partial_rows, piece, centre, channel, total, mask, channels)
    if CENTRE_KEYS and PROJECTED:  # noqa: SIM102  a constant and a value
        if block == 0:
            store_vector(Vector(sum_dcos, centres), piece, centre, dcos, mask)
    counter = counters + (sample * centre_blocks + centre_block) * (blocks + 1)
    if is_last(counter + block, chunks):
        total = tl.zeros((CENTRES, CHANNELS), compute)
        for chunk in range(chunks):
            total += load_rows(partial_rows, sample * chunks + chunk, centre, channel, mask, channels)
        store_rows(out, sample, centre, channel, total, mask, channels)
        if CENTRE_KEYS:  # noqa: SIM102  else the program must not count
            if is_last(counter + blocks, blocks):
                # fmt: off
                centre_rows(
                    centre_keys, sum_dcos, chunks, sample, centre, mask, centres, channels,
                    PROJECTED, SHARED, PROJECTED, CHUNKS, CHANNELS, INNER,
                )
                # fmt: on


def sum_by_label(
    rows: View,
    labels: Vector,
    factor: Vector,
    scale: Vector | None,
    out: View,
    sizes: tuple[int, int, int, int],  # B, N, O, C
    centre_keys: CentreKeys | None = None,
    shared: bool = False,
    projected: bool = False,
) -> None:
    """out [B, O, C]: the sum of factor [B, N] (times scale [B, N]) * row of each centre's tokens; then the gradients
    of the pooled tokens by `centre_keys`. projected: `out` are sums of dcos * token, its unit_grad is made of them."""
    batch, tokens, centres, channels = sizes
    tile = choose_tile(rows.start.dtype, tokens, centres, 1, channels)
    if tile.warps == 4:  # the assembler would keep to 64 and spill
        tile = tile._replace(registers=255)
    chunks, span = chunks_of(tokens, centres, tile.tokens)
    blocks, centre_blocks = triton.cdiv(channels, tile.channels), triton.cdiv(centres, tile.centres)
    partial = factor.start.new_empty((batch, chunks, centres, channels))
    sum_dcos = factor.start.new_empty((batch, chunks, centres) if projected else (1,))
    counters = factor.start.new_zeros((batch, centre_blocks, blocks + 1), dtype=torch.int32)
    label_sums[(batch * chunks * centre_blocks * blocks,)](
        rows,
        labels,
        factor,
        scale or factor,
        partial,
        sum_dcos,
        counters,
        out,
        centre_keys or (),
        tokens,
        channels,
        centres,
        chunks,
        span,
        SCALED=scale is not None,
        CENTRE_KEYS=centre_keys is not None,
        SHARED=shared,
        PROJECTED=projected,
        PARTS=3 if rows.start.dtype == torch.float32 else 2,
        CHUNKS=MAX_CHUNKS,
        **tile.options("TOKENS", "CENTRES", "CHANNELS", "INNER"),
    )


@triton.jit
def _follow(saved, labels, gate, first, cosines, label_starts, sample, centre, mask):
    """The product of the similarities along the chains that leave the centres `centre` of a round through the later
    rounds, whose gates are from `first` on, and the last centres they end in."""
    weight = tl.full(centre.shape, 1.0, saved.start.dtype.element_ty)
    for i in tl.static_range(len(cosines)):
        cosine = load_vector(saved, sample, cosines[i] + centre, mask)
        weight *= gate_weight(cosine, gate, first + i, True)
        centre = load_vector(labels, sample, label_starts[i] + centre, mask)
    return weight, centre


@triton.jit
def chains(
    grad,
    last,
    saved,  # Vector that begins with the cosines of round 1
    labels,  # Vector that begins with the labels of round 1
    gate,
    cosines,  # of each later round: where they begin in `saved`
    label_starts,  # likewise in `labels`
    factor,
    ends,
    similarity_grad,
    weighted_dot,
    tokens,
    channels,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of each token of round 1, with w its similarity, v the product of those behind it on its chain and d = grad .
    last centre: factor = w v, ends = last centre, similarity_grad = v d, weighted_dot = w d.

    Grid: (samples * tiles of tokens,).
    """
    tiles = tl.cdiv(tokens, TOKENS)
    sample = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    mask = token < tokens
    weight = gate_weight(load_vector(saved, sample, token, mask), gate, 0, True)
    label = load_vector(labels, sample, token, mask)
    behind, end = _follow(saved, labels, gate, 1, cosines, label_starts, sample, label, mask)
    dot = tl.zeros((TOKENS,), saved.start.dtype.element_ty)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        row = widen(load_rows(grad, sample, token, channel, mask, channels))
        dot += tl.sum(row * load_rows(last, sample, end, channel, mask, channels), axis=1)
    store_vector(factor, sample, token, weight * behind, mask)
    store_vector(ends, sample, token, end, mask)
    store_vector(similarity_grad, sample, token, behind * dot, mask)
    store_vector(weighted_dot, sample, token, weight * dot, mask)


@triton.jit
def chain_scalars(
    labels_before,  # of the round before
    dot_before,
    cosine,
    label,
    saved,
    labels,
    gate,  # from this round on
    cosines,
    label_starts,
    similarity_grad,
    weighted_dot,
    tokens_before,
    tokens,
    BEFORE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """similarity_grad and weighted_dot of `chains` for the tokens of a later round, with d = the sum of the
    weighted_dot of the tokens of the round before whose centre they are. Grid: (samples * tiles of tokens,)."""
    tiles = tl.cdiv(tokens, TOKENS)
    sample = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    mask = token < tokens
    grad = tl.zeros((TOKENS,), saved.start.dtype.element_ty)
    for first in range(0, tokens_before, BEFORE):
        source = first + tl.arange(0, BEFORE)
        own = load_labels(labels_before, sample, source, source < tokens_before)
        part = load_vector(dot_before, sample, source, source < tokens_before)
        grad += tl.sum(tl.where(token[:, None] == own[None, :], part[None, :], 0.0), axis=1)
    weight = gate_weight(load_vector(cosine, sample, token, mask), gate, 0, True)
    centre = load_vector(label, sample, token, mask)
    behind, _ = _follow(saved, labels, gate, 1, cosines, label_starts, sample, centre, mask)
    store_vector(similarity_grad, sample, token, grad * behind, mask)
    store_vector(weighted_dot, sample, token, grad * weight, mask)


def launch_chains(rounds: list[Round], grad: Tensor, gate: Gate, last_grad: View) -> list[Tensor]:
    """Variant released, grad [B, N, C] of the output: writes the gradient of the last centres [B, J, C] and returns
    those of the similarities [B, N] of each round."""
    r, last = rounds[0], rounds[-1]
    base = r.layout.cosine
    saved = r.vector(base)
    cosines = tuple(q.layout.cosine - base for q in rounds[1:])
    label_starts, at = [], 0
    for q in rounds[:-1]:
        at += q.tokens
        label_starts.append(at)
    factor, ends = r.empty(r.tokens), r.empty(r.tokens, dtype=torch.int32)
    similarity_grads = [q.empty(q.tokens) for q in rounds]
    dots = [q.empty(q.tokens) for q in rounds]
    tile = r.tile()
    chains[(r.batch * triton.cdiv(r.tokens, tile.tokens),)](
        view_of(grad),
        last.rows(last.layout.result),
        saved,
        r.labels,
        gate,
        cosines,
        tuple(label_starts),
        vector_of(factor),
        vector_of(ends),
        vector_of(similarity_grads[0]),
        vector_of(dots[0]),
        r.tokens,
        r.channels,
        **tile.options("TOKENS", "CHANNELS"),
    )
    sizes = r.batch, r.tokens, last.centres, r.channels
    sum_by_label(view_of(grad), vector_of(ends), vector_of(factor), None, last_grad, sizes)
    for t in range(1, len(rounds)):
        before, q = rounds[t - 1], rounds[t]
        chain_scalars[(q.batch * triton.cdiv(q.tokens, 16),)](
            before.labels,
            vector_of(dots[t - 1]),
            q.vector(q.layout.cosine),
            q.labels,
            saved,
            r.labels,
            Gate(gate.alpha[t:], gate.beta[t:]),
            cosines[t:],
            tuple(label_starts[t:]),
            vector_of(similarity_grads[t]),
            vector_of(dots[t]),
            before.tokens,
            q.tokens,
            BEFORE=min(256, triton.next_power_of_2(before.tokens)),
            TOKENS=16,
            num_warps=4,
        )
    return similarity_grads
