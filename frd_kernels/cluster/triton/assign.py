"""Second Triton kernel of a round: a chunk of a sample's tokens finds its centres and adds up what each of them gets.

A tile of tokens adds to its clusters as a one-hot matrix times the tile. A NaN or an infinity would spread from there
to every cluster: sums that come out not finite are made again token by token. Where the chunks' sums are many, kernels
of their own add them up.
"""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, compute_type, matmul_add, narrow, widen
from .operands import MAX_REGISTERS, ROWS, Results, Round, ScoreMatrix, Sizes, Sums
from .tiles import (
    inverse_norm,
    is_last,
    is_live,
    load_labels,
    load_matrix,
    load_rows,
    load_transposed,
    next_part,
    store_matrix,
    token_weight,
)

NO_INDEX = tl.constexpr(2147483647)

_MAX_CHUNKS = 4 if INTERPRETED.value else 16
# Centres x channels that a chunk of tokens adds up right after it has found their labels.
_MAX_FUSED_SUMS = 1 << 14
# Elements of all chunks' sums of a sample that its last chunk adds up rather than a kernel of its own.
_MAX_LAST_CHUNK_SUMS = 1 << 16


@triton.jit
def _key_squares(
    keys,
    sample,
    token,
    active,
    projection,
    channels,
    PROJECTED: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(|key|^2 [token], zeros, but NaN where a key is not finite). Keys are made block by block and not kept."""
    dtype: tl.constexpr = compute_type(keys.start.dtype.element_ty)
    square = tl.zeros((token.shape[0],), dtype)
    nan_flag = square
    if PROJECTED:
        weight = projection.key_weight
        width: tl.constexpr = TILE.keys
        for first in range(0, channels, width):
            column = first + tl.arange(0, width)
            key = tl.zeros((token.shape[0], width), dtype)
            for inner in range(0, channels, TILE.channels):
                source = inner + tl.arange(0, TILE.channels)
                x = load_rows(keys, sample, token, source, active, channels)
                factors = load_transposed(weight, column, channels, source, channels)
                if x.dtype != weight.dtype.element_ty:
                    factors = widen(factors)
                key = matmul_add(x, factors, key, PRECISION)
            bias = tl.load(projection.key_bias + column, mask=column < channels, other=0.0)
            key += widen(bias)[None, :]
            square += tl.sum(key * key, axis=1)
            nan_flag += tl.sum(key * 0.0, axis=1)
    else:
        for inner in range(0, channels, TILE.channels):
            channel = inner + tl.arange(0, TILE.channels)
            x = widen(load_rows(keys, sample, token, channel, active, channels))
            square += tl.sum(x * x, axis=1)
            nan_flag += tl.sum(x * 0.0, axis=1)
    return square, nan_flag


@triton.jit
def _scores(
    keys,
    sample,
    token,
    active,
    factor,
    nan_flag,
    scores,
    centre,
    centres,
    channels,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products [token, centre] of keys times `factor` and unit centres; where the factor is 0, `nan_flag`. scores: of
    the sample."""
    dtype: tl.constexpr = compute_type(keys.start.dtype.element_ty)
    score = tl.zeros((token.shape[0], centre.shape[0]), dtype)
    for first in range(0, channels, TILE.channels):
        channel = first + tl.arange(0, TILE.channels)
        x = load_rows(keys, sample, token, channel, active, channels)
        if PARTS == 1:
            x = x * factor[:, None]
        # From the smallest part on, in sums of their own: a tensor core truncates what it adds to.
        block = tl.zeros((token.shape[0], centre.shape[0]), dtype)
        for p in tl.static_range(PARTS - 1, -1, -1):
            part = load_transposed(scores.matrix + p * centres * channels, centre, centres, channel, channels)
            block = matmul_add(x, part, block, PRECISION)
        score += block
    in_range = centre < centres
    offset = tl.load(scores.offset + centre, mask=in_range, other=0.0)[None, :]
    if PARTS == 1:
        score = score + offset * factor[:, None]
    else:
        score = score * tl.load(scores.row_scale + centre, mask=in_range, other=1.0)[None, :] + offset
        score = tl.where(factor[:, None] == 0, nan_flag[:, None] + offset * 0.0, score)
    return score


@triton.jit
def _merge_best(best, score, centre, centres, sign):
    """The best so far (rank, index, score, each [token]), updated by the scores of a later block of centres: the
    lowest index keeps a tie, and the first NaN keeps all."""
    rank, index, own = best
    ranked = tl.where((centre < centres)[None, :], score * sign, float("-inf"))
    is_nan = ranked != ranked
    block_nan = tl.max(is_nan.to(tl.int32), axis=1) != 0
    top = tl.max(tl.where(is_nan, float("-inf"), ranked), axis=1)
    hit = tl.where(block_nan[:, None], is_nan, ranked == top[:, None])
    found = tl.min(tl.where(hit, centre[None, :], NO_INDEX), axis=1)
    chosen = tl.sum(tl.where(centre[None, :] == found[:, None], score, 0.0), axis=1)
    better = (rank == rank) & (block_nan | (top > rank))
    rank = tl.where(better, tl.where(block_nan, float("nan"), top), rank)
    return rank, tl.where(better, found, index), tl.where(better, chosen, own)


@triton.jit
def _assign_tile(
    keys,
    sample,
    token,
    active,
    projection,
    scores,
    centres,
    channels,
    sign,
    PROJECTED: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(label, cosine, inverse norm) of each token of a tile; of no meaning where it is not `active`. Scores are made
    block by block and not kept."""
    # fmt: off
    square, nan_flag = _key_squares(
        keys, sample, token, active, projection, channels, PROJECTED, TILE, PRECISION
    )
    inv_norm = inverse_norm(square)
    # A norm that overflows makes every cosine 0, whatever the order of the scores; one that counts as zero may have
    # scores that underflowed. Multiplied in first (0 for the overflow), the scores rank as the cosines do. Keys of
    # 16 bit that count as zero have cosines too small to rank.
    overflowed = (inv_norm > 0) == 0
    factor = tl.where(overflowed, 0.0, 1.0).to(inv_norm.dtype)
    if PARTS == 1:
        factor = tl.where(overflowed | (is_live(inv_norm) == 0), inv_norm, factor)
    best = (
        tl.full((token.shape[0],), float("-inf"), inv_norm.dtype),
        tl.zeros((token.shape[0],), tl.int32),
        tl.zeros((token.shape[0],), inv_norm.dtype),
    )
    for first in range(0, centres, TILE.centres):
        centre = first + tl.arange(0, TILE.centres)
        score = _scores(
            keys, sample, token, active, factor, nan_flag, scores, centre, centres, channels, PARTS, TILE, PRECISION
        )
        best = _merge_best(best, score, centre, centres, sign)
    # fmt: on
    # Equal where the scores contain it already, and where both are 1.
    contained = factor == inv_norm
    return best[1], tl.where(contained, best[2], best[2] * inv_norm), inv_norm


@triton.jit
def _add_clusters(
    total, one_hot, weight, values, WEIGHTED: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr
):
    """total [centre, channel] + the sums over the tokens of one_hot [centre, token] * weight [token] * values."""
    if WEIGHTED:
        rest = weight
        for _ in tl.static_range(PARTS):
            part, rest = next_part(rest, values.dtype)
            factors = tl.where(one_hot, part[None, :], tl.zeros_like(part)[None, :])
            total = matmul_add(factors, values, total, PRECISION)
    else:
        total = matmul_add(narrow(tl.where(one_hot, 1.0, 0.0), values.dtype), values, total, PRECISION)
    return total


@triton.jit
def _cluster_sums(
    values,
    sample,
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
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(sums [centre, channel], weights [centre], tokens [centre]) of the tokens begin .. end of a sample. cosines: its
    first."""
    dtype: tl.constexpr = compute_type(values.start.dtype.element_ty)
    total = tl.zeros((centre.shape[0], channel.shape[0]), dtype)
    weight_sum = tl.zeros((centre.shape[0],), dtype)
    count = tl.zeros((centre.shape[0],), tl.int32)
    for first in range(begin, end, TILE.summed):
        token = first + tl.arange(0, TILE.summed)
        label = load_labels(labels, sample, token, token < end)
        weight = tl.load(cosines + token, mask=token < end, other=0.0)
        weight = token_weight(weight, slope, shift, WEIGHTED)
        tile = load_rows(values, sample, token, channel, label >= 0, channels)
        one_hot = label[None, :] == centre[:, None]
        count += tl.sum(one_hot.to(tl.int32), axis=1)
        if WEIGHTED:
            weight_sum += tl.sum(tl.where(one_hot, weight[None, :], 0.0), axis=1)
        total = _add_clusters(total, one_hot, weight, tile, WEIGHTED, PARTS, PRECISION)
    if not WEIGHTED:
        weight_sum = count.to(dtype)
    return total, weight_sum, count


@triton.jit
def _cluster_sums_by_token(
    values,
    sample,
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
):
    """The sums of `_cluster_sums`, token by token: what is not finite stays in its cluster and channel."""
    dtype: tl.constexpr = compute_type(values.start.dtype.element_ty)
    total = tl.zeros((centre.shape[0], channel.shape[0]), dtype)
    for first in range(begin, end):
        token = first + tl.arange(0, 1)
        label = load_labels(labels, sample, token, token < end)
        weight = token_weight(tl.load(cosines + token), slope, shift, WEIGHTED)
        row = widen(load_rows(values, sample, token, channel, label >= 0, channels))
        total = tl.where(centre[:, None] == label[None, :], total + weight[:, None] * row, total)
    return total


@triton.jit
def _chunk_sums(
    values,
    sample,
    labels,
    cosines,
    slope,
    shift,
    begin,
    end,
    sums,
    first,
    last,
    centres,
    channels,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes a chunk's sums: blocks first .. last of centres x channels, the last axis the fastest. sums: of the
    chunk."""
    slices = tl.cdiv(channels, TILE.slice)
    for block in range(first, last):
        centre = block // slices * TILE.centres + tl.arange(0, TILE.centres)
        channel = block % slices * TILE.slice + tl.arange(0, TILE.slice)
        # fmt: off
        total, weight_sum, count = _cluster_sums(
            values, sample, labels, cosines, slope, shift, begin, end, centre, channel, channels,
            WEIGHTED, PARTS, TILE, PRECISION,
        )
        if tl.max(tl.max(((total - total) != 0.0).to(tl.int32), axis=1), axis=0) != 0:
            total = _cluster_sums_by_token(
                values, sample, labels, cosines, slope, shift, begin, end, centre, channel, channels, WEIGHTED
            )
        # fmt: on
        store_matrix(sums.totals, centre, centres, channel, channels, total)
        if block % slices == 0:
            tl.store(sums.weights + centre, weight_sum, mask=centre < centres)
            tl.store(sums.counts + centre, count, mask=centre < centres)


@triton.jit
def _chunk_of(sums, sample, chunk, sizes):
    """The sums of a chunk of a sample."""
    row = (sample * sizes.chunks + chunk) * sizes.centres
    return Sums(sums.totals + row * sizes.channels, sums.weights + row, sums.counts + row)


@triton.jit
def _finish_rows(
    record,
    layout,
    sums,
    projection,
    results,
    first,
    sizes,
    PROJECTED: tl.constexpr,
    RESULTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """weight_sum, mean and result of the centres first .. first + ROWS of a sample, whose first chunk's sums are
    `sums`, and whose row of `saved` begins at `record`."""
    centres, channels = sizes.centres, sizes.channels
    row = first + tl.arange(0, ROWS)
    total = tl.full((ROWS,), 1.0, record.dtype.element_ty)
    count = tl.zeros((ROWS,), tl.int32)
    for k in range(sizes.chunks):
        total += tl.load(sums.weights + k * centres + row, mask=row < centres, other=0.0)
        if RESULTS:
            count += tl.load(sums.counts + k * centres + row, mask=row < centres, other=0)
    tl.store(record + layout.weight_sum + row, total, mask=row < centres)
    if RESULTS:
        tl.store(results.counts + row, count, mask=row < centres)
    for begin in range(0, channels, CHANNELS):
        column = begin + tl.arange(0, CHANNELS)
        value = load_matrix(record + layout.pooled, row, centres, column, channels)
        for k in range(sizes.chunks):
            value += load_matrix(sums.totals + k * centres * channels, row, centres, column, channels)
        value = value / total[:, None]
        store_matrix(record + layout.mean, row, centres, column, channels, value)
        if not PROJECTED:
            store_matrix(record + layout.result, row, centres, column, channels, value)
            if RESULTS:
                store_matrix(results.centres, row, centres, column, channels, value)
    if PROJECTED:
        tl.debug_barrier()
        for begin in range(0, channels, CHANNELS):
            column = begin + tl.arange(0, CHANNELS)
            value = tl.zeros((ROWS, CHANNELS), record.dtype.element_ty)
            for inner in range(0, channels, CHANNELS):
                source = inner + tl.arange(0, CHANNELS)
                mean = load_matrix(record + layout.mean, row, centres, source, channels)
                weight = load_transposed(projection.value_weight, column, channels, source, channels)
                value = matmul_add(mean, widen(weight).to(value.dtype), value, PRECISION)
            bias = widen(tl.load(projection.value_bias + column, mask=column < channels, other=0.0))
            value += bias.to(value.dtype)[None, :]
            store_matrix(record + layout.result, row, centres, column, channels, value)


@triton.jit
def _results_of(results, sample, sizes):
    """The results of a sample."""
    row = sample * sizes.centres
    return Results(
        results.similarity + sample * sizes.tokens,
        results.centres + row * sizes.channels,
        results.counts + row,
    )


@triton.jit
def assign(
    keys,
    values,
    mask,
    saved,  # Vector
    layout,
    labels,  # Vector
    results,
    scores,
    projection,
    gate,
    sums,
    counters,  # [B]
    sizes,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PROJECTED: tl.constexpr,
    RESULTS: tl.constexpr,
    AGGREGATE: tl.constexpr,
    FINISH: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """label_n = argmax_o cosine(key_n, unit_o), with sign(alpha) where the weights are sigmoids; AGGREGATE: then the
    chunk's sums over each cluster of weight_n * value_n; FINISH: a sample's last chunk also makes its centres.
    RESULTS: writes what only the operator `cluster` returns.

    Grid: (samples * chunks,).
    """
    centres, channels = sizes.centres, sizes.channels
    sample = (tl.program_id(0) // sizes.chunks).to(tl.int64)
    chunk = tl.program_id(0) % sizes.chunks
    begin = chunk * sizes.chunk
    end = tl.minimum(begin + sizes.chunk, sizes.tokens)
    record = saved.start + sample * saved.sample
    own_results = _results_of(results, sample, sizes)
    own_labels = labels.start + sample * labels.sample
    own_scores = ScoreMatrix(
        scores.matrix + sample * PARTS * centres * channels,
        scores.row_scale + sample * centres,
        scores.offset + sample * scores.offset_sample,
        scores.offset_sample,
    )
    slope = tl.load(gate.alpha)
    shift = tl.load(gate.beta)
    # The arg-max does not see a positive factor, so neither the token's norm nor the sigmoid; a negative alpha flips
    # it, and zero or NaN ties all.
    sign = tl.full((), 1.0, slope.dtype)
    if WEIGHTED or RESULTS:
        sign = tl.where(slope > 0, 1.0, tl.where(slope < 0, -1.0, slope)).to(slope.dtype)
    for first in range(begin, end, TILE.tokens):
        token = first + tl.arange(0, TILE.tokens)
        in_range = token < end
        active = in_range
        if MASKED:
            at = mask.start + sample * mask.sample + token.to(tl.int64) * mask.token
            active = in_range & (tl.load(at, mask=in_range, other=0) != 0)
        # fmt: off
        label, cosine, inv_norm = _assign_tile(
            keys, sample, token, active, projection, own_scores, centres, channels, sign,
            PROJECTED, PARTS, TILE, PRECISION,
        )
        # fmt: on
        if RESULTS:
            weight = cosine
            if WEIGHTED:
                weight = token_weight(cosine, slope, shift, WEIGHTED)
            tl.store(own_results.similarity + token, tl.where(active, weight, 0.0), mask=in_range)
        tl.store(own_labels + token, tl.where(active, label, -1), mask=in_range)
        tl.store(record + layout.cosine + token, tl.where(active, cosine, 0.0), mask=in_range)
        tl.store(record + layout.inv_norm + token, tl.where(active, inv_norm, 0.0), mask=in_range)
    if AGGREGATE:
        # Other threads than those that wrote the labels read them.
        tl.debug_barrier()
        blocks = tl.cdiv(centres, TILE.centres) * tl.cdiv(channels, TILE.slice)
        # fmt: off
        _chunk_sums(
            values, sample, labels, record + layout.cosine, slope, shift, begin, end,
            _chunk_of(sums, sample, chunk, sizes), 0, blocks, centres, channels, WEIGHTED, PARTS, TILE, PRECISION,
        )
        if FINISH and is_last(counters + sample, sizes.chunks):
            for row in range(0, centres, TILE.rows):
                _finish_rows(
                    record, layout, _chunk_of(sums, sample, 0, sizes), projection, own_results, row, sizes,
                    PROJECTED, RESULTS, TILE.rows, TILE.channels, PRECISION,
                )
        # fmt: on


@triton.jit
def aggregate(
    values,
    saved,  # Vector
    layout,
    labels,  # Vector
    gate,
    sums,
    sizes,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums of `assign` over all tokens of a sample as its only chunk.

    Grid: (samples * blocks of centres * slices of channels,).
    """
    centres, channels = sizes.centres, sizes.channels
    blocks = tl.cdiv(centres, TILE.centres) * tl.cdiv(channels, TILE.slice)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    cosines = saved.start + sample * saved.sample + layout.cosine
    # fmt: off
    _chunk_sums(
        values, sample, labels, cosines, tl.load(gate.alpha), tl.load(gate.beta), 0, sizes.tokens,
        _chunk_of(sums, sample, 0, sizes), block, block + 1, centres, channels, WEIGHTED, PARTS, TILE, PRECISION,
    )
    # fmt: on


@triton.jit
def finish(
    saved,  # Vector
    layout,
    sums,
    projection,
    results,
    sizes,
    PROJECTED: tl.constexpr,
    RESULTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """mean_o = (pooled_o + sum of the chunks) / (1 + weight_sum_o), result = value projection of it; the chunks in
    their order. Grid: (samples * blocks of ROWS centres,)."""
    blocks = tl.cdiv(sizes.centres, ROWS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    # fmt: off
    _finish_rows(
        saved.start + sample * saved.sample, layout, _chunk_of(sums, sample, 0, sizes), projection,
        _results_of(results, sample, sizes), tl.program_id(0) % blocks * ROWS, sizes,
        PROJECTED, RESULTS, ROWS, CHANNELS, PRECISION,
    )
    # fmt: on


def chunk_count(tokens: int, centres: int) -> int:
    """Chunks of a sample's tokens: of 64 at least, and their partial centres no more than the tokens."""
    return max(1, min(_MAX_CHUNKS, triton.cdiv(tokens, 64), tokens // centres))


def launch_assign(r: Round) -> None:
    """Writes the labels, the rest of the round's layout and the results, from the score matrix of `launch_pool`."""
    tile = r.tile
    fused = r.centres * r.channels <= _MAX_FUSED_SUMS
    chunks = chunk_count(r.tokens, r.centres) if fused else 1
    finished = fused and chunks * r.centres * r.channels <= _MAX_LAST_CHUNK_SUMS
    shape = (r.batch, chunks, r.centres)
    sums = Sums(r.saved.new_empty((*shape, r.channels)), r.saved.new_empty(shape), r.labels.new_empty(shape))
    sizes = Sizes(r.tokens, r.centres, r.channels, chunks, r.tokens)
    # Without sums of its own each tile is a chunk.
    programs = chunks if fused else triton.cdiv(r.tokens, tile.tokens)
    chunk = triton.cdiv(triton.cdiv(r.tokens, programs), tile.tokens) * tile.tokens
    assign[(r.batch * programs,)](
        r.key_view,
        r.value_view,
        r.mask_view,
        r.saved_vector,
        r.layout,
        r.label_vector,
        r.outputs,
        r.scores,
        r.weights,
        r.gate,
        sums,
        r.counters[r.batch * triton.cdiv(r.centres, ROWS) :],
        sizes._replace(chunks=programs, chunk=chunk),
        MASKED=r.masked,
        WEIGHTED=r.weighted,
        PROJECTED=r.projected,
        RESULTS=r.results is not None,
        AGGREGATE=fused,
        FINISH=finished,
        PARTS=r.parts,
        TILE=tile,
        PRECISION=r.precision,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=MAX_REGISTERS,
    )
    if not fused:
        _launch_aggregate(r, sums, sizes)
    if not finished:
        _launch_finish(r, sums, sizes)


def _launch_aggregate(r: Round, sums: Sums, sizes: Sizes) -> None:
    tile = r.tile
    blocks = triton.cdiv(r.centres, tile.centres) * triton.cdiv(r.channels, tile.slice)
    aggregate[(r.batch * blocks,)](
        r.value_view,
        r.saved_vector,
        r.layout,
        r.label_vector,
        r.gate,
        sums,
        sizes,
        WEIGHTED=r.weighted,
        PARTS=r.parts,
        TILE=tile,
        PRECISION=r.precision,
        num_warps=4,
        num_stages=tile.stages,
    )


def _launch_finish(r: Round, sums: Sums, sizes: Sizes) -> None:
    finish[(r.batch * triton.cdiv(r.centres, ROWS),)](
        r.saved_vector,
        r.layout,
        sums,
        r.weights,
        r.outputs,
        sizes,
        PROJECTED=r.projected,
        RESULTS=r.results is not None,
        ROWS=ROWS,
        CHANNELS=r.centre_channels,
        PRECISION=r.precision,
        num_warps=4,
        num_stages=r.tile.stages,
    )
