"""Backward of a round on Triton: gradients of its means, of the keys of its centres, and of its tokens."""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..._triton_ops import widen
from .backward_dense import first_product_gradient, later_product_gradient
from .backward_operands import (
    FIRST_PRODUCT,
    LATER_PRODUCT,
    OWN_COSINE,
    WALK_CENTRES,
    CentreKeys,
    FirstProduct,
    LaterProduct,
    OwnCosine,
    Round,
    saved_vector,
)
from .tiles import (
    Gate,
    Vector,
    View,
    add_product,
    gate_weight,
    is_live,
    live_inv_norm,
    load_labels,
    load_rows,
    load_vector,
    rows_of,
    store_rows,
    view_of,
)

Tensor = torch.Tensor
Source = OwnCosine | FirstProduct | LaterProduct


@triton.jit
def _mean_rows(
    result_grad,
    mean_grad,
    weight_sum,
    weight,
    sample,
    centre,
    mask,
    channels,
    PROJECTED: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """mean_grad [centres, C] = result_grad / weight_sum, PROJECTED: result_grad Wv / weight_sum."""
    compute: tl.constexpr = mean_grad.start.dtype.element_ty
    divisor = load_vector(weight_sum, sample, centre, mask)
    divisor = tl.where(mask, divisor, 1.0)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        if PROJECTED:
            value = tl.zeros((centre.shape[0], CHANNELS), compute)
            # fmt: off
            value = add_product(
                value, result_grad, sample, centre, mask, channel, weight, channels, False, INNER
            )
            # fmt: on
        else:
            value = widen(load_rows(result_grad, sample, centre, channel, mask, channels))
        store_rows(mean_grad, sample, centre, channel, value / divisor[:, None], mask, channels)


@triton.jit
def means(
    result_grad,
    mean_grad,
    weight_sum,
    weight,
    channels,
    centres,
    PROJECTED: tl.constexpr,
    CENTRES: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """mean_grad = result_grad Wv / weight_sum. Grid: (samples * blocks of centres,)."""
    blocks = tl.cdiv(centres, CENTRES)
    sample = tl.program_id(0) // blocks
    centre = tl.program_id(0) % blocks * CENTRES + tl.arange(0, CENTRES)
    # fmt: off
    _mean_rows(
        result_grad, mean_grad, weight_sum, weight, sample, centre, centre < centres, channels,
        PROJECTED, CHANNELS, INNER,
    )
    # fmt: on


@triton.jit
def centre_rows(
    keys,  # `CentreKeys`
    sum_dcos,
    chunks,
    sample,
    centre,
    mask,
    centres,
    channels,
    LIFT: tl.constexpr,
    SHARED: tl.constexpr,
    PROJECTED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradient of the centres' keys, dk = (g - unit (unit . g)) * inv_norm with g = unit_grad, and of the pooled
    tokens: dk Wk, or dk.

    LIFT: g is made first, sum(dcos) bk + centre_grad Wk^T, from the sums of dcos * token that centre_grad holds and
    from sum_dcos [B, chunks, O]. SHARED: the pooled tokens are values as well, and mean_grad is added.
    """
    compute: tl.constexpr = keys.unit_grad.start.dtype.element_ty
    along = tl.zeros((centre.shape[0],), compute)
    if LIFT:
        chunk = tl.arange(0, CHUNKS)[:, None]
        inside = (chunk < chunks) & mask[None, :]
        sums = Vector(sum_dcos, chunks * centres)
        dcos = tl.sum(load_vector(sums, sample, chunk * centres + centre[None, :], inside), axis=0)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        if LIFT:
            offset = widen(tl.load(keys.bias + channel, mask=channel < channels, other=0.0))
            total = dcos[:, None] * offset[None, :]
            # fmt: off
            total = add_product(
                total, keys.centre_grad, sample, centre, mask, channel, keys.weight, channels, True, INNER
            )
            # fmt: on
            store_rows(keys.unit_grad, sample, centre, channel, total, mask, channels)
        else:
            total = load_rows(keys.unit_grad, sample, centre, channel, mask, channels)
        along += tl.sum(total * load_rows(keys.unit, sample, centre, channel, mask, channels), axis=1)
    tl.debug_barrier()
    inv_norm = live_inv_norm(load_vector(keys.unit_inv_norm, sample, centre, mask))
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        total = load_rows(keys.unit_grad, sample, centre, channel, mask, channels)
        direction = load_rows(keys.unit, sample, centre, channel, mask, channels)
        key_grad = (total - direction * along[:, None]) * inv_norm[:, None]
        if PROJECTED:
            store_rows(keys.centre_grad, sample, centre, channel, key_grad, mask, channels)
        else:
            if SHARED:
                key_grad += load_rows(keys.mean_grad, sample, centre, channel, mask, channels)
            store_rows(keys.pooled_grad, sample, centre, channel, key_grad, mask, channels)
    if PROJECTED:
        tl.debug_barrier()
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            value = load_rows(keys.mean_grad, sample, centre, channel, mask, channels)
            # fmt: off
            value = add_product(
                value, keys.centre_grad, sample, centre, mask, channel, keys.weight, channels, False, INNER
            )
            # fmt: on
            store_rows(keys.pooled_grad, sample, centre, channel, value, mask, channels)


@triton.jit
def dense_centres(
    result_grad,
    weight_sum,
    value_weight,
    centre_keys,
    channels,
    centres,
    PROJECTED: tl.constexpr,
    CENTRES: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """`means` and `centre_rows` of a round whose unit_grad is known. Grid: (samples * blocks of centres,)."""
    keys = CentreKeys(*centre_keys)
    blocks = tl.cdiv(centres, CENTRES)
    sample = tl.program_id(0) // blocks
    centre = tl.program_id(0) % blocks * CENTRES + tl.arange(0, CENTRES)
    mask = centre < centres
    # fmt: off
    _mean_rows(
        result_grad, keys.mean_grad, weight_sum, value_weight, sample, centre, mask, channels,
        PROJECTED, CHANNELS, INNER,
    )
    tl.debug_barrier()
    centre_rows(
        keys, weight_sum.start, 0, sample, centre, mask, centres, channels,
        False, True, PROJECTED, 1, CHANNELS, INNER,
    )
    # fmt: on


def launch_means(r: Round, result_grad: Tensor, mean_grad: View, value_weight: Tensor | None) -> None:
    """Writes mean_grad [B, O, C] from result_grad [B, O, C]; value_weight: Wv [C, C]."""
    tile = r.tile().at_most(centres=WALK_CENTRES)
    means[(r.batch * triton.cdiv(r.centres, tile.centres),)](
        rows_of(result_grad),
        mean_grad,
        r.vector(r.layout.weight_sum),
        result_grad if value_weight is None else value_weight,
        r.channels,
        r.centres,
        PROJECTED=value_weight is not None,
        **tile.options("CENTRES", "CHANNELS", "INNER", stages=1),
    )


def launch_dense_centres(
    r: Round, result_grad: Tensor, keys: CentreKeys, value_weight: Tensor | None
) -> None:
    """Writes the gradients that `keys` names, but unit_grad, from result_grad [B, O, C]; value_weight: Wv [C, C]."""
    tile = r.tile().at_most(centres=WALK_CENTRES)
    dense_centres[(r.batch * triton.cdiv(r.centres, tile.centres),)](
        rows_of(result_grad),
        r.vector(r.layout.weight_sum),
        result_grad if value_weight is None else value_weight,
        keys,
        r.channels,
        r.centres,
        PROJECTED=value_weight is not None,
        **tile.options("CENTRES", "CHANNELS", "INNER", stages=1),
    )


@triton.jit
def _key_gradient(
    key,
    keys,
    sample,
    token,
    mask,
    channel,
    channels,
    label,
    cosine,
    inv_norm,
    source,
    SOURCE: tl.constexpr,
    SCALED: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradient of the tile `key`. Own cosine: dcos * (unit_label - cosine * key * inv_norm); product of the cosines:
    (dS query - (S . dS) key * inv_norm) * inv_norm. SCALED: dcos is still to be multiplied by inv_norm."""
    if SOURCE == OWN_COSINE:
        own = OwnCosine(*source)
        dcos = load_vector(own.dcos, sample, token, mask)
        if SCALED:
            dcos *= inv_norm
        dcos = tl.where(is_live(inv_norm), dcos, 0.0)
        direction = load_rows(own.unit, sample, label, channel, label >= 0, channels)
        grad = dcos[:, None] * (direction - cosine[:, None] * (inv_norm[:, None] * key))
    else:
        if SOURCE == FIRST_PRODUCT:
            # fmt: off
            along, grad = first_product_gradient(
                FirstProduct(*source), keys, sample, token, mask, channel, channels, inv_norm, COLUMNS, INNER
            )
            # fmt: on
        else:
            later = LaterProduct(*source)
            along, grad = later_product_gradient(later, sample, token, mask, channel, channels, COLUMNS)
        grad = live_inv_norm(inv_norm)[:, None] * (grad - along[:, None] * (inv_norm[:, None] * key))
    return grad


@triton.jit
def key_gradients(
    tokens_view,
    out,
    labels,
    saved,
    layout,
    source,
    weight,
    bias,
    tokens,
    channels,
    SOURCE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradient of the projected keys [N, C], key = x Wk^T + bk, see `_key_gradient`.

    Grid: (samples * tiles of tokens * blocks of channels,).
    """
    source = source[:]  # built once more, see backward_operands
    blocks = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(tokens, TOKENS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(0) // blocks % tiles * TOKENS + tl.arange(0, TOKENS)
    sample = tl.program_id(0) // (blocks * tiles)
    mask = token < tokens
    compute: tl.constexpr = saved.start.dtype.element_ty
    offset = widen(tl.load(bias + channel, mask=channel < channels, other=0.0))
    key = tl.zeros((TOKENS, CHANNELS), compute) + offset[None, :]
    key = add_product(key, tokens_view, sample, token, mask, channel, weight, channels, True, INNER)
    # fmt: off
    grad = _key_gradient(
        key, tokens_view, sample, token, mask, channel, channels,
        load_labels(labels, sample, token, mask),
        load_vector(saved_vector(saved, layout.cosine), sample, token, mask),
        load_vector(saved_vector(saved, layout.inv_norm), sample, token, mask),
        source, SOURCE, False, COLUMNS, INNER,
    )
    # fmt: on
    store_rows(out, sample, token, channel, grad, mask, channels)


def _columns(source: Source) -> int:
    return 1 if isinstance(source, OwnCosine) else source.columns


def _kind(source: Source) -> int:
    kinds = {OwnCosine: OWN_COSINE, FirstProduct: FIRST_PRODUCT, LaterProduct: LATER_PRODUCT}
    return int(kinds[type(source)].value)


def launch_key_gradients(
    r: Round, tokens: Tensor, source: Source, projection: list[Tensor], columns: int
) -> Tensor:
    """[B, N, C] in the dtype of the tokens [B, N, C]; projection: Wk, bk, .. ; columns: J."""
    out = torch.empty((r.batch, r.tokens, r.channels), dtype=r.dtype, device=tokens.device)
    tile = r.tile(64, columns)
    # Its products are of float32, and need more registers.
    crowded = isinstance(source, FirstProduct) and r.dtype != torch.bfloat16
    if crowded:
        tile = tile.at_most(tokens=32)
    grid = r.batch * triton.cdiv(r.tokens, tile.tokens) * triton.cdiv(r.channels, tile.channels)
    key_gradients[(grid,)](
        view_of(tokens),
        rows_of(out),
        r.labels,
        r.saved,
        r.layout,
        source,
        *projection[:2],
        r.tokens,
        r.channels,
        SOURCE=_kind(source),
        **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER", stages=1 if crowded else 2),
    )
    return out


@triton.jit
def _add_bins(
    acc, view, saved, layout, sample, token, channel, mask, channels, coverage, DIVIDE: tl.constexpr
):
    """acc [tokens, channels] + the sum over the bins that a token lies in of inv_bin_count * the bin's row; DIVIDE:
    divided by its weight_sum."""
    y = token // coverage.width
    x = token % coverage.width
    top = y * coverage.rows // coverage.height
    bottom = ((y + 1) * coverage.rows - 1) // coverage.height
    left = x * coverage.columns // coverage.width
    right = ((x + 1) * coverage.columns - 1) // coverage.width
    for i in range(coverage.max_y):
        for j in range(coverage.max_x):
            covers = mask & (top + i <= bottom) & (left + j <= right)
            bin = (top + i) * coverage.columns + left + j
            part = load_vector(saved_vector(saved, layout.inv_bin_count), sample, bin, covers)
            if DIVIDE:
                weight_sum = load_vector(saved_vector(saved, layout.weight_sum), sample, bin, covers)
                part = tl.where(covers, part / weight_sum, 0.0)
            acc += part[:, None] * widen(load_rows(view, sample, bin, channel, covers, channels))
    return acc


@triton.jit
def token_gradients(
    keys,
    key_grads,
    keys_out,
    values_out,
    labels,
    saved,
    layout,
    source,
    mean_grad,
    pooled_grad,
    weight,
    gate,
    coverage,
    tokens,
    channels,
    SOURCE: tl.constexpr,
    SHARED: tl.constexpr,
    PROJECTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradient of a token: that of its key (PROJECTED: key_grads Wk), weight * mean_grad of its centre, and of each
    bin that it lies in pooled_grad * inv_bin_count.

    SHARED: the tokens are keys and values; else the gradients of keys and values are apart, and mean_grad is that of
    the centres, still to be divided by weight_sum. Grid: (samples * tiles of tokens * blocks of channels,).
    """
    source = source[:]  # built once more, see backward_operands
    blocks = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(tokens, TOKENS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(0) // blocks % tiles * TOKENS + tl.arange(0, TOKENS)
    sample = tl.program_id(0) // (blocks * tiles)
    mask = token < tokens
    compute: tl.constexpr = saved.start.dtype.element_ty
    label = load_labels(labels, sample, token, mask)
    active = label >= 0
    cosine = load_vector(saved_vector(saved, layout.cosine), sample, token, active)
    # fmt: off
    if PROJECTED:
        grad = tl.zeros((TOKENS, CHANNELS), compute)
        grad = add_product(grad, key_grads, sample, token, mask, channel, weight, channels, False, INNER)
    else:
        grad = _key_gradient(
            widen(load_rows(keys, sample, token, channel, active, channels)),
            keys, sample, token, active, channel, channels, label, cosine,
            load_vector(saved_vector(saved, layout.inv_norm), sample, token, active),
            source, SOURCE, SCALED, COLUMNS, INNER,
        )
    value_grad = widen(load_rows(mean_grad, sample, label, channel, active, channels))
    if not SHARED:
        weight_sum = load_vector(saved_vector(saved, layout.weight_sum), sample, label, active)
        value_grad /= tl.where(active, weight_sum, 1.0)[:, None]
    value_grad *= gate_weight(cosine, gate, 0, WEIGHTED)[:, None]
    if SHARED:
        grad += value_grad
    grad = _add_bins(
        grad, pooled_grad, saved, layout, sample, token, channel, active, channels, coverage, False
    )
    grad = tl.where(active[:, None], grad, 0.0)
    store_rows(keys_out, sample, token, channel, grad, mask, channels)
    if not SHARED:
        value_grad = _add_bins(
            value_grad, mean_grad, saved, layout, sample, token, channel, active, channels, coverage, True
        )
        value_grad = tl.where(active[:, None], value_grad, 0.0)
        store_rows(values_out, sample, token, channel, value_grad, mask, channels)
    # fmt: on


def launch_token_gradients(
    r: Round,
    *,
    keys: View,
    out: tuple[View, View],
    mean_grad: View,
    pooled_grad: View,
    gate: Gate,
    source: Source,
    key_grads: View | None = None,
    weight: Tensor | None = None,
    **constants: bool,
) -> None:
    """Writes `out`, the gradients of keys and values [B, N, C], one and the same where SHARED. key_grads: those of the
    projected keys, weight: Wk; `source` has then been used already."""
    projected = key_grads is not None
    first = isinstance(source, FirstProduct) and not projected
    operand: tuple[Any, ...] = () if projected else source
    tile = r.tile(columns=1 if projected else _columns(source))
    if first:  # the products and the bins together take many registers
        tile = tile.at_most(tokens=32)
    grid = r.batch * triton.cdiv(r.tokens, tile.tokens) * triton.cdiv(r.channels, tile.channels)
    token_gradients[(grid,)](
        keys,
        key_grads or keys,
        *out,
        r.labels,
        r.saved,
        r.layout,
        operand,
        mean_grad,
        pooled_grad,
        gate.alpha if weight is None else weight,
        gate,
        r.coverage,
        r.tokens,
        r.channels,
        SOURCE=OWN_COSINE.value if projected else _kind(source),
        PROJECTED=projected,
        **constants,
        **tile.options("TOKENS", "CHANNELS", "COLUMNS", "INNER", stages=1 if first else 2),
    )
