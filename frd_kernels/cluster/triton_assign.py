"""Second Triton kernel of a round: a chunk of an item's tokens finds its centres and adds up what each of them gets."""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from .._triton_ops import compute_type, matmul_add, widen
from .triton_aggregate import chunk_sums, finish_rows
from .triton_tiles import inverse_norm, is_last, is_live, load_tokens, load_turned, pieces, token_weight

NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def key_squares(
    item,
    steps,
    token,
    held,
    weight,
    bias,
    channels,
    PROJECTED: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(sums of squares [token] of the keys of a tile, zeros, but NaN where a key is not finite). The keys pass block by
    block, and are not kept."""
    dtype: tl.constexpr = compute_type(item.dtype.element_ty)
    square = tl.zeros((token.shape[0],), dtype)
    odd = square
    if PROJECTED:
        for first in range(0, channels, KEYS):
            column = first + tl.arange(0, KEYS)
            key = tl.zeros((token.shape[0], KEYS), dtype)
            for inner in range(0, channels, CHANNELS):
                source = inner + tl.arange(0, CHANNELS)
                x = load_tokens(item, steps, token, held, source, channels)
                factors = load_turned(weight, column, channels, source, channels)
                if item.dtype.element_ty != weight.dtype.element_ty:
                    factors = widen(factors)
                key = matmul_add(x, factors, key, PRECISION)
            key += widen(tl.load(bias + column, mask=column < channels, other=0.0))[None, :]
            square += tl.sum(key * key, axis=1)
            odd += tl.sum(key * 0.0, axis=1)
    else:
        for inner in range(0, channels, CHANNELS):
            x = widen(load_tokens(item, steps, token, held, inner + tl.arange(0, CHANNELS), channels))
            square += tl.sum(x * x, axis=1)
            odd += tl.sum(x * 0.0, axis=1)
    return square, odd


@triton.jit
def _scores(
    item,
    steps,
    token,
    held,
    factor,
    odd,
    matrix,
    row_scale,
    offset,
    centre,
    centres,
    channels,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products [token, centre] of keys times `factor` and unit centres; where the factor is 0, `odd`."""
    dtype: tl.constexpr = compute_type(item.dtype.element_ty)
    score = tl.zeros((token.shape[0], centre.shape[0]), dtype)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        x = load_tokens(item, steps, token, held, channel, channels)
        if PARTS == 1:
            x = x * factor[:, None]
        # From the smallest part on, in sums of their own: a tensor core truncates what it adds to.
        block = tl.zeros((token.shape[0], centre.shape[0]), dtype)
        for p in tl.static_range(PARTS - 1, -1, -1):
            some = load_turned(matrix + p * centres * channels, centre, centres, channel, channels)
            block = matmul_add(x, some, block, PRECISION)
        score += block
    known = centre < centres
    moved = tl.load(offset + centre, mask=known, other=0.0)[None, :]
    if PARTS == 1:
        score = score + moved * factor[:, None]
    else:
        score = score * tl.load(row_scale + centre, mask=known, other=1.0)[None, :] + moved
        score = tl.where(factor[:, None] == 0, odd[:, None] + moved * 0.0, score)
    return score


@triton.jit
def _best_of(best, score, centre, centres, sign):
    """The best so far (rank, index, score, each [token]) and the scores of a later block of centres: the lowest index
    keeps a tie, and the first NaN keeps all."""
    rank, index, own = best
    ranked = tl.where((centre < centres)[None, :], score * sign, float("-inf"))
    odd = ranked != ranked
    block_odd = tl.max(odd.to(tl.int32), axis=1) != 0
    top = tl.max(tl.where(odd, float("-inf"), ranked), axis=1)
    hit = tl.where(block_odd[:, None], odd, ranked == top[:, None])
    found = tl.min(tl.where(hit, centre[None, :], NO_INDEX), axis=1)
    chosen = tl.sum(tl.where(centre[None, :] == found[:, None], score, 0.0), axis=1)
    better = (rank == rank) & (block_odd | (top > rank))
    rank = tl.where(better, tl.where(block_odd, float("nan"), top), rank)
    return rank, tl.where(better, found, index), tl.where(better, chosen, own)


@triton.jit
def assign_tile(
    item,
    steps,
    token,
    held,
    weight,
    bias,
    matrix,
    row_scale,
    offset,
    centres,
    channels,
    sign,
    PROJECTED: tl.constexpr,
    PARTS: tl.constexpr,
    CENTRES: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(label, cosine, scale) of each token of a tile; of no meaning where it is not `held`. No matrix of all scores is
    made."""
    # fmt: off
    square, odd = key_squares(
        item, steps, token, held, weight, bias, channels, PROJECTED, CHANNELS, KEYS, PRECISION
    )
    scale = inverse_norm(square)
    # Where the norm has overflowed or counts as zero, scores may rank centres that the cosines, all zero, do not, or
    # have underflowed. 16-bit keys that count as zero have cosines too small to rank.
    lost = (scale > 0) == 0
    factor = tl.where(lost, 0.0, 1.0).to(scale.dtype)
    if PARTS == 1:
        factor = tl.where(lost | (is_live(scale) == 0), scale, factor)
    best = (
        tl.full((token.shape[0],), float("-inf"), scale.dtype),
        tl.zeros((token.shape[0],), tl.int32),
        tl.zeros((token.shape[0],), scale.dtype),
    )
    for first in range(0, centres, CENTRES):
        centre = first + tl.arange(0, CENTRES)
        score = _scores(
            item, steps, token, held, factor, odd, matrix, row_scale, offset, centre, centres, channels,
            PARTS, CHANNELS, PRECISION,
        )
        best = _best_of(best, score, centre, centres, sign)
    # fmt: on
    done = factor == scale  # in the scores already, or both 1
    return best[1], tl.where(done, best[2], best[2] * scale), scale


@triton.jit
def assign(
    keys,
    values,
    mask,
    saved,  # [B, length], this round's record at `record_at`
    labels,  # [B, label_step]
    similarity,  # [B, N], where SIMILARITY
    centres_out,  # [B, O, C], where CENTRES_OUT
    counts,  # [B, O], likewise
    matrix,  # [B, PARTS, O, C]
    row_scale,  # [B, O]
    offset,  # [B, offset_step]
    key_weight,
    key_bias,
    value_weight,
    value_bias,
    alpha,
    beta,
    partial,  # [B, chunks, O, C]
    masses,  # [B, chunks, O]
    numbers,  # [B, chunks, O]
    tickets,  # [B]
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
    label_step,
    label_at,
    offset_step,
    tokens,
    centres,
    channels,
    chunks,
    chunk,  # tokens of one
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PROJECTED: tl.constexpr,
    RESULTS: tl.constexpr,
    AGGREGATE: tl.constexpr,
    FINISH: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    CENTRES: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEYS: tl.constexpr,
    SLICE_TOKENS: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Labels, cosines and scales of a chunk of tokens; AGGREGATE: then the chunk's sums; FINISH: the last chunk of an
    item also makes its centres. RESULTS: writes what only the operator `cluster` returns. Grid: (items * chunks,)."""
    item = (tl.program_id(0) // chunks).to(tl.int64)
    part = tl.program_id(0) % chunks
    begin = part * chunk
    end = tl.minimum(begin + chunk, tokens)
    record = saved + item * length + record_at
    cosines, scales, _, _, _, _, _, _, _ = pieces(record, tokens, centres, channels)
    own_labels = labels + item * label_step + label_at
    slope = tl.load(alpha)
    shift = tl.load(beta)
    # The arg-max does not see a positive factor, so neither the token's norm nor the sigmoid; a negative alpha flips
    # it, and zero or NaN ties all.
    sign = tl.full((), 1.0, slope.dtype)
    if WEIGHTED or RESULTS:
        sign = tl.where(slope > 0, 1.0, tl.where(slope < 0, -1.0, slope)).to(slope.dtype)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        real = token < end
        held = real
        if MASKED:
            at = mask + item * mask_batch + token.to(tl.int64) * mask_token
            held = real & (tl.load(at, mask=real, other=0) != 0)
        # fmt: off
        label, cosine, scale = assign_tile(
            keys + item * key_batch, (key_token, key_channel), token, held, key_weight, key_bias,
            matrix + item * PARTS * centres * channels, row_scale + item * centres, offset + item * offset_step,
            centres, channels, sign,
            PROJECTED, PARTS, CENTRES, CHANNELS, KEYS, PRECISION,
        )
        # fmt: on
        if RESULTS:
            weight = cosine
            if WEIGHTED:
                weight = token_weight(cosine, slope, shift, WEIGHTED)
            tl.store(similarity + item * tokens + token, tl.where(held, weight, 0.0), mask=real)
        tl.store(own_labels + token, tl.where(held, label, -1), mask=real)
        tl.store(cosines + token, tl.where(held, cosine, 0.0), mask=real)
        tl.store(scales + token, tl.where(held, scale, 0.0), mask=real)
    if AGGREGATE:
        tl.debug_barrier()  # other threads than those that wrote the labels read them
        size = centres * channels
        # fmt: off
        chunk_sums(
            values + item * value_batch, (value_token, value_channel), own_labels, cosines, slope, shift, begin, end,
            partial + (item * chunks + part) * size, masses + (item * chunks + part) * centres,
            numbers + (item * chunks + part) * centres, 0, tl.cdiv(centres, CENTRES) * tl.cdiv(channels, SLICE),
            centres, channels, WEIGHTED, PARTS, CENTRES, SLICE_TOKENS, SLICE, PRECISION,
        )
        if FINISH and is_last(tickets + item, chunks):
            for row in range(0, centres, ROWS):
                finish_rows(
                    record, partial + item * chunks * size, masses + item * chunks * centres,
                    numbers + item * chunks * centres, value_weight, value_bias,
                    centres_out + item * size, counts + item * centres, row,
                    tokens, centres, channels, chunks, PROJECTED, RESULTS, ROWS, CHANNELS,
                    PRECISION,
                )
        # fmt: on
