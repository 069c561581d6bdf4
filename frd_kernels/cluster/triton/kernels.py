"""The clustering's Triton kernels, each followed by its launcher.

Tokens and rows [B, rows, columns] lie in memory by any strides. Sums are in float32, in an order that does not depend
on the batch. A token of label -1 takes no part: only its label is read. Every program makes a tile of R rows and C
columns of a sample's result, in a loop over `inner` by K.
"""

# Triton functions take no annotations.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, block_of, device_function, narrow, widen
from ..reference import EPS
from .layout import Image, Saved

Tensor = torch.Tensor
Maybe = Tensor | None

_MAX_INV_NORM = 1e12  # a norm up to its inverse counts as zero
# Products of float32 in six of bfloat16: as exact, and on the matrix units of every vendor.
PRECISION = tl.constexpr("ieee" if INTERPRETED.value else "bf16x6")
# Left to its own choice, NVIDIA's assembler spills a value or two to fit one more block of threads.
_OPTIONS = {} if torch.version.hip else {"maxnreg": 255}


class View(NamedTuple):
    """[B, rows, columns] as a kernel takes it, where the tensor is a pointer; [B, rows] for one number a row."""

    start: Any
    sample: int  # strides
    row: int
    column: int


def _view(t: Maybe) -> View | None:
    if t is not None and t.dtype == torch.float64:
        raise NotImplementedError("the clustering's Triton kernels compute in float32, got float64")
    return None if t is None else View(t, t.stride(0), t.stride(1), t.stride(2) if t.dim() == 3 else 0)


def _tile(size: int, most: int) -> int:
    """A power of two; all in one in the interpreter, which is slow by program and not by element."""
    return min(1024, max(16, triton.next_power_of_2(size))) if INTERPRETED.value else block_of(size, most)


def _launch(kernel: Any, shape: Sequence[int], inner: int, most: Sequence[int], *inputs: Any) -> None:
    """shape: (samples, rows, columns) of the result. most: the largest R, C and K."""
    samples, rows, columns = shape
    R, C, K = (_tile(size, limit) for size, limit in zip((rows, columns, inner), most, strict=True))
    programs = samples * triton.cdiv(rows, R) * triton.cdiv(columns, C)
    if programs > 0:
        kernel[(programs,)](*inputs, rows, columns, inner, R=R, C=C, K=K, **_OPTIONS)


@device_function
def _place(rows, columns, R: tl.constexpr, C: tl.constexpr):
    """(sample, rows [R], columns [C]) of this program's tile."""
    across = tl.cdiv(columns, C)
    tiles = tl.cdiv(rows, R) * across
    row = tl.program_id(0) % tiles // across * R + tl.arange(0, R)
    return tl.program_id(0) // tiles, row, tl.program_id(0) % across * C + tl.arange(0, C)


@device_function
def _tile_at(view, sample, row, active, column, columns):
    """Pointers to a tile of a sample, and which exist."""
    start = view.start + tl.cast(sample, tl.int64) * view.sample
    at = start + row.to(tl.int64)[:, None] * view.row + column.to(tl.int64)[None, :] * view.column
    return at, active[:, None] & (column < columns)[None, :]


@device_function
def _load(view, sample, row, active, column, columns):
    """A tile as stored; 0 in rows that are not `active` and beyond the columns."""
    at, inside = _tile_at(view, sample, row, active, column, columns)
    return tl.load(at, mask=inside, other=0)


@device_function
def _store(view, sample, row, active, column, columns, value):
    at, inside = _tile_at(view, sample, row, active, column, columns)
    tl.store(at, narrow(value, view.start.dtype.element_ty), mask=inside)


@device_function
def _load_number(view, sample, row, active):
    """One number a row; 0 where not `active`."""
    start = view.start + tl.cast(sample, tl.int64) * view.sample
    return tl.load(start + tl.cast(row, tl.int64) * view.row, mask=active, other=0)


@device_function
def _store_number(view, sample, row, active, value):
    start = view.start + tl.cast(sample, tl.int64) * view.sample
    tl.store(start + tl.cast(row, tl.int64) * view.row, value, mask=active)


@device_function
def _load_label(labels, sample, token, tokens):
    """(labels, whether the token exists and takes part)."""
    label = _load_number(labels, sample, token, token < tokens)
    return label, (token < tokens) & (label >= 0)


