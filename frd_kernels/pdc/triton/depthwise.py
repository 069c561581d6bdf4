"""The operators of the difference convolution on Triton kernels: `frd_triton::pdc2d_depthwise` and its backward.

Signatures and semantics are those of `csrc/register.cpp`; arguments are checked by the caller. Launches depend on
shapes, dtype and layout alone, so results repeat bit for bit.
"""

# Triton functions take no annotations.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton_ops import INTERPRETED, narrow
from . import gather, rows
from .stencil import WEIGHTS
from .tiles import SUMS, Launch


@triton.jit
def reduce_sums(partial, dw, db, parts, channels, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """dw_ck = sum_parts partial_kc and db_c = sum_parts partial_9c, in a fixed order.

    partial [parts, 10, C] -> dw [C, 9], db [C]. Grid: (blocks of COLUMNS of the 10 C sums,).
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < channels * SUMS
    total = tl.zeros((PARTS, COLUMNS), partial.dtype.element_ty)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        at = partial + part.to(tl.int64) * (channels * SUMS) + column[None, :]
        total += tl.load(at, mask=(part < parts) & mask[None, :], other=0.0)
    value = narrow(tl.sum(total, axis=0), dw.dtype.element_ty)
    k = column // channels
    channel = column % channels
    tl.store(dw + (channel * WEIGHTS + k), value, mask=mask & (k < WEIGHTS))
    tl.store(db + channel, value, mask=mask & (k == WEIGHTS))


def _launch_reduce(partial: torch.Tensor, dw: torch.Tensor, db: torch.Tensor) -> None:
    """Writes dw and db."""
    parts, _, channels = partial.shape
    columns = 2048 if INTERPRETED.value else 32
    reduce_sums[(triton.cdiv(SUMS.value * channels, columns),)](
        partial,
        dw,
        db,
        parts,
        channels,
        PARTS=min(32, triton.next_power_of_2(parts)),
        COLUMNS=columns,
        num_warps=4,
    )


def pdc2d_depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: int,
    theta: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """x [B, C, H, W], weight [C, 1, 3, 3], bias [C] -> y [B, C, H', W'], channels_last where x is dense in it."""
    launch = Launch(x, kind, theta, stride, padding, dilation)
    y = launch.empty(x, launch.rows, launch.columns)
    if y.numel() > 0:
        kernels = rows if launch.by_rows else gather
        bias = None if bias is None else bias.contiguous()
        kernels.launch_forward(launch, launch.dense(x), weight.contiguous(), bias, y)
    return y


def pdc2d_depthwise_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    kind: int,
    theta: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_dx: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad [B, C, H', W'] -> dx [B, C, H, W], dw [C, 1, 3, 3], db [C]; [0] for what is not needed."""
    launch = Launch(x, kind, theta, stride, padding, dilation)
    dx = launch.empty(x, launch.height, launch.width) if need_dx else x.new_empty(0)
    dw = weight.new_zeros((launch.channels, 1, 3, 3) if need_dw else 0)
    db = weight.new_zeros(launch.channels if need_dw else 0)
    if grad.numel() == 0 or not (need_dx or need_dw):
        return dx, dw, db
    kernels = rows if launch.by_rows and launch.pad == [1, 1] else gather
    operands = launch.dense(grad), launch.dense(x), weight.contiguous(), dx
    partial = kernels.launch_backward(launch, *operands, need_dx, need_dw)
    if need_dw:
        _launch_reduce(partial, dw, db)
    return dx, dw, db
