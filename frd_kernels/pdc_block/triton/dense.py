"""The dense PDC block as one Triton kernel, forward only: `frd_triton::pdc_block_dense`.

An implicit matrix product over the taps of the equivalent plain kernel, whose result is multiplied by the 1x1 weight
while it is in registers.
"""

# Triton functions take no annotations.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, matmul_add, narrow, on_device, widen
from ...pdc.kinds import Kind
from ...pdc.taps import Offset, pairs
from ...pdc.triton.tiles import Launch
from .hidden import SMALL_IMAGE, dot_precision, relu, shared_memory

OptionalTensor = torch.Tensor | None

_WIDTHS = (64, 128, 256)


def can_run_dense(x: torch.Tensor, pdc_weight: torch.Tensor, point_weight: torch.Tensor) -> str | None:
    """None where `pdc_block_dense` computes conv1x1(relu(pdc2d(x))), else why it does not.

    x [B, C, H, W]; pdc_weight [Ch, C, 3, 3] or its plain kernel; point_weight [Co, Ch, 1, 1].
    """
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x must be float32, float16 or bfloat16 for the dense Triton block, got {x.dtype}"
    if pdc_weight.shape[1] != x.shape[1]:
        return f"groups must be 1 for the dense Triton block, got {x.shape[1] // pdc_weight.shape[1]}"
    widths = {
        "in_channels": x.shape[1],
        "hidden channels": pdc_weight.shape[0],
        "out_channels": point_weight.shape[0],
    }
    for name, width in widths.items():
        if width not in _WIDTHS:
            return f"{name} must be 64, 128 or 256 for the dense Triton block, got {width}"
    return None


def dense_taps(kind: int, theta: float) -> list[Offset]:
    """The taps of the equivalent plain kernel that are not zero whatever the weights, row by row."""
    taps = set()
    for _, plus, minus in pairs(Kind(kind)):
        if theta == 1.0 and plus == minus:
            continue
        taps.add(plus)
        if minus is not None and theta != 0.0:
            taps.add(minus)
    return sorted(taps)


class Images(NamedTuple):
    """[B, C, H, W]: the first element, strides of an image, of a channel, of a row, of a pixel."""

    start: Any
    image: int
    channel: int
    row: int
    pixel: int


class Taps(NamedTuple):
    """Of the plain kernel: their number, their rows and columns from its centre as `_packed`."""

    number: int
    rows: int
    columns: int


def _images_of(t: torch.Tensor) -> Images:
    """t [B, C, H, W], contiguous or channels_last"""
    _, channels, height, width = t.shape
    if t.is_contiguous():
        return Images(t, channels * height * width, height * width, width, 1)
    return Images(t, channels * height * width, 1, width * channels, channels)


def _packed(steps: list[int]) -> int:
    """Steps of -2 to 2 as a table in one register, three bits each."""
    return sum((step + 2) << (3 * i) for i, step in enumerate(steps))