@device_function
def _multiply(a, b, acc):
    """acc [M, N] + a [M, K] b [K, N]"""
    if INTERPRETED or a.dtype != b.dtype:
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@device_function
def _select(chosen, rows, acc, PARTS: tl.constexpr):
    """acc [M, C] + for each of M the sum of its `chosen` [M, K] rows [K, C], taken to PARTS bfloat16."""
    if INTERPRETED:
        acc = _multiply(chosen.to(tl.float32), rows, acc)
    else:
        for _ in tl.static_range(PARTS):
            part = rows.to(tl.bfloat16)
            acc = tl.dot(chosen.to(tl.bfloat16), part, acc)
            rows -= part.to(tl.float32)
    return acc


@device_function
def _add_chosen(acc, chosen, rows):
    """`_select`, but what is not finite stays with those that chose it: a product makes NaN of 0 * inf."""
    if tl.max(tl.max(chosen.to(tl.int32), axis=1), axis=0) > 0:
        lost = (rows - rows) != 0
        acc = _select(chosen, tl.where(lost, 0.0, rows), acc, 3)
        if tl.max(tl.max(lost.to(tl.int32), axis=1), axis=0) > 0:
            zeros = tl.zeros(acc.shape, tl.float32)
            up = _select(chosen, tl.where(lost, tl.where(rows < 0, 0.0, 1.0), 0.0), zeros, 1)  # inf or NaN
            down = _select(chosen, tl.where(lost, tl.where(rows > 0, 0.0, 1.0), 0.0), zeros, 1)
            acc += tl.where(up > 0, float("inf"), 0.0) - tl.where(down > 0, float("inf"), 0.0)
    return acc


