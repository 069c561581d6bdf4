"""Triton kernels of the backward through the own cosine: pulls of the tokens, sums by label, chains of centres."""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from .._triton_ops import narrow, widen
from .triton_backward_round import centre_rows
from .triton_backward_tiles import (
    add_selected,
    load_labels,
    load_rows,
    load_vector,
    store_rows,
    store_vector,
    weight_of,
)
from .triton_tiles import is_last


@triton.jit
def own_pulls(
    values,
    labels,
    cosine,
    scale,
    similarity_grad,
    mean,
    mean_grad,
    mass,
    alpha,
    beta,
    pull,
    gates,  # [items, places, 2]
    places,
    tokens,
    channels,
    DIVIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """pull [tokens]: gradients of the own cosines times `scale`; those of alpha and beta, summed over the tile.
    DIVIDE: mean_grad is still to be divided by the mass. Grid: (items * tiles of tokens,)."""
    tiles = tl.cdiv(tokens, TOKENS)
    item = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    token = tile * TOKENS + tl.arange(0, TOKENS)
    label = load_labels(labels, item, token, token < tokens)
    active = label >= 0
    cos = load_vector(cosine, item, token, active)
    pulled = tl.zeros((TOKENS,), cos.dtype)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        value = widen(load_rows(values, item, token, channel, active, channels))
        value -= load_rows(mean, item, label, channel, active, channels)
        grad = widen(load_rows(mean_grad, item, label, channel, active, channels))
        pulled += tl.sum(value * grad, axis=1)
    if DIVIDE:
        pulled /= tl.where(active, load_vector(mass, item, label, active), 1.0)
    weight = weight_of(cos, alpha, beta, True)
    argument = (load_vector(similarity_grad, item, token, active) + pulled) * weight * (1.0 - weight)
    argument = tl.where(active, argument, 0.0)
    value = tl.load(alpha) * argument * load_vector(scale, item, token, active)
    store_vector(pull, item, token, value, token < tokens)
    at = gates + (item.to(tl.int64) * places + tile) * 2
    tl.store(at, tl.sum(argument * cos, axis=0))
    tl.store(at + 1, tl.sum(argument, axis=0))


@triton.jit
def _add_one_by_one(
    view, labels, factor, scale, item, begin, end, centre, channel, channels, SCALED: tl.constexpr
):
    """The sums of `label_sums` without products of zero and another token's element, which may be infinite."""
    compute: tl.constexpr = factor[0].dtype.element_ty
    total = tl.zeros((centre.shape[0], channel.shape[0]), compute)
    for n in range(begin, end):
        token = n + tl.arange(0, 1)
        label = load_labels(labels, item, token, token < end)
        coefficient = load_vector(factor, item, token, label >= 0)
        if SCALED:
            coefficient *= load_vector(scale, item, token, label >= 0)
        row = coefficient[:, None] * widen(load_rows(view, item, token, channel, label >= 0, channels))
        total += tl.where((centre == label)[:, None], row, 0.0)
    return total


@triton.jit
def label_sums(
    view,
    labels,
    factor,
    scale,
    partial,  # [items, chunks, centres, C]
    pulls,  # [items, chunks, centres]
    ticket,  # [items, blocks of centres, blocks of channels + 1], 0
    out,
    round,
    tokens,
    channels,
    centres,
    chunks,
    span,
    SCALED: tl.constexpr,
    GATHER: tl.constexpr,
    SHARED: tl.constexpr,
    PROJECTED: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CENTRES: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out [centres, C]: for each centre the sum of factor (SCALED: times scale) * row of its tokens. GATHER: then
    `centre_rows` of `round`, its arguments from `unit` to `bias`. PARTS, CHUNKS: at least the chunks.
    Grid: (items * chunks * blocks of centres * blocks of channels,)."""
    round = round[:]  # made anew, see triton_backward_tiles
    blocks = tl.cdiv(channels, CHANNELS)
    centre_blocks = tl.cdiv(centres, CENTRES)
    block = tl.program_id(0) % blocks
    centre_block = tl.program_id(0) // blocks % centre_blocks
    piece = tl.program_id(0) // (blocks * centre_blocks)  # chunks of all items
    item = piece // chunks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    centre = centre_block * CENTRES + tl.arange(0, CENTRES)
    real = centre < centres
    compute: tl.constexpr = partial.dtype.element_ty
    total = tl.zeros((CENTRES, CHANNELS), compute)
    pull = tl.zeros((CENTRES,), compute)
    begin = piece % chunks * span
    end = tl.minimum(begin + span, tokens)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        label = load_labels(labels, item, token, token < end)
        active = label >= 0
        coefficient = load_vector(factor, item, token, active)
        if SCALED:
            coefficient *= load_vector(scale, item, token, active)
        rows = coefficient[:, None] * widen(load_rows(view, item, token, channel, active, channels))
        own = centre[:, None] == label[None, :]
        total = add_selected(total, own, rows, PARTS)
        if GATHER and PROJECTED:
            pull += tl.sum(tl.where(own, coefficient[None, :], 0.0), axis=1)
    if tl.max(tl.max(tl.where(total - total == 0, 0, 1), axis=1), axis=0) > 0:
        total = _add_one_by_one(
            view, labels, factor, scale, item, begin, end, centre, channel, channels, SCALED
        )
    rows_of = (partial, centres * channels, channels, 1)
    store_rows(rows_of, piece, centre, channel, total, real, channels)
    if GATHER and PROJECTED:  # noqa: SIM102  a constant and a value
        if block == 0:
            store_vector((pulls, centres), piece, centre, pull, real)
    tickets = ticket + (item * centre_blocks + centre_block) * (blocks + 1)
    if is_last(tickets + block, chunks):
        total = tl.zeros((CENTRES, CHANNELS), compute)
        for chunk in range(chunks):
            total += load_rows(rows_of, item * chunks + chunk, centre, channel, real, channels)
        store_rows(out, item, centre, channel, narrow(total, out[0].dtype.element_ty), real, channels)
        if GATHER:  # noqa: SIM102  a program that gathers nothing must not count
            if is_last(tickets + blocks, blocks):
                centre_rows(
                    pulls,
                    chunks,
                    *round,
                    item,
                    centre,
                    real,
                    centres,
                    channels,
                    PROJECTED,
                    SHARED,
                    PROJECTED,
                    CHUNKS,
                    CHANNELS,
                    INNER,
                )


@triton.jit
def _follow(saved, labels, alpha, beta, steps, item, centre, real):
    """The product of the similarities along the chains that leave the centres `centre` of a round through the later
    rounds, and the last centres they end in. steps: of each later round (offset in saved, offset in labels)."""
    weight = tl.full(centre.shape, 1.0, saved[0].dtype.element_ty)
    for i in tl.static_range(len(steps)):
        cosine = load_vector(saved, item, steps[i][0] + centre, real)
        weight *= weight_of(cosine, alpha + i, beta + i, True)
        centre = load_vector(labels, item, steps[i][1] + centre, real)
    return weight, centre


@triton.jit
def chains(
    grad,
    last,
    saved,
    labels,
    alpha,
    beta,
    steps,
    factor,
    ends,
    similarity_grad,
    weighted_dot,
    tokens,
    channels,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of each token the weight of its last centre, that centre, the gradient of its own similarity, and that of the
    product of the similarities behind it. alpha, beta: [T]; saved and labels: vectors that begin with the cosines and
    labels of round 1. Grid: (items * tiles of tokens,)."""
    steps = steps[:]  # made anew, see triton_backward_tiles
    tiles = tl.cdiv(tokens, TOKENS)
    item = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    real = token < tokens
    weight = weight_of(load_vector(saved, item, token, real), alpha, beta, True)
    label = load_vector(labels, item, token, real)
    behind, end = _follow(saved, labels, alpha + 1, beta + 1, steps, item, label, real)
    dot = tl.zeros((TOKENS,), saved[0].dtype.element_ty)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        row = widen(load_rows(grad, item, token, channel, real, channels))
        dot += tl.sum(row * load_rows(last, item, end, channel, real, channels), axis=1)
    store_vector(factor, item, token, weight * behind, real)
    store_vector(ends, item, token, end, real)
    store_vector(similarity_grad, item, token, behind * dot, real)
    store_vector(weighted_dot, item, token, weight * dot, real)


@triton.jit
def chain_scalars(
    before,  # labels of the round before
    before_dot,
    cosine,
    label,
    saved,
    labels,
    alpha,
    beta,
    steps,
    similarity_grad,
    weighted_dot,
    tokens_before,
    tokens,
    BEFORE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The last two of `chains` for the tokens of a later round, from those of the round before. alpha, beta: of this
    round on. Grid: (items * tiles of tokens,)."""
    steps = steps[:]  # made anew, see triton_backward_tiles
    tiles = tl.cdiv(tokens, TOKENS)
    item = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    real = token < tokens
    grad = tl.zeros((TOKENS,), saved[0].dtype.element_ty)
    for first in range(0, tokens_before, BEFORE):
        source = first + tl.arange(0, BEFORE)
        own = load_labels(before, item, source, source < tokens_before)
        part = load_vector(before_dot, item, source, source < tokens_before)
        grad += tl.sum(tl.where(token[:, None] == own[None, :], part[None, :], 0.0), axis=1)
    weight = weight_of(load_vector(cosine, item, token, real), alpha, beta, True)
    centre = load_vector(label, item, token, real)
    behind, _ = _follow(saved, labels, alpha + 1, beta + 1, steps, item, centre, real)
    store_vector(similarity_grad, item, token, grad * behind, real)
    store_vector(weighted_dot, item, token, grad * weight, real)