@triton.jit
def _hidden(
    x,
    image,
    plain,
    pdc_bias,
    pixel,
    mask,
    geometry,
    channel,
    steps,
    TAPS: tl.constexpr,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """relu(conv2d(x, plain) + pdc_bias) [pixel, channel] of an image, in the dtype of x."""
    tap_rows = tl.full((), TAPS.rows, tl.int64)
    tap_columns = tl.full((), TAPS.columns, tl.int64)
    row = pixel // geometry.columns * geometry.stride_y
    column = pixel % geometry.columns * geometry.stride_x
    start = x.start + image * x.image
    acc = tl.zeros((pixel.shape[0], channel.shape[0]), tl.float32)
    for step in range(steps):
        # Taps in the inner loop, channels in the outer one: the slab of x stays in the cache.
        tap = step % TAPS.number
        source = step // TAPS.number * BLOCK_K + tl.arange(0, BLOCK_K)
        at_row = row + (((tap_rows >> (3 * tap)) & 7) - 2).to(tl.int32) * geometry.dilation_y
        at_column = column + (((tap_columns >> (3 * tap)) & 7) - 2).to(tl.int32) * geometry.dilation_x
        inside = mask & (at_row >= 0) & (at_row < geometry.height)
        inside = inside & (at_column >= 0) & (at_column < geometry.width)
        at = start + (at_row * x.row + at_column * x.pixel)[:, None] + (source * x.channel)[None, :]
        a = tl.load(at, mask=inside[:, None], other=0.0)
        b = tl.load(plain + ((tap * C + source) * HIDDEN)[:, None] + channel[None, :])
        acc = matmul_add(a, b, acc, PRECISION)
    if HAS_BIAS:
        acc += widen(tl.load(pdc_bias + channel))[None, :]
    return narrow(relu(acc), x.start.dtype.element_ty)


@triton.jit
def _store(
    out,
    image,
    residual,
    point_bias,
    result,
    pixel,
    mask,
    channel,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """out = result [pixel, channel] + point_bias + residual."""
    if HAS_BIAS:
        result += widen(tl.load(point_bias + channel))[None, :]
    to = (pixel * out.pixel)[:, None] + (channel * out.channel)[None, :]
    if HAS_RESIDUAL:
        result += widen(tl.load(residual + image * out.image + to, mask=mask[:, None], other=0.0))
    start = out.start + image * out.image
    tl.store(start + to, narrow(result, out.start.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _dense_kernel(
    x,  # `Images` [B, C, H, W]
    plain,  # [taps, C, HIDDEN]
    pdc_bias,  # [HIDDEN]
    point,  # [OUT, HIDDEN]
    point_bias,  # [OUT]
    residual,  # in memory as out
    out,  # `Images` [B, OUT, Ho, Wo]
    geometry,
    tiles,  # of an image
    steps,  # taps * C / BLOCK_K
    TAPS: tl.constexpr,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    HAS_PDC_BIAS: tl.constexpr,
    HAS_POINT_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = point relu(conv2d(x, plain) + pdc_bias) + point_bias + residual. Grid: (images * tiles,)."""
    tile = tl.program_id(0)
    image = (tile // tiles).to(tl.int64)
    pixel = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = pixel < geometry.rows * geometry.columns
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # fmt: off
    for first in range(0, HIDDEN, BLOCK_H):
        slab = first + tl.arange(0, BLOCK_H)
        hidden = _hidden(
            x, image, plain, pdc_bias, pixel, mask, geometry, slab, steps, TAPS, C, HIDDEN, HAS_PDC_BIAS, BLOCK_K,
            PRECISION,
        )
        if BLOCK_H == HIDDEN:
            for begin in range(0, OUT, BLOCK_N):
                channel = begin + tl.arange(0, BLOCK_N)
                weight = tl.load(point + slab[:, None] + (channel * HIDDEN)[None, :])
                part = matmul_add(hidden, weight, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
                _store(
                    out, image, residual, point_bias, part, pixel, mask, channel, HAS_POINT_BIAS, HAS_RESIDUAL
                )
        else:
            channel = tl.arange(0, BLOCK_N)
            weight = tl.load(point + slab[:, None] + (channel * HIDDEN)[None, :])
            result = matmul_add(hidden, weight, result, PRECISION)
    if BLOCK_H != HIDDEN:
        channel = tl.arange(0, BLOCK_N)
        _store(out, image, residual, point_bias, result, pixel, mask, channel, HAS_POINT_BIAS, HAS_RESIDUAL)
    # fmt: on


def pdc_block_dense(
    x: torch.Tensor,
    plain: torch.Tensor,
    pdc_bias: OptionalTensor,
    point_weight: torch.Tensor,
    point_bias: OptionalTensor,
    residual: OptionalTensor,
    kind: int,
    theta: float,
    stride: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """conv1x1(relu(conv2d(x, plain) + pdc_bias)) + point_bias + residual, with padding = dilation.

    The hidden values are rounded to the dtype of x before the 1x1 convolution, as in eager PyTorch; the sums of both
    products are in float32.

    Args:
        x: [B, C, H, W]. plain: [Ch, C, s, s], the equivalent plain kernel in the dtype of x, s = 5 for radial,
            else 3. point_weight: [Co, Ch, 1, 1]. pdc_bias: [Ch]. point_bias: [Co]. residual: [B, Co, Ho, Wo].
        kind, theta: say which taps of `plain` are zero.

    Returns:
        [B, Co, Ho, Wo], channels_last where x is dense in it and not contiguous, else contiguous.

    Raises:
        NotImplementedError: what `can_run_dense` says.
    """
    reason = can_run_dense(x, plain, point_weight)
    if reason is not None:
        raise NotImplementedError(f"pdc_block_dense: {reason}")
    launch = Launch(x, kind, theta, stride, dilation, dilation)
    channels, hidden, filters = launch.channels, plain.shape[0], point_weight.shape[0]
    pixels = launch.rows * launch.columns
    size = (launch.batch, filters, launch.rows, launch.columns)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=launch.layout)
    if out.numel() == 0:
        return out
    taps = dense_taps(kind, theta)
    reach = plain.shape[-1] // 2
    block_m, block_k, block_h, block_n, warps, stages = _tiles(x, pixels, hidden, filters)
    tiles = triton.cdiv(pixels, block_m)
    with on_device(x):
        _dense_kernel[(launch.batch * tiles,)](
            _images_of(launch.dense(x)),
            torch.stack([plain[:, :, dy + reach, dx + reach].t() for dy, dx in taps]),
            out if pdc_bias is None else pdc_bias.contiguous(),
            point_weight.contiguous(),
            out if point_bias is None else point_bias.contiguous(),
            out if residual is None else launch.dense(residual),
            _images_of(out),
            launch.geometry,
            tiles,
            len(taps) * channels // block_k,
            TAPS=Taps(len(taps), _packed([dy for dy, _ in taps]), _packed([dx for _, dx in taps])),
            C=channels,
            HIDDEN=hidden,
            OUT=filters,
            HAS_PDC_BIAS=pdc_bias is not None,
            HAS_POINT_BIAS=point_bias is not None,
            HAS_RESIDUAL=residual is not None,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            BLOCK_H=block_h,
            BLOCK_N=block_n,
            PRECISION=dot_precision(x.dtype),
            num_warps=warps,
            num_stages=stages,
        )
    return out


def _tiles(x: torch.Tensor, pixels: int, hidden: int, filters: int) -> tuple[int, int, int, int, int, int]:
    """(BLOCK_M, BLOCK_K, BLOCK_H, BLOCK_N, warps, stages). The batch changes no sum of a sample: neither its blocks nor
    the instruction (Hopper's wgmma needs 64 rows) depend on it."""
    if INTERPRETED.value:  # whose cost is per program, not per element
        block_m = max(16, min(512, triton.next_power_of_2(pixels)))
        return (
            (block_m, 64, 32, filters, 4, 1) if x.dtype == torch.float32 else (block_m, 64, hidden, 64, 4, 1)
        )
    many = x.shape[0] * pixels > 16384
    if x.dtype == torch.float32:
        # Products of float32 split their operands in two: all hidden channels at once would fill the registers.
        return (32, 32, 32, filters, 8, 2) if many else (16, 32, 32, filters, 4, 2)
    if pixels <= SMALL_IMAGE:
        return 32 if many else 16, 64, hidden, 64, 4, 3
    if shared_memory(x) < 160 * 1024:
        return 64, 32, hidden, 32, 8, 2
    return (128, 64, hidden, 64, 8, 3) if many else (64, 64, hidden, 64, 8, 3)
