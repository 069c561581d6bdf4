"""Each token's own centre times its similarity on Triton: `frd_triton::cluster_dispatch` and its backward."""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton_ops import on_device, widen
from ..ops import strided_tokens
from .backward_labels import sum_by_label
from .backward_operands import choose_tile
from .tiles import (
    load_labels,
    load_rows,
    load_vector,
    rows_of,
    store_rows,
    store_vector,
    vector_of,
    view_of,
)

Tensor = torch.Tensor


@triton.jit
def _dispatch(
    centres_view,
    labels,
    similarity,
    out,
    tokens,
    channels,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """out_n = similarity_n * centre of label_n, 0 without a label.

    Grid: (samples * tiles of tokens * blocks of channels,).
    """
    blocks = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(tokens, TOKENS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(0) // blocks % tiles * TOKENS + tl.arange(0, TOKENS)
    sample = tl.program_id(0) // (blocks * tiles)
    label = load_labels(labels, sample, token, token < tokens)
    active = label >= 0
    weight = load_vector(similarity, sample, token, active)
    value = weight[:, None] * widen(load_rows(centres_view, sample, label, channel, active, channels))
    store_rows(out, sample, token, channel, value, token < tokens, channels)


def cluster_dispatch(centres: Tensor, labels: Tensor, similarity: Tensor, channels_first: bool) -> Tensor:
    """centres [B, O, C], labels [B, N], similarity [B, N] -> [B, N, C], its memory [B, C, N] if channels_first."""
    batch, tokens, channels = *labels.shape, centres.shape[2]
    out = strided_tokens(centres, (batch, tokens, channels), channels_first)
    if batch:
        tile = choose_tile(centres.dtype, tokens, centres.shape[1], 1, channels)
        grid = batch * triton.cdiv(tokens, tile.tokens) * triton.cdiv(channels, tile.channels)
        with on_device(centres):
            _dispatch[(grid,)](
                view_of(centres),
                vector_of(labels.contiguous()),
                vector_of(similarity.contiguous()),
                view_of(out),
                tokens,
                channels,
                **tile.options("TOKENS", "CHANNELS"),
            )
    return out


@triton.jit
def _similarity_gradients(
    grad,
    centres_view,
    labels,
    similarity_grad,
    tokens,
    channels,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """similarity_grad_n = grad_n . centre of label_n. Grid: (samples * tiles of tokens,)."""
    tiles = tl.cdiv(tokens, TOKENS)
    sample = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    label = load_labels(labels, sample, token, token < tokens)
    active = label >= 0
    total = tl.zeros((TOKENS,), similarity_grad.start.dtype.element_ty)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        row = widen(load_rows(grad, sample, token, channel, active, channels))
        own = widen(load_rows(centres_view, sample, label, channel, active, channels))
        total += tl.sum(row * own, axis=1)
    store_vector(similarity_grad, sample, token, total, token < tokens)


def cluster_dispatch_backward(
    grad: Tensor, centres: Tensor, labels: Tensor, similarity: Tensor
) -> tuple[Tensor, Tensor]:
    """grad [B, N, C] -> gradients of the centres [B, O, C] and of the similarity [B, N]."""
    batch, tokens, channels = grad.shape
    grad_centres, grad_similarity = centres.new_empty(centres.shape), similarity.new_empty(similarity.shape)
    if not batch:
        return grad_centres, grad_similarity
    own, weight = vector_of(labels.contiguous()), vector_of(similarity.contiguous())
    tile = choose_tile(grad.dtype, tokens, centres.shape[1], 1, channels)
    with on_device(grad):
        _similarity_gradients[(batch * triton.cdiv(tokens, tile.tokens),)](
            view_of(grad),
            view_of(centres),
            own,
            vector_of(grad_similarity),
            tokens,
            channels,
            **tile.options("TOKENS", "CHANNELS"),
        )
        sizes = batch, tokens, centres.shape[1], channels
        sum_by_label(view_of(grad), own, weight, None, rows_of(grad_centres), sizes)
    return grad_centres, grad_similarity
