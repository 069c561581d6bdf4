"""Each token's own centre times its similarity, on Triton kernels: `frd_triton::cluster_dispatch` and its backward."""

# Triton functions take no annotations, and their tuples grow.
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton_ops import narrow, on_device, widen
from .ops import strided_tokens
from .triton_backward_launch import rows_of, sum_by_label, tiles, vector_of, view_of
from .triton_backward_tiles import load_labels, load_rows, load_vector, store_rows, store_vector


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
    """Grid: (items * tiles of tokens * blocks of channels,)."""
    blocks = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(tokens, TOKENS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.program_id(0) // blocks % tiles * TOKENS + tl.arange(0, TOKENS)
    item = tl.program_id(0) // (blocks * tiles)
    label = load_labels(labels, item, token, token < tokens)
    active = label >= 0
    weight = load_vector(similarity, item, token, active)
    value = weight[:, None] * widen(load_rows(centres_view, item, label, channel, active, channels))
    value = narrow(value, out[0].dtype.element_ty)
    store_rows(out, item, token, channel, value, token < tokens, channels)


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
    """Grid: (items * tiles of tokens,)."""
    tiles = tl.cdiv(tokens, TOKENS)
    item = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    label = load_labels(labels, item, token, token < tokens)
    active = label >= 0
    total = tl.zeros((TOKENS,), similarity_grad[0].dtype.element_ty)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        row = widen(load_rows(grad, item, token, channel, active, channels))
        own = widen(load_rows(centres_view, item, label, channel, active, channels))
        total += tl.sum(row * own, axis=1)
    store_vector(similarity_grad, item, token, total, token < tokens)


def cluster_dispatch(
    centres: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor, channels_first: bool
) -> torch.Tensor:
    """centres [B, O, C], labels [B, N], similarity [B, N] -> [B, N, C], its memory [B, C, N] if channels_first."""
    batch, tokens, channels = *labels.shape, centres.shape[2]
    out = strided_tokens(centres, (batch, tokens, channels), channels_first)
    if batch:
        tile = tiles(centres.dtype, tokens, centres.shape[1], 1, channels)
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


def cluster_dispatch_backward(
    grad: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad [B, N, C] -> gradients of the centres [B, O, C] and of the similarity [B, N]."""
    batch, tokens, channels = grad.shape
    grad_centres, grad_similarity = centres.new_empty(centres.shape), similarity.new_empty(similarity.shape)
    if not batch:
        return grad_centres, grad_similarity
    own, weight = vector_of(labels.contiguous()), vector_of(similarity.contiguous())
    tile = tiles(grad.dtype, tokens, centres.shape[1], 1, channels)
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