@device_function
def _in_bin(centre, token, image):
    """Whether the token lies in the centre's bin of `adaptive_avg_pool2d`, for centres [O, 1] and tokens [1, N], or
    [1, O] and [N, 1]."""
    row = tl.cast(centre // image.columns, tl.int64)
    column = tl.cast(centre % image.columns, tl.int64)
    y = token // image.width
    x = token % image.width
    below = (y >= row * image.height // image.rows) & (row < image.rows)
    above = y < ((row + 1) * image.height + image.rows - 1) // image.rows
    right = x >= column * image.width // image.columns
    return below & above & right & (x < ((column + 1) * image.width + image.columns - 1) // image.columns)


@triton.jit
def _product(
    a, b, bias, out, samples, summed, rows, columns, inner, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr
):
    """out_i = bias + the sum over `summed` samples s of a_s [rows, inner] b_s [inner, columns]"""
    part, row, column = _place(rows, columns, R, C)
    acc = tl.zeros((R, C), tl.float32)
    for sample in range(part * summed, tl.minimum((part + 1) * summed, samples)):
        for first in range(0, inner, K):
            k = first + tl.arange(0, K)
            left = _load(a, sample, row, row < rows, k, inner)
            acc = _multiply(left, _load(b, sample, k, k < inner, column, columns), acc)
    if bias is not None:
        acc += widen(tl.load(bias + column, mask=column < columns, other=0))[None, :]
    _store(out, part, row, row < rows, column, columns, acc)


def product(a: Tensor, b: Tensor, bias: Maybe = None, out: Maybe = None, summed: int = 1) -> Tensor:
    """a [B, M, K] b [B, K, N] + bias [N], summed over every `summed` samples: `out`, else float32. A matrix serves all
    samples."""
    a = a if a.dim() == 3 else a[None]
    b, parts = b.expand(len(a), -1, -1), -(-len(a) // summed)
    if out is None:
        out = a.new_empty((parts, a.shape[1], b.shape[2]), dtype=torch.float32)
    inputs = _view(a), _view(b), bias, _view(out), len(a), summed
    _launch(_product, (parts, a.shape[1], b.shape[2]), a.shape[2], (64, 32, 16), *inputs)
    return out


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """[M, N], the sum over the batch of a [B, M, K] b [B, K, N], in at most 32 parts."""
    return product(a, b, summed=max(1, -(-len(a) // 32))).sum(0)


@triton.jit
def _assign(
    keys, key_scale, pooled, pooled_scale, sign, labels, cosine, matrix, centres, BLOCK: tl.constexpr,
    rows, columns, inner, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """matrix_no = cosine of key_n and pooled_o; label_n = argmax_o sign * matrix_no, the first of equals, a NaN is the
    largest; cosine_n = its entry of the matrix. key_scale, pooled_scale: inverse norms."""
    sample, token, _ = _place(rows, columns, R, C)
    _, active = _load_label(labels, sample, token, rows)
    scale = _load_number(key_scale, sample, token, active)
    best = tl.full((R,), float("-inf"), tl.float32)
    label = tl.zeros((R,), tl.int32)
    own = tl.zeros((R,), tl.float32)
    for begin in range(0, centres, BLOCK):
        centre = begin + tl.arange(0, BLOCK)
        centre_scale = _load_number(pooled_scale, sample, centre, centre < centres)
        value = tl.zeros((R, BLOCK), tl.float32)
        for first in range(0, inner, K):
            channel = first + tl.arange(0, K)
            # Each factor by its own norm: products of what is not normalised may leave float32's range.
            key = widen(_load(keys, sample, token, active, channel, inner)) * scale[:, None]
            unit = _load(pooled, sample, centre, centre < centres, channel, inner) * centre_scale[:, None]
            value = _multiply(key, tl.trans(unit), value)
        if matrix is not None:
            _store(matrix, sample, token, active, centre, centres, value)
        score = value
        if sign is not None:
            score = tl.load(sign) * value
        score = tl.where(score == score, score, float("inf"))
        score = tl.where((centre < centres)[None, :], score, float("-inf"))
        top = tl.max(score, axis=1)
        at = tl.min(tl.where(score == top[:, None], centre[None, :], centres), axis=1)
        chosen = tl.sum(tl.where(centre[None, :] == at[:, None], value, 0.0), axis=1)
        better = top > best
        label = tl.where(better, at, label)
        own = tl.where(better, chosen, own)
        best = tl.where(better, top, best)
    _store_number(labels, sample, token, active, label)
    _store_number(cosine, sample, token, token < rows, tl.where(active, own, 0.0))


def assign(keys: Tensor, labels: Tensor, saved: Saved, sign: Maybe) -> None:
    """keys [B, N, C] and the bin means and norms in `saved` -> labels [B, N], where they are not -1, and the cosines in
    `saved`. sign: [1]."""
    centres = saved.pooled.shape[1]
    views = map(_view, (keys, saved.inv_norm, saved.pooled, saved.pooled_inv_norm))
    results = map(_view, (labels, saved.cosine, saved.matrix if saved.matrix.shape[2] else None))
    inputs = *views, sign, *results, centres, _tile(centres, 32)
    _launch(_assign, (*keys.shape[:2], 1), keys.shape[2], (32, 16, 32), *inputs)


@triton.jit
def _sums(
    rows_view, labels, weights, out, weight_sum, inv_bin_count, counts, image, POOLED: tl.constexpr,
    MEMBERS: tl.constexpr, rows, columns, inner, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """POOLED: out_o = mean of the rows in bin o. MEMBERS: out_o = sum of weight_n row_n over the tokens of label o.
    Both: (mean + sum) / (1 + sum of the weights)."""
    sample, centre, channel = _place(rows, columns, R, C)
    pooled = tl.zeros((R, C), tl.float32)
    total = tl.zeros((R, C), tl.float32)
    size = tl.zeros((R,), tl.float32)
    weight_total = tl.full((R,), 1.0, tl.float32)
    count = tl.zeros((R,), tl.int32)
    for first in range(0, inner, K):
        token = first + tl.arange(0, K)
        label, active = _load_label(labels, sample, token, inner)
        row = widen(_load(rows_view, sample, token, active, channel, columns))
        if POOLED:
            inside = _in_bin(centre[:, None], token[None, :], image) & active[None, :]
            size += tl.sum(inside.to(tl.float32), axis=1)
            pooled = _add_chosen(pooled, inside, row)
        if MEMBERS:
            own = (label[None, :] == centre[:, None]) & active[None, :]
            weight = tl.full((K,), 1.0, tl.float32)
            if weights is not None:
                weight = _load_number(weights, sample, token, active)
            weight_total += tl.sum(tl.where(own, weight[None, :], 0.0), axis=1)
            count += tl.sum(own.to(tl.int32), axis=1)
            total = _add_chosen(total, own, row * weight[:, None])
    if POOLED:
        total += pooled / tl.maximum(size, 1.0)[:, None]
    if POOLED and MEMBERS:
        total = total / weight_total[:, None]
        stores = (centre < rows) & (tl.program_id(0) % tl.cdiv(columns, C) == 0)
        _store_number(weight_sum, sample, centre, stores, weight_total)
        _store_number(inv_bin_count, sample, centre, stores, 1.0 / tl.maximum(size, 1.0))
        if counts is not None:
            _store_number(counts, sample, centre, stores, count)
    _store(out, sample, centre, centre < rows, channel, columns, total)


def sums(
    rows: Tensor, labels: Tensor, weights: Maybe, out: Tensor, image: Image | None = None,
    saved: Saved | None = None, counts: Maybe = None,
) -> Tensor:  # fmt: skip
    """rows [B, N, C], labels and weights [B, N] -> out [B, O, C], which is returned: sums by label, with an image bin
    means, with `saved` both as a round's centres, whose inv_bin_count and weight_sum it writes, and counts [B, O]."""
    kept = (None, None) if saved is None else (saved.weight_sum, saved.inv_bin_count)
    inputs = *map(_view, (rows, labels, weights, out, *kept, counts)), image or Image(1, 1, 1, 1)
    parts = image is not None, image is None or saved is not None
    _launch(_sums, out.shape, rows.shape[1], (32, 32, 16), *inputs, *parts)
    return out


@triton.jit
def _spread(
    centres, labels, weights, binned, base, out, image,
    rows, columns, inner, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out_n = base_n + weight_n centre_(label n) + the sum of binned_o over the bins o that hold n; what is None is
    left out"""
    sample, token, channel = _place(rows, columns, R, C)
    label, active = _load_label(labels, sample, token, rows)
    total = tl.zeros((R, C), tl.float32)
    if binned is not None:
        for first in range(0, inner, K):
            centre = first + tl.arange(0, K)
            row = _load(binned, sample, centre, centre < inner, channel, columns)
            inside = _in_bin(centre[None, :], token[:, None], image) & active[:, None]
            total = _add_chosen(total, inside, row)
    if centres is not None:
        row = widen(_load(centres, sample, label, active, channel, columns))
        if weights is not None:
            row *= _load_number(weights, sample, token, active)[:, None]
        total += row
    if base is not None:
        total += _load(base, sample, token, active, channel, columns)
    _store(out, sample, token, token < rows, channel, columns, total)


def spread(
    out: Tensor, labels: Tensor, centres: Maybe = None, weights: Maybe = None, binned: Maybe = None,
    image: Image | None = None, base: Maybe = None,
) -> Tensor:  # fmt: skip
    """centres and binned [B, O, C], labels and weights [B, N], base [B, N, C] -> out [B, N, C], which is returned."""
    inputs = *map(_view, (centres, labels, weights, binned, base, out)), image or Image(1, 1, 1, 1)
    inner = 1 if binned is None else binned.shape[1]
    _launch(_spread, out.shape, inner, (32, 32, 32), *inputs)
    return out


@triton.jit
def _dots(
    rows_view, centres, shift, labels, out,
    rows, columns, inner, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out_n = (row_n - shift_l) . centre_l for l = label_n, 0 without a label; without labels l = n"""
    sample, token, _ = _place(rows, columns, R, C)
    label, active = token, token < rows
    if labels is not None:
        label, active = _load_label(labels, sample, token, rows)
    total = tl.zeros((R,), tl.float32)
    for first in range(0, inner, K):
        channel = first + tl.arange(0, K)
        row = widen(_load(rows_view, sample, token, active, channel, inner))
        if shift is not None:
            row -= _load(shift, sample, label, active, channel, inner)
        total += tl.sum(row * widen(_load(centres, sample, label, active, channel, inner)), axis=1)
    _store_number(out, sample, token, token < rows, total)


def dots(rows: Tensor, centres: Tensor, labels: Maybe = None, shift: Maybe = None) -> Tensor:
    """rows [B, N, C], centres and shift [B, O, C], labels [B, N] -> [B, N] float32"""
    out = rows.new_empty(rows.shape[:2], dtype=torch.float32)
    inputs = map(_view, (rows, centres, shift, labels, out))
    _launch(_dots, (*rows.shape[:2], 1), rows.shape[2], (16, 16, 64), *inputs)
    return out


def inv_norms(rows: Tensor, out: Tensor) -> None:
    """1 / max(|row|, 1e-12) of rows [B, N, C] -> out [B, N]; 0 where the norm overflows."""
    norms = dots(rows, rows).sqrt_()
    out.copy_(torch.where(norms <= EPS, _MAX_INV_NORM, 1 / norms))


def unit_grads(rows: Tensor, inv_norm: Tensor, grads: Tensor, along: Maybe = None) -> Tensor:
    """Of rows [B, N, C], from those of row / |row|: (grad - unit (unit . grad)) / |row|, 0 where a norm counts as zero.
    along: unit . grad [B, N], where it is known."""
    if along is None:
        along = dots(grads * inv_norm.unsqueeze(2), rows)
    along, scale = (inv_norm * along).unsqueeze(2), inv_norm.unsqueeze(2)
    return torch.where(scale == _MAX_INV_NORM, 0, (grads - rows * along) * scale)
