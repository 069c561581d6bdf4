"""What the tests of the difference convolution and of its block have in common: eager forms, inputs, error bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import frd_kernels as fk

KINDS = ["vanilla", "central", "angular", "radial"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Depthwise: batch, channels, height, width, options. Widths around the vectors of 4, 8 and 16 lanes, channels
# that fill no vector, whole ones and a rest, images that are cut into strips.
DEPTHWISE: list[tuple[int, int, int, int, dict[str, Any]]] = [
    (1, 1, 1, 1, {"padding": 1}),
    (2, 3, 1, 7, {"padding": "same"}),
    (1, 8, 2, 3, {"padding": "same", "dilation": 2}),
    (2, 17, 17, 31, {"padding": 1}),
    (1, 17, 17, 31, {"padding": 2, "stride": 2, "dilation": 2}),
    (1, 64, 5, 6, {"padding": 1, "stride": (2, 1)}),
    (2, 2, 4, 8, {"padding": 1}),
    (1, 5, 3, 15, {}),
    (1, 3, 9, 16, {"padding": 2}),
    (1, 1, 8, 17, {"padding": (0, 1), "dilation": (3, 1)}),
    (2, 16, 9, 9, {"dilation": 3}),
    (1, 8, 3, 33, {"padding": 1, "stride": 2}),
    (1, 4, 2, 2, {"padding": 1, "stride": 3}),
    (1, 33, 4, 5, {"padding": (4, 3), "dilation": (1, 2)}),
    (1, 3, 7, 9, {"padding": 5, "stride": (1, 2)}),
    (1, 3, 40, 200, {"padding": 1}),
    (1, 1, 30, 300, {"padding": 3, "stride": (2, 3), "dilation": 3}),
    (2, 3, 9, 8, {"padding": 4, "dilation": (3, 1)}),
    (1, 33, 7, 7, {"stride": (1, 3)}),
]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    kind: str,
    theta: float = 1.0,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> torch.Tensor:
    """The layer the way PiDiNet computes it, every step rounded to the dtype of x."""
    if kind == "radial":
        wide = weight.new_zeros(*weight.shape[:2], 25)
        wide[..., [0, 2, 4, 10, 14, 20, 22, 24]] = weight.flatten(2)[..., 1:]
        wide[..., [6, 7, 8, 11, 13, 16, 17, 18]] = -theta * weight.flatten(2)[..., 1:]
        wide[..., 12] = (1 - theta) * weight[..., 0, 0]
        weight, padding = wide.unflatten(-1, (5, 5)), padding + dilation
    elif kind == "angular":
        weight = weight - theta * weight.flatten(2)[..., [3, 0, 1, 6, 4, 2, 7, 8, 5]].view_as(weight)
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if kind == "central":
        centres = F.pad(x, [padding - dilation] * 4)
        out = out - theta * F.conv2d(centres, weight.sum((2, 3), keepdim=True), None, stride, 0, 1, groups)
    return out


def eager_block(
    x: torch.Tensor,
    pdc_weight: torch.Tensor,
    point_weight: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    pdc_bias: torch.Tensor | None = None,
    point_bias: torch.Tensor | None = None,
    dilation: int = 1,
    **options: Any,
) -> torch.Tensor:
    """`fk.pdc_block` out of eager convolutions, every step rounded to the dtype of x."""
    groups = x.shape[1] // pdc_weight.shape[1]
    hidden = eager(x, pdc_weight, pdc_bias, padding=dilation, dilation=dilation, groups=groups, **options)
    out = F.conv2d(F.relu(hidden), point_weight, point_bias)
    return out if residual is None else out + residual


def doubles(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The same values in float64, as leaves that learn if the originals do."""
    return tuple(None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors)


