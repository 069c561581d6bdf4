"""`PDCBlock2d` and `DPM` as layers: what they compute, their parameters, PiDiNet's checkpoints, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import frd_kernels as fk
from frd_kernels import reference
from frd_kernels.pdc_block.reference import dpm

from ..pdc.cases import KINDS, LAYOUTS, eager_block

OP = "pdc_block"


def by_formula(block: fk.PDCBlock2d, x: torch.Tensor) -> torch.Tensor:
    """The block's output out of plain convolutions, in float64."""
    parameters = {name: value.double() for name, value in block.named_parameters()}
    residual = x.double() if block.residual else None
    if "shortcut.weight" in parameters:
        residual = F.conv2d(
            x.double(), parameters["shortcut.weight"], parameters["shortcut.bias"], block.pdc.stride
        )
    return eager_block(
        x.double(),
        parameters["pdc.weight"],
        parameters["point.weight"],
        kind=block.pdc.kind,
        theta=block.pdc.theta,
        stride=block.pdc.stride[0],
        dilation=block.pdc.dilation[0],
        residual=residual,
        pdc_bias=parameters.get("pdc.bias"),
        point_bias=parameters.get("point.bias"),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("filters", [6, 4])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("options", [{}, {"bias": True, "dilation": 2, "theta": 0.7}], ids=str)
def test_block_matches_the_formula(
    device: torch.device, kind: str, stride: int, filters: int, residual: bool, options: dict[str, Any]
) -> None:
    block = fk.PDCBlock2d(6, filters, kind=kind, stride=stride, residual=residual, **options).to(device)
    for layout in LAYOUTS.values():
        x = torch.randn(2, 6, 9, 8, device=device).contiguous(memory_format=layout)
        out = block(x)
        assert out.shape == (2, filters, 9 if stride == 1 else 5, 8 // stride)
        torch.testing.assert_close(out.double(), by_formula(block, x), rtol=1e-5, atol=1e-5)


def test_parameters_of_a_block() -> None:
    names = [name for name, _ in fk.PDCBlock2d(4, 4, kind="ad", residual=True).named_parameters()]
    assert names == ["pdc.weight", "point.weight"]
    shapes = {
        name: tuple(value.shape)
        for name, value in fk.PDCBlock2d(
            4, 6, kind="ad", stride=2, residual=True, bias=True
        ).named_parameters()
    }
    assert shapes == {
        "pdc.weight": (4, 1, 3, 3),
        "pdc.bias": (4,),
        "point.weight": (6, 4, 1, 1),
        "point.bias": (6,),
        "shortcut.weight": (6, 4, 1, 1),
        "shortcut.bias": (6,),
    }
    assert fk.PDCBlock2d(4, 6, kind="ad").shortcut is None


def test_shortcut_only_where_the_sum_needs_one() -> None:
    for filters, stride, residual in ((4, 1, True), (4, 2, False), (6, 1, False)):
        block = fk.PDCBlock2d(4, filters, kind="cd", stride=stride, residual=residual)
        assert block.shortcut is None
    for filters, stride in ((4, 2), (6, 1)):
        assert fk.PDCBlock2d(4, filters, kind="cd", stride=stride, residual=True).shortcut is not None


def test_pidinets_block_loads() -> None:
    """conv1 is the difference convolution, conv2 the 1x1; its stride-2 block pools first, with a biased shortcut."""
    block = fk.PDCBlock2d(4, 6, kind="cd", residual=True)
    saved = {
        "module.block2_1.conv1.weight": torch.randn(4, 1, 3, 3),
        "module.block2_1.conv2.weight": torch.randn(6, 4, 1, 1),
        "module.block2_1.shortcut.weight": torch.randn(6, 4, 1, 1),
        "module.block2_1.shortcut.bias": torch.randn(6),
    }
    names = {"conv1": "pdc", "conv2": "point", "shortcut": "shortcut"}
    renamed = {}
    for name, value in saved.items():
        _module, _block, part, parameter = name.split(".")
        renamed[f"{names[part]}.{parameter}"] = value
    block.load_state_dict(renamed, strict=True)
    x = F.max_pool2d(torch.randn(1, 4, 8, 8), 2)
    torch.testing.assert_close(block(x).double(), by_formula(block, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpm_equals_the_reference(device: torch.device, layout: str) -> None:
    layer = fk.DPM(12).to(device)
    x = torch.randn(2, 12, 9, 8, device=device).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    weights = [
        (block.pdc.weight.double(), block.point.weight.double()) for block in (layer.angular, layer.central)
    ]
    out = layer(x)
    expected = dpm(x.double(), *weights)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad(out.square().sum(), leaves)
    exact = torch.autograd.grad(expected.square().sum(), leaves)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-3)


def test_dpm_by_its_equation() -> None:
    """c = x + angular(x), then central(c), of FRD-Net; neither convolution has a bias."""
    layer = fk.DPM(4)
    assert {name: tuple(value.shape) for name, value in layer.named_parameters()} == {
        "angular.pdc.weight": (4, 1, 3, 3),
        "angular.point.weight": (4, 4, 1, 1),
        "central.pdc.weight": (4, 1, 3, 3),
        "central.point.weight": (4, 4, 1, 1),
    }
    x = torch.randn(1, 4, 6, 7)
    weights = [(block.pdc.weight, block.point.weight) for block in (layer.angular, layer.central)]
    c = x + reference.pdc_block(x, *weights[0], kind="angular")
    torch.testing.assert_close(layer(x), reference.pdc_block(c, *weights[1], kind="central"))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies(way: str) -> None:
    layer = fk.DPM(4).eval()
    file = io.BytesIO()
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        torch.save(layer.state_dict(), file)
        file.seek(0)
        twin = fk.DPM(4).eval()
        twin.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(twin(x), layer(x)) and repr(twin) == repr(layer)


def test_frozen_weights_get_no_gradient(device: torch.device) -> None:
    layer = fk.DPM(4).to(device).requires_grad_(False)
    layer.central.point.weight.requires_grad_(True)
    layer(torch.randn(1, 4, 6, 6, device=device)).sum().backward()
    assert [name for name, value in layer.named_parameters() if value.grad is not None] == [
        "central.point.weight"
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    block = fk.PDCBlock2d(8, 8, kind="cd", residual=True, bias=True).to(device, dtype)
    x = torch.randn(2, 8, 6, 7, device=device).to(dtype)
    out = block(x)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), by_formula(block, x), rtol=2 * eps, atol=8 * eps)


def test_repr() -> None:
    assert "kind='radial', theta=1" in repr(fk.PDCBlock2d(4, 4, kind="rd"))
    assert "residual=True" in repr(fk.PDCBlock2d(4, 4, kind="rd", residual=True))
    assert repr(fk.DPM(4)).count("PDCBlock2d(") == 2
