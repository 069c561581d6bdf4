"""Triton kernels of a round's backward: gradients of its means, of the keys of its centres, and of its tokens."""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from .._triton_ops import narrow, widen
from .triton_backward_dense import dense_gradient, product_gradient
from .triton_backward_tiles import (
    add_bins,
    add_product,
    live_scale,
    load_labels,
    load_rows,
    load_vector,
    store_rows,
    weight_of,
)
from .triton_tiles import is_live


@triton.jit
def mean_rows(
    result_grad,
    mean_grad,
    mass,
    weight,
    item,
    centre,
    real,
    channels,
    PROJECTED: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """mean_grad [centres, C] = result_grad, or its product with Wv, divided by the mass."""
    compute: tl.constexpr = mean_grad[0].dtype.element_ty
    divisor = load_vector(mass, item, centre, real)
    divisor = tl.where(real, divisor, 1.0)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        if PROJECTED:
            value = tl.zeros((centre.shape[0], CHANNELS), compute)
            value = add_product(
                value, result_grad, item, centre, real, channel, weight, channels, False, INNER
            )
        else:
            value = widen(load_rows(result_grad, item, centre, channel, real, channels))
        store_rows(mean_grad, item, centre, channel, value / divisor[:, None], real, channels)


@triton.jit
def means(
    result_grad,
    mean_grad,
    mass,
    weight,
    channels,
    centres,
    PROJECTED: tl.constexpr,
    CENTRES: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """`mean_rows` of all centres. Grid: (items * blocks of centres,)."""
    blocks = tl.cdiv(centres, CENTRES)
    item = tl.program_id(0) // blocks
    centre = tl.program_id(0) % blocks * CENTRES + tl.arange(0, CENTRES)
    real = centre < centres
    # fmt: off
    mean_rows(
        result_grad, mean_grad, mass, weight, item, centre, real, channels, PROJECTED, CHANNELS, INNER
    )
    # fmt: on


@triton.jit
def centre_rows(
    pulls,
    chunks,
    unit,
    unit_scale,
    mean_grad,
    unit_grad,
    centre_grad,
    pooled_grad,
    weight,
    bias,
    item,
    centre,
    real,
    centres,
    channels,
    LIFT: tl.constexpr,
    SHARED: tl.constexpr,
    PROJECTED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradients of the keys of the pooled tokens and of these, from unit_grad, that of the unit keys.

    LIFT: unit_grad is made first, from the sums of pull * token that centre_grad holds, and from pulls [items,
    chunks, centres]. SHARED: the pooled tokens are values as well.
    """
    compute: tl.constexpr = unit_grad[0].dtype.element_ty
    along = tl.zeros((centre.shape[0],), compute)
    if LIFT:
        chunk = tl.arange(0, CHUNKS)[:, None]
        held = (chunk < chunks) & real[None, :]
        pull = load_vector((pulls, chunks * centres), item, chunk * centres + centre[None, :], held)
        pull = tl.sum(pull, axis=0)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        if LIFT:
            offset = widen(tl.load(bias + channel, mask=channel < channels, other=0.0))
            total = pull[:, None] * offset[None, :]
            total = add_product(
                total, centre_grad, item, centre, real, channel, weight, channels, True, INNER
            )
            store_rows(unit_grad, item, centre, channel, total, real, channels)
        else:
            total = load_rows(unit_grad, item, centre, channel, real, channels)
        along += tl.sum(total * load_rows(unit, item, centre, channel, real, channels), axis=1)
    tl.debug_barrier()
    scale = live_scale(load_vector(unit_scale, item, centre, real))
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        total = load_rows(unit_grad, item, centre, channel, real, channels)
        direction = load_rows(unit, item, centre, channel, real, channels)
        key_grad = (total - direction * along[:, None]) * scale[:, None]
        if PROJECTED:
            store_rows(centre_grad, item, centre, channel, key_grad, real, channels)
        else:
            if SHARED:
                key_grad += load_rows(mean_grad, item, centre, channel, real, channels)
            store_rows(pooled_grad, item, centre, channel, key_grad, real, channels)
    if PROJECTED:
        tl.debug_barrier()
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            value = load_rows(mean_grad, item, centre, channel, real, channels)
            value = add_product(
                value, centre_grad, item, centre, real, channel, weight, channels, False, INNER
            )
            store_rows(pooled_grad, item, centre, channel, value, real, channels)


@triton.jit
def dense_centres(
    result_grad,
    mass,
    value_weight,
    unit,
    unit_scale,
    mean_grad,
    unit_grad,
    centre_grad,
    pooled_grad,
    weight,
    bias,
    channels,
    centres,
    PROJECTED: tl.constexpr,
    CENTRES: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Both of the above for a round whose unit_grad is known. Grid: (items * blocks of centres,)."""
    blocks = tl.cdiv(centres, CENTRES)
    item = tl.program_id(0) // blocks
    centre = tl.program_id(0) % blocks * CENTRES + tl.arange(0, CENTRES)
    real = centre < centres
    # fmt: off
    mean_rows(
        result_grad, mean_grad, mass, value_weight, item, centre, real, channels, PROJECTED, CHANNELS, INNER
    )
    # fmt: on
    tl.debug_barrier()
    centre_rows(
        mass[0],
        0,
        unit,
        unit_scale,
        mean_grad,
        unit_grad,
        centre_grad,
        pooled_grad,
        weight,
        bias,
        item,
        centre,
        real,
        centres,
        channels,
        False,
        True,
        PROJECTED,
        1,
        CHANNELS,
        INNER,
    )


@triton.jit
def key_gradient(
    key,
    keys,
    item,
    token,
    real,
    channel,
    channels,
    label,
    cosine,
    scale,
    own,
    dense,
    DENSE: tl.constexpr,
    SCALED: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradient of the tile `key`, from the own cosine or (DENSE 1: first round, 2: a later one) the product of the
    cosines.

    own: (factor of the pull, unit keys); SCALED: the factor is still to be multiplied by `scale`.
    """
    if DENSE == 0:
        factor, unit = own
        pull = load_vector(factor, item, token, real)
        if SCALED:
            pull *= scale
        pull = tl.where(is_live(scale), pull, 0.0)
        direction = load_rows(unit, item, label, channel, label >= 0, channels)
        grad = pull[:, None] * (direction - cosine[:, None] * (scale[:, None] * key))
    else:
        if DENSE == 1:
            along, grad = dense_gradient(
                dense, keys, item, token, real, channel, channels, scale, COLUMNS, INNER
            )
        else:
            along, grad = product_gradient(dense, item, token, real, channel, channels, COLUMNS)
        grad = live_scale(scale)[:, None] * (grad - along[:, None] * (scale[:, None] * key))
    return grad


@triton.jit
def key_gradients(
    tokens_view,
    out,
    labels,
    cosine,
    scale,
    own,
    dense,
    weight,
    bias,
    tokens,
    channels,
    DENSE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradient of the projected keys [tokens, C]. Grid: (items * tiles of tokens * blocks of channels,)."""
    own, dense = own[:], dense[:]  # made anew, see triton_backward_tiles
    blocks = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(tokens, TOKENS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(0) // blocks % tiles * TOKENS + tl.arange(0, TOKENS)
    item = tl.program_id(0) // (blocks * tiles)
    real = token < tokens
    compute: tl.constexpr = scale[0].dtype.element_ty
    offset = widen(tl.load(bias + channel, mask=channel < channels, other=0.0))
    key = tl.zeros((TOKENS, CHANNELS), compute) + offset[None, :]
    key = add_product(key, tokens_view, item, token, real, channel, weight, channels, True, INNER)
    grad = key_gradient(
        key,
        tokens_view,
        item,
        token,
        real,
        channel,
        channels,
        load_labels(labels, item, token, real),
        load_vector(cosine, item, token, real),
        load_vector(scale, item, token, real),
        own,
        dense,
        DENSE,
        False,
        COLUMNS,
        INNER,
    )
    store_rows(out, item, token, channel, narrow(grad, out[0].dtype.element_ty), real, channels)


@triton.jit
def token_gradients(
    keys,
    key_grads,
    keys_out,
    values_out,
    labels,
    cosine,
    scale,
    own,
    dense,
    mean_grad,
    mass,
    pooled_grad,
    share,
    weight,
    alpha,
    beta,
    geometry,
    tokens,
    channels,
    DENSE: tl.constexpr,
    SHARED: tl.constexpr,
    PROJECTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradients of the tokens. Grid: (items * tiles of tokens * blocks of channels,).

    SHARED: of the tokens that are keys and values; else of keys and values, mean_grad is that of the centres, still to
    be divided by the mass. PROJECTED: key_grads [tokens, C] are those of the projected keys.
    """
    own, dense = own[:], dense[:]  # made anew, see triton_backward_tiles
    blocks = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(tokens, TOKENS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(0) // blocks % tiles * TOKENS + tl.arange(0, TOKENS)
    item = tl.program_id(0) // (blocks * tiles)
    real = token < tokens
    compute: tl.constexpr = scale[0].dtype.element_ty
    label = load_labels(labels, item, token, real)
    active = label >= 0
    cos = load_vector(cosine, item, token, active)
    if PROJECTED:
        grad = tl.zeros((TOKENS, CHANNELS), compute)
        grad = add_product(grad, key_grads, item, token, real, channel, weight, channels, False, INNER)
    else:
        grad = key_gradient(
            widen(load_rows(keys, item, token, channel, active, channels)),
            keys,
            item,
            token,
            active,
            channel,
            channels,
            label,
            cos,
            load_vector(scale, item, token, active),
            own,
            dense,
            DENSE,
            SCALED,
            COLUMNS,
            INNER,
        )
    of_value = widen(load_rows(mean_grad, item, label, channel, active, channels))
    if not SHARED:
        of_value /= tl.where(active, load_vector(mass, item, label, active), 1.0)[:, None]
    of_value *= weight_of(cos, alpha, beta, WEIGHTED)[:, None]
    if SHARED:
        grad += of_value
    grad = add_bins(grad, pooled_grad, share, mass, item, token, channel, active, channels, geometry, False)
    grad = tl.where(active[:, None], grad, 0.0)
    store_rows(keys_out, item, token, channel, narrow(grad, keys_out[0].dtype.element_ty), real, channels)
    if not SHARED:
        of_value = add_bins(
            of_value, mean_grad, share, mass, item, token, channel, active, channels, geometry, True
        )
        of_value = tl.where(active[:, None], of_value, 0.0)
        value = narrow(of_value, values_out[0].dtype.element_ty)
        store_rows(values_out, item, token, channel, value, real, channels)