def block_operands(
    batch: int,
    channels: int,
    filters: int,
    height: int,
    width: int,
    *,
    groups: int | None = None,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    layout: str = "nchw",
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """Every tensor argument of `fk.pdc_block`, depthwise unless `groups` says otherwise."""
    steps = stride if isinstance(stride, tuple) else (stride, stride)
    size = [(extent - 1) // step + 1 for extent, step in zip((height, width), steps, strict=True)]
    shapes = {
        "x": (batch, channels, height, width),
        "pdc_weight": (channels, channels // (groups or channels), 3, 3),
        "point_weight": (filters, channels, 1, 1),
        "pdc_bias": (channels,),
        "point_bias": (filters,),
        "residual": (batch, filters, *size),
    }
    operands = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    operands["point_weight"] /= channels**0.5
    for name in ("x", "residual"):
        operands[name] = operands[name].contiguous(memory_format=LAYOUTS[layout])
    return {name: operand.to(dtype) for name, operand in operands.items()}


def off_the_kink(
    draw: Callable[[], dict[str, torch.Tensor]], *, kind: str, **options: Any
) -> dict[str, torch.Tensor]:
    """Operands of the block of which no hidden value is so near 0 that a rounding opens or closes its ReLU."""
    dilation = options.get("dilation", 1)
    while True:
        operands = draw()
        x, weight, bias = doubles(operands["x"], operands["pdc_weight"], operands.get("pdc_bias"))
        groups = x.shape[1] // weight.shape[1]
        hidden = fk.reference.pdc2d(x, weight, bias, kind=kind, padding=dilation, groups=groups, **options)
        if (hidden.abs() > 1e-5).all():
            return operands


def in_double(operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(operands, doubles(*operands.values()), strict=True))


def worst(out: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of `out` against a float64 result."""
    assert out.shape == exact.shape
    return (out.double() - exact).abs().max().item()


def magnitude(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """An upper bound of the sum of the absolute terms of an output of the difference convolution."""
    taps = weight.detach().double().abs().flatten(1).sum(1).max() * 2 * x.detach().double().abs().max()
    return taps.item() + (0.0 if bias is None else bias.detach().double().abs().max().item())


def assert_rounded_once(
    out: torch.Tensor, exact: torch.Tensor, scale: float, operands: torch.Tensor | float = 0.0
) -> None:
    """Each element is off by one rounding to its dtype, plus what the accumulation of terms that add up to
    `scale` may lose in float32 (float64 for float64). Where the terms of a last sum were rounded to the dtype
    as well, `operands` is what they add up to without their signs."""
    assert out.shape == exact.shape
    kind = torch.finfo(out.dtype)
    accumulation = 4 * scale * (kind.eps if kind.bits == 64 else torch.finfo(torch.float32).eps)
    allowed = kind.eps / 2 * (exact.abs() + 1.01 * operands) + accumulation
    allowed = allowed + kind.smallest_normal * kind.eps / 2
    error = (out.double() - exact).abs()
    assert (error <= allowed).all(), f"off by {(error - allowed).max().item():.3g} more than one rounding"


def assert_layout(out: torch.Tensor, layout: str) -> None:
    """`out` is dense in the named layout, to the last stride."""
    expected = torch.empty(out.shape, memory_format=LAYOUTS[layout])
    assert out.stride() == expected.stride()


def message_of(value: Any) -> str:
    """The id of a case is its message."""
    return value if isinstance(value, str) else ""


def raises(error: type[Exception], message: str) -> Any:
    """The exact type, and one line that holds `message`."""
    return pytest.raises(
        error, match=rf"^[^\n]*{re.escape(message)}[^\n]*$", check=lambda e: type(e) is error
    )


def compiled_agrees(
    f: Callable[[torch.Tensor], torch.Tensor],
    inputs: list[torch.Tensor],
    parameters: list[torch.Tensor],
    backend: str,
) -> None:
    """One graph without a break serves all inputs, whatever their sizes, and gives what `f` gives, backward
    as well."""
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in inputs:
            x = x.detach().requires_grad_()
            out, expected = compiled(x), f(x)
            assert out.stride() == expected.stride()
            torch.testing.assert_close(out, expected)
            grad = torch.randn_like(out)
            leaves = [x, *parameters]
            torch.testing.assert_close(
                torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
            )
