"""The block's operators inside torch (opcheck, compile, autocast, meta tensors), and the errors of its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

import frd_kernels as fk
from frd_kernels import reference
from frd_kernels.pdc.kinds import Kind

from ..pdc.cases import (
    KINDS,
    LAYOUTS,
    assert_layout,
    block_operands,
    compiled_agrees,
    message_of,
    raises,
)

OP = "pdc_block"

ORDER = ("x", "pdc_weight", "pdc_bias", "point_weight", "point_bias", "residual")  # of the operator


def operands_as(view: str, learns: bool, stride: tuple[int, int] = (1, 1)) -> dict[str, torch.Tensor]:
    """x [2, 5, 6, 7], 4 output channels."""
    operands = block_operands(2, 5, 4, 6, 7, layout="nchw" if view == "slice" else view, stride=stride)
    if view == "slice":
        operands["x"] = torch.randn(2, 7, 8, 9)[:, 1:6, 1:7, 2:]
    return {name: operand.requires_grad_(learns) for name, operand in operands.items()}


@pytest.mark.kernels
@pytest.mark.parametrize("learns", [True, False], ids=["learns", "fixed"])
@pytest.mark.parametrize("view", [*LAYOUTS, "slice"])
@pytest.mark.parametrize(("kind", "absent"), [(Kind.ANGULAR, []), (Kind.RADIAL, ["pdc_bias", "residual"])])
def test_opcheck(ops: Any, kind: Kind, absent: list[str], view: str, learns: bool) -> None:
    operands: dict[str, Any] = operands_as(view, learns, (2, 1)) | dict.fromkeys(absent)
    opcheck(ops.pdc_block.default, (*(operands[name] for name in ORDER), int(kind), 0.7, [2, 1], [1, 2]))


@pytest.mark.kernels
@pytest.mark.parametrize("learns", [True, False], ids=["learns", "fixed"])
@pytest.mark.parametrize(("view", "bias"), [("nchw", True), ("channels_last", False), ("slice", True)])
def test_opcheck_backward(ops: Any, view: str, bias: bool, learns: bool) -> None:
    operands: dict[str, Any] = operands_as(view, learns) | ({} if bias else {"pdc_bias": None})
    grad = torch.randn(2, 4, 6, 7, requires_grad=learns)
    tensors = (grad, *(operands[name] for name in ("x", "pdc_weight", "pdc_bias", "point_weight")))
    opcheck(ops.pdc_block_backward.default, (*tensors, int(Kind.CENTRAL), 0.7, [1, 1], [1, 1], bias))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_block(layout: str) -> None:
    block = fk.PDCBlock2d(4, 6, kind="radial", stride=2, residual=True, bias=True)
    shapes = ((2, 4, 6, 7), (3, 4, 9, 8))
    sizes = [torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) for shape in shapes]
    compiled_agrees(block, sizes, list(block.parameters()), backend="aot_eager")


@pytest.mark.build
def test_compiled_to_code() -> None:
    """Inductor: the operators keep their strides through it, one build for both sizes."""
    dpm = fk.DPM(4)
    sizes = [torch.randn(2, 4, 6, 7), torch.randn(3, 4, 9, 8)]
    compiled_agrees(dpm, sizes, list(dpm.parameters()), backend="inductor")


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
def test_export_of_a_block_is_one_operator(residual: bool) -> None:
    block = fk.PDCBlock2d(4, 4, kind="angular", residual=residual).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        block, (torch.randn(2, 4, 6, 7),), dynamic_shapes=[{0: auto, 2: auto, 3: auto}]
    )
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["frd.pdc_block.default"]
    x = torch.randn(3, 4, 9, 8)
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [4, 1], ids=["depthwise", "dense"])
def test_autocast_is_a_cast_of_the_operands(
    device: torch.device, kind: str, dtype: torch.dtype, groups: int
) -> None:
    operands = {
        n: t.requires_grad_() for n, t in block_operands(2, 4, 6, 7, 8, groups=groups, device=device).items()
    }
    leaves = list(operands.values())
    with torch.autocast(device.type, dtype=dtype):
        out = fk.pdc_block(**operands, kind=kind)
    assert out.dtype == dtype or groups == 1  # a dense block adds the float32 residual as torch does
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    cast = {name: operand.to(dtype) for name, operand in operands.items()}
    expected = fk.pdc_block(**cast, kind=kind)
    if groups == 4:
        assert torch.equal(out, expected)
        casts = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
        assert all(torch.equal(a, b) for a, b in zip(gradients, casts, strict=True))
    else:
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.float(), expected.float(), rtol=8 * eps, atol=16 * eps)


def test_autocast_leaves_float64(device: torch.device) -> None:
    operands = block_operands(1, 4, 6, 7, 8, dtype=torch.float64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = fk.pdc_block(**operands, kind="central")
    assert torch.equal(out, fk.pdc_block(**operands, kind="central"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_meta_tensors_have_shapes(layout: str) -> None:
    block = fk.PDCBlock2d(4, 6, kind="angular", stride=2, residual=True, bias=True).to("meta")
    x = torch.empty(2, 4, 7, 9, device="meta").contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    out = block(x)
    assert out.shape == (2, 6, 4, 5)
    assert_layout(out, layout)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    with fk.use_backend("reference"):
        assert block(x).shape == (2, 6, 4, 5)


X, IMAGE = torch.ones(2, 4, 8, 9), torch.ones(2, 6, 8, 9)
PDC, POINT = torch.ones(4, 1, 3, 3), torch.ones(6, 4, 1, 1)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    ({"x": X[0]}, ValueError, "x must be [B, C, H, W], got [4, 8, 9]"),
    ({"x": X[:, :, :0]}, ValueError, "the output would be empty: x is 0x9"),
    ({"x": X[:, :3]}, ValueError, "groups must divide in_channels 3 and out_channels 4, got 3"),
    ({"x": X.double()}, ValueError, "x must have the dtype of weight, torch.float32, got torch.float64"),
    ({"kind": "diagonal"}, ValueError, "kind must be one of 'vanilla'"),
    ({"theta": 2}, ValueError, "theta must be in [0, 1], got 2"),
    ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    ({"dilation": (1, 0)}, ValueError, "dilation must be at least 1, got (1, 0)"),
    ({"pdc_weight": "w"}, TypeError, "weight must be a tensor, got str"),
    ({"pdc_weight": torch.ones(4, 1, 5, 5)}, ValueError, "in_channels / groups, 3, 3], got [4, 1, 5, 5]"),
    ({"pdc_weight": torch.ones(4, 0, 3, 3)}, ValueError, "must have weight.shape[1] * groups = 0 channels, got 4"),
    ({"pdc_weight": torch.ones(4, 3, 3, 3)}, ValueError, "weight.shape[1] * groups = 3 channels, got 4"),
    ({"pdc_bias": torch.ones(5)}, ValueError, "bias must be [out_channels] = [4], got [5]"),
    ({"point_weight": 1}, TypeError, "point_weight must be a tensor, got int"),
    ({"point_weight": POINT[..., 0]}, ValueError, "point_weight must be [out_channels, 4, 1, 1], got [6, 4, 1]"),
    ({"point_weight": torch.ones(6, 5, 1, 1)}, ValueError, "must be [out_channels, 4, 1, 1], got [6, 5, 1, 1]"),
    ({"point_weight": torch.ones(6, 4, 3, 3)}, ValueError, "must be [out_channels, 4, 1, 1], got [6, 4, 3, 3]"),
    ({"point_weight": POINT.half()}, ValueError, "point_weight must have the dtype of x, torch.float32, got"),
    ({"point_weight": POINT.to("meta")}, ValueError, "point_weight must be on the device of x, cpu, got meta"),
    ({"point_bias": [0.0]}, TypeError, "point_bias must be a tensor, got list"),
    ({"point_bias": torch.ones(4)}, ValueError, "point_bias must have shape [6], got [4]"),
    ({"residual": 0.0}, TypeError, "residual must be a tensor, got float"),
    ({"residual": X}, ValueError, "residual must have shape [2, 6, 8, 9], got [2, 4, 8, 9]"),
    ({"residual": IMAGE, "stride": 2}, ValueError, "residual must have shape [2, 6, 4, 5], got [2, 6, 8, 9]"),
    ({"residual": IMAGE.half()}, ValueError, "residual must have the dtype of x, torch.float32, got torch.float16"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=message_of)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with raises(error, message):
        fk.pdc_block(**{"x": X, "pdc_weight": PDC, "point_weight": POINT, "kind": "angular"} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be a positive int, got 0"),
        ({"in_channels": True}, "in_channels must be a positive int, got True"),
        ({"out_channels": 2.0}, "out_channels must be a positive int, got 2.0"),
        ({"kind": "x"}, "kind must be one of 'vanilla'"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"dilation": -1}, "must be at least"),
        ({"theta": 1.1}, "theta must be in [0, 1], got 1.1"),
    ],
    ids=message_of,
)
def test_bad_arguments_of_the_layer(arguments: dict[str, Any], message: str) -> None:
    with raises(ValueError, message):
        fk.PDCBlock2d(**{"in_channels": 4, "out_channels": 4, "kind": "cd"} | arguments)


def test_layer_names_a_bad_input() -> None:
    with raises(ValueError, "x must be [B, C, H, W], got [4, 8, 9]"):
        fk.DPM(4)(X[0])
    with raises(ValueError, "channels"):
        fk.DPM(4)(torch.ones(1, 5, 8, 9))
    with raises(ValueError, "channels must be a positive int, got 0"):
        fk.DPM(0)


@pytest.mark.native
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, "pdc_block: x must be [B, C, H, W] with C, H, W at least 1, got 3-D"),
        ({"x": X[..., :0]}, "pdc_block: x must be [B, C, H, W] with C, H, W at least 1, got 4-D"),
        ({"pdc_weight": torch.ones(5, 1, 3, 3)}, "pdc_weight must be [4, 1, 3, 3], got 4-D with first size 5"),
        ({"pdc_weight": PDC.half()}, "pdc_block: pdc_weight, pdc_bias and point_weight must have the dtype"),
        ({"pdc_bias": torch.ones(3)}, "pdc_block: pdc_bias must be [4]"),
        ({"point_weight": torch.ones(0, 4, 1, 1)}, "point_weight must be [Co, 4, 1, 1], got 4-D with first size 0"),
        ({"point_bias": torch.ones(4)}, "pdc_block: point_bias must be [6] of the dtype and device of x"),
        ({"residual": X}, "pdc_block: residual must be [2, 6, 8, 9], got 4-D"),
        ({"residual": IMAGE.half()}, "pdc_block: residual must have the dtype and device of x"),
        ({"kind": -1}, "pdc_block: kind must be 0 (vanilla) to 3 (radial), got -1"),
        ({"stride": [1, 0]}, "pdc_block: stride and dilation must be pairs of at least 1"),
        ({"dilation": [1]}, "pdc_block: stride and dilation must be pairs of at least 1"),
    ],
    ids=message_of,
)  # fmt: skip
def test_bad_arguments_of_the_operator(ops: Any, arguments: dict[str, Any], message: str) -> None:
    """The public function never gets this far; other callers of torch.ops.frd do."""
    tensors: dict[str, Any] = dict.fromkeys(ORDER) | {
        "x": X,
        "pdc_weight": PDC,
        "point_weight": POINT,
    }
    options: dict[str, Any] = {"kind": 2, "theta": 1.0, "stride": [1, 1], "dilation": [1, 1]}
    with raises(ValueError, message):
        ops.pdc_block(**tensors | options | arguments)


@pytest.mark.native
def test_bad_gradient_of_the_operator(ops: Any) -> None:
    with raises(ValueError, "pdc_block: grad must be [2, 6, 8, 9], got 4-D"):
        ops.pdc_block_backward(X, X, PDC, None, POINT, 2, 1.0, [1, 1], [1, 1], True)


def test_reference_checks_what_it_convolves() -> None:
    with raises(ValueError, "bias must be [out_channels] = [4], got [5]"):
        reference.pdc_block(X, PDC, POINT, kind="cd", pdc_bias=torch.ones(5))
