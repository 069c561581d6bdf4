"""Out of Python: torch.export and AOTInductor of the layers as they are, ONNX after `convert.fold`."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import frd_kernels as fk
from frd_kernels.convert import fold

from .convert.cases import randomised
from .pdc.cases import KINDS

pytestmark = pytest.mark.build

AUTO = torch.export.Dim.AUTO
ANY_SIZE = [{0: AUTO, 2: AUTO, 3: AUTO}]


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def assert_exports(model: nn.Module, expected: list[str]) -> None:
    """The graph is these operators, for every batch and size, in a saved program as well."""
    program = torch.export.export(model.eval(), (torch.randn(2, 6, 8, 7),), dynamic_shapes=ANY_SIZE)
    assert operators(program) == expected
    x = torch.randn(3, 6, 9, 12)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "shortcut"),
    [
        ({}, False),
        ({"residual": True}, False),
        ({"residual": True, "stride": 2, "bias": True, "theta": 0.7}, True),
    ],
    ids=str,
)
def test_a_block_is_one_operator(kind: str, options: dict[str, Any], shortcut: bool) -> None:
    expected = ["aten.conv2d.default"] if shortcut else []
    assert_exports(fk.PDCBlock2d(6, 6, kind=kind, **options), [*expected, "frd.pdc_block.default"])


def test_a_dpm_is_two_operators() -> None:
    assert_exports(fk.DPM(6), 2 * ["frd.pdc_block.default"])


def test_a_saved_program_is_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(fk.PDC2d(6, 6, padding=1, groups=6), fk.PDC2d(6, 6, kind="rd"), fk.DPM(6)).eval()
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(model, (torch.randn(2, 6, 8, 7),), dynamic_shapes=ANY_SIZE), path)
    x = torch.randn(1, 6, 10, 9)
    torch.testing.assert_close(torch.export.load(path).module()(x), model(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
def test_aot_inductor(tmp_path: Path) -> None:
    """A compiled package of depthwise and dense layers and a DPM serves every batch."""
    model = nn.Sequential(
        fk.PDC2d(6, 6, padding=1, groups=6), nn.ReLU(), fk.PDC2d(6, 8, padding=1, kind="central"), fk.DPM(8)
    )
    model = model.eval().requires_grad_(False)
    shapes = [{0: torch.export.Dim("batch", min=1, max=64)}]
    program = torch.export.export(model, (torch.randn(2, 6, 9, 8),), dynamic_shapes=shapes)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 6, 9, 8)
        torch.testing.assert_close(compiled(x), model(x))


class Net(nn.Module):
    """Every kind, depthwise and dense, with batch norms, a block and a DPM: 15 convolutions when folded."""

    CONVOLUTIONS = 4 + 4 + 3 + 2 * 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for kind in KINDS:
            self.layers.append(fk.PDC2d(6, 6, padding=1, groups=6, kind=kind))
            self.layers.append(fk.PDC2d(6, 6, padding=2, dilation=2, kind=kind, theta=0.7, bias=False))
            self.layers.append(nn.BatchNorm2d(6))
        self.block = fk.PDCBlock2d(6, 8, kind="radial", residual=True, stride=2)
        self.dpm, self.norm = fk.DPM(8), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dpm(self.block(self.layers(x))))


def exported(model: nn.Module, x: torch.Tensor, path: Path) -> Any:
    """The ONNX model of `model`, checked by onnx; skips where a package that it takes is missing."""
    onnx = pytest.importorskip("onnx", reason="ONNX export needs onnx")
    pytest.importorskip("onnxscript", reason="ONNX export needs onnxscript")
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=ANY_SIZE, verbose=False)
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    return proto


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [6, 1])
def test_onnx_of_a_folded_layer_is_one_conv(kind: str, groups: int, mode: str, tmp_path: Path) -> None:
    layer = fk.PDC2d(6, 6, padding=1, groups=groups, kind=kind, theta=0.7, padding_mode=mode)
    model = randomised(nn.Sequential(layer, nn.BatchNorm2d(6)))
    proto = exported(fold(model), torch.randn(2, 6, 9, 8), tmp_path / "layer.onnx")
    nodes = Counter(node.op_type for node in proto.graph.node)
    assert nodes["Conv"] == 1
    if mode == "zeros":
        assert set(nodes) == {"Conv"}


def test_onnx_of_a_folded_net(tmp_path: Path) -> None:
    """One Conv for each convolution, no batch norm, and onnx's own evaluator gives the net's output."""
    model = randomised(Net()).eval()
    proto = exported(fold(model), torch.randn(2, 6, 9, 8), tmp_path / "net.onnx")
    nodes = Counter(node.op_type for node in proto.graph.node)
    assert nodes["Conv"] == Net.CONVOLUTIONS and nodes["BatchNormalization"] == 0
    from onnx.reference import ReferenceEvaluator

    x = torch.randn(1, 6, 11, 10)
    (out,) = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), model(x), rtol=1e-4, atol=1e-4)
