"""The operators of the difference convolution inside torch: opcheck, compile, export, autocast, meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

import frd_kernels as fk
from frd_kernels import reference
from frd_kernels.pdc.kinds import Kind

from .cases import KINDS, LAYOUTS, assert_layout, compiled_agrees, eager, worst

OP = "pdc2d"


def image(view: str) -> torch.Tensor:
    """[2, 5, 6, 7]"""
    if view == "slice":
        return torch.randn(2, 7, 8, 9)[:, 1:6, 1:7, 2:]
    return torch.randn(2, 5, 6, 7).contiguous(memory_format=LAYOUTS[view])


@pytest.mark.kernels
@pytest.mark.parametrize("learns", [True, False], ids=["learns", "fixed"])
@pytest.mark.parametrize("view", [*LAYOUTS, "slice"])
@pytest.mark.parametrize(("kind", "bias"), [(Kind.ANGULAR, True), (Kind.RADIAL, False)])
def test_opcheck(ops: Any, kind: Kind, bias: bool, view: str, learns: bool) -> None:
    x, weight = image(view).requires_grad_(learns), torch.randn(5, 1, 3, 3, requires_grad=learns)
    shift = torch.randn(5, requires_grad=learns) if bias else None
    opcheck(ops.pdc2d_depthwise.default, (x, weight, shift, int(kind), 0.7, [2, 1], [1, 2], [1, 2]))


@pytest.mark.kernels
@pytest.mark.parametrize("learns", [True, False], ids=["learns", "fixed"])
@pytest.mark.parametrize(
    ("view", "need_dx", "need_dw"),
    [("nchw", True, True), ("channels_last", True, True), ("slice", True, False), ("nchw", False, True)],
)
def test_opcheck_backward(ops: Any, view: str, need_dx: bool, need_dw: bool, learns: bool) -> None:
    x, weight = image(view).requires_grad_(learns), torch.randn(5, 1, 3, 3, requires_grad=learns)
    grad = torch.randn(2, 5, 3, 7, requires_grad=learns)
    options = (int(Kind.RADIAL), 0.7, [2, 1], [1, 1], [1, 1], need_dx, need_dw)
    opcheck(ops.pdc2d_depthwise_backward.default, (grad, x, weight, *options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [4, 1])
def test_compiled_function(layout: str, groups: int) -> None:
    weight, bias = torch.randn(4, 4 // groups, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)

    def f(x: torch.Tensor) -> torch.Tensor:
        return fk.pdc2d(x, weight, bias, kind="angular", theta=0.7, stride=2, padding=1, groups=groups)

    sizes = [
        torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) for shape in ((2, 4, 6, 7), (3, 4, 9, 8))
    ]
    compiled_agrees(f, sizes, [weight, bias], backend="aot_eager")


@pytest.mark.parametrize(
    "options",
    [{"kind": "radial", "groups": 2, "padding_mode": "reflect"}, {"kind": "central", "padding": "same"}],
    ids=str,
)
def test_compiled_layer(options: dict[str, Any]) -> None:
    layer = fk.PDC2d(4, 6, **{"padding": 1} | options)
    sizes = [torch.randn(2, 4, 6, 7), torch.randn(3, 4, 9, 8)]
    compiled_agrees(layer, sizes, list(layer.parameters()), backend="aot_eager")
    layer.eval().requires_grad_(False)
    layer(sizes[0])
    compiled_agrees(layer, sizes, [], backend="aot_eager")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [4, 1])
def test_export(kind: str, groups: int) -> None:
    """One operator, or the plain kernel and one convolution, for every batch and size."""
    layer = fk.PDC2d(4, 4, kind=kind, padding=1, groups=groups).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        layer, (torch.randn(2, 4, 6, 7),), dynamic_shapes=[{0: auto, 2: auto, 3: auto}]
    )
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    dense = (
        ["aten.conv2d.default"] if kind == "vanilla" else ["frd.pdc_weight.default", "aten.conv2d.default"]
    )
    assert calls == (["frd.pdc2d_depthwise.default"] if groups == 4 else dense)
    x = torch.randn(3, 4, 9, 8)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_a_cast_of_the_operands(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    operands = [torch.randn(shape, device=device) for shape in ((2, 4, 6, 7), (4, 1, 3, 3), (4,))]
    for operand in operands:
        operand.requires_grad_()
    options: dict[str, Any] = {"kind": kind, "theta": 0.7, "padding": 1, "groups": 4}
    with torch.autocast(device.type, dtype=dtype):
        out = fk.pdc2d(*operands, **options)
        with torch.autocast(device.type, enabled=False):
            assert fk.pdc2d(*operands, **options).dtype == torch.float32
    assert out.dtype == dtype
    expected = fk.pdc2d(*(t.to(dtype) for t in operands), **options)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, operands, grad), torch.autograd.grad(expected, operands, grad), strict=True
    ):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_of_a_dense_layer(
    device: torch.device, kind: str, dtype: torch.dtype, training: bool
) -> None:
    """The float32 weight is transformed before it is rounded: no worse than twice eager on data of large mean."""
    layer = fk.PDC2d(8, 8, padding=1, kind=kind, device=device).train(training)
    x = 8 + torch.rand(2, 8, 12, 12, device=device)
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype):
        ours = layer(x)
        baseline = eager(x, layer.weight, layer.bias, kind=kind, padding=1)
    exact = reference.pdc2d(x.double(), layer.weight.double(), layer.bias.double(), kind=kind, padding=1)
    assert ours.dtype == dtype
    assert worst(ours, exact) <= 2 * worst(baseline, exact)
    with torch.no_grad():  # a kernel kept from inside the region is not used outside of it
        torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("groups", [4, 1])
def test_autocast_leaves_float64(device: torch.device, groups: int) -> None:
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64, device=device)
    weight = torch.randn(4, 4 // groups, 3, 3, dtype=torch.float64, device=device)
    options: dict[str, Any] = {"kind": "central", "padding": 1, "groups": groups}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = fk.pdc2d(x, weight, **options)
    assert torch.equal(out, fk.pdc2d(x, weight, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{"groups": 4}, {"kind": "radial", "padding_mode": "circular"}], ids=str)
def test_meta_tensors_have_shapes(layout: str, options: dict[str, Any]) -> None:
    """A net built on "meta" can be asked for its sizes; the fakes answer, forward and backward."""
    layer = fk.PDC2d(4, 4, padding=1, stride=2, device="meta", **options)
    x = torch.empty(2, 4, 7, 9, device="meta").contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    out = layer(x)
    if "groups" in options:
        assert_layout(out, layout)
    assert out.device.type == "meta" and out.shape == (2, 4, 4, 5)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert layer.weight.grad is not None and layer.weight.grad.device.type == "meta"
    with fk.use_backend("reference"):
        assert layer(x).shape == (2, 4, 4, 5)
