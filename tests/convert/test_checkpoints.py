"""Checkpoints of PiDiNet, CDCN and DEA-Net, there and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import frd_kernels as fk
from frd_kernels import convert, reference

from ..pdc.cases import KINDS, raises
from .cases import OPS, CDCNConv, DEConv, PiDiNetConv, pidinet_function

CARV4 = 4 * ["cd", "ad", "rd", "cv"]


class PiDiNetBlock(nn.Module):
    """Depthwise PDC -> ReLU -> 1x1, plus the input, which a stage's first block pools and projects."""

    def __init__(self, conv: Any, source: int, target: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(source, source, groups=source), nn.Conv2d(source, target, 1, bias=False)
        self.shortcut = None if source == target else nn.Conv2d(source, target, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(self.conv1(x).relu())
        return y + (x if self.shortcut is None else self.shortcut(x))


class PiDiNet(nn.Module):
    """The backbone, tiny; `make` gives the PDC layer of a PiDiNet op."""

    def __init__(self, make: Any, ops: list[str], block: Any = PiDiNetBlock) -> None:
        super().__init__()
        widths = [4, 8, 8, 8]
        layers = iter(ops)
        self.init_block = make(next(layers))(3, 4)
        for stage, width in enumerate(widths, start=1):
            for i in range(1, 4 if stage == 1 else 5):
                source = widths[stage - 2] if i == 1 and stage > 1 else width
                setattr(self, f"block{stage}_{i}", block(make(next(layers)), source, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def foreign(op: str) -> Any:
    return lambda *channels, groups=1: PiDiNetConv(pidinet_function(op), *channels, groups=groups)


def ours(op: str) -> Any:
    options = {"padding": 1, "bias": False, "kind": op}
    return lambda *channels, groups=1: fk.PDC2d(*channels, groups=groups, **options)


def plain(op: str) -> Any:
    side = 5 if op == "rd" else 3
    return lambda *channels, groups=1: nn.Conv2d(
        *channels, side, padding=side // 2, groups=groups, bias=False
    )


def our_block(conv: Any, source: int, target: int) -> nn.Module:
    return fk.PDCBlock2d(source, target, kind=conv(source, source).kind, residual=True)


def saved(model: nn.Module) -> dict[str, Any]:
    """As PiDiNet saves it: of a DataParallel model, beside the epoch."""
    return {"epoch": 19, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> None:
    dtype = next(a.parameters()).dtype
    x = torch.randn(1, 3, 9, 8, dtype=dtype)
    with torch.no_grad():
        expected = a(x)
        torch.testing.assert_close(b(x), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_pidinet_as_it_is_saved() -> None:
    theirs, net = PiDiNet(foreign, CARV4), PiDiNet(ours, CARV4)
    checkpoint = saved(theirs)
    net.load_state_dict(convert.from_pidinet(checkpoint))
    assert_same(theirs, net)
    assert list(checkpoint) == ["epoch", "state_dict"]
    back = convert.to_pidinet(net.state_dict())
    theirs.load_state_dict(back)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in back.items())


def test_pidinet_into_fused_blocks() -> None:
    theirs, net = PiDiNet(foreign, CARV4), PiDiNet(ours, CARV4, our_block)
    state = convert.from_pidinet(saved(theirs), "carv4", blocks=True)
    net.load_state_dict(state)
    assert_same(theirs, net)
    back = convert.to_pidinet(net.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(back)


@pytest.mark.parametrize("config", ["carv4", None, CARV4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pidinet_converted(config: Any, dtype: torch.dtype) -> None:
    """Plain kernels become 3x3 weights again, those that `PDC2d` needs for the same output."""
    net, flat = PiDiNet(ours, CARV4).to(dtype), PiDiNet(plain, CARV4).to(dtype)
    converted = convert.to_pidinet(net.state_dict(), "carv4", converted=True)
    flat.load_state_dict(converted)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_same(net, flat, tolerance)
    before = copy.deepcopy(converted)
    again = PiDiNet(ours, CARV4).to(dtype)
    again.load_state_dict(convert.from_pidinet(converted, config))
    assert_same(flat, again, tolerance)
    assert all(torch.equal(converted[name], before[name]) for name in before)
    unused = {"init_block": (1, 1), "block1_1.conv1": (1, 1), "block1_2.conv1": (0, 0)}  # of cd, ad, rd
    for name, (row, column) in unused.items():
        assert again.state_dict()[f"{name}.weight"][..., row, column].abs().max() < tolerance


@pytest.mark.parametrize("config", ["c16", "a16", "cccv4", "a-v15"])
def test_pidinet_converted_without_a_5x5(config: str) -> None:
    """Kernels of 3x3 tell by their sums whether they are converted."""
    kinds = list(convert.pidinet_kinds(config).values())
    net = PiDiNet(ours, kinds).double()
    converted = convert.to_pidinet(net.state_dict(), config, converted=True)
    again = PiDiNet(ours, kinds).double()
    for given in (config, None):
        again.load_state_dict(convert.from_pidinet(converted, given))
        assert_same(net, again, 1e-12)
        unchanged = convert.from_pidinet(net.state_dict(), given)
        assert all(
            value is net.state_dict()[key] or torch.equal(value, net.state_dict()[key])
            for key, value in unchanged.items()
        )


def test_pidinet_converted_with_theta() -> None:
    """Below theta 1 nothing is forgotten: the weights come back."""
    state = PiDiNet(ours, CARV4).double().state_dict()
    converted = convert.to_pidinet(state, "carv4", theta=0.7, converted=True)
    back = convert.from_pidinet(converted, "carv4", theta=0.7)
    for name, value in state.items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=1e-12)
    with raises(ValueError, "config must name the kinds of a converted checkpoint with theta below 1"):
        convert.from_pidinet(converted, theta=0.7)


def test_pidinet_refusals() -> None:
    state = PiDiNet(ours, CARV4).state_dict()
    converted = convert.to_pidinet(state, "carv4", converted=True)
    with raises(ValueError, "init_block.weight: plain is not a kernel of kind angular with theta 1: off by"):
        convert.from_pidinet(converted, ["ad", *CARV4[1:]])
    with raises(ValueError, "block1_2.conv1.weight: plain must be [O, I, 3, 3] for kind 'central'"):
        convert.from_pidinet(converted, [*CARV4[:2], "cd", *CARV4[3:]])
    half = convert.to_pidinet(state, "cccv4", converted=True)
    half["block2_2.conv1.weight"] = state["block2_2.conv1.weight"]
    with raises(ValueError, "init_block.weight is, block2_2.conv1.weight is not"):
        convert.from_pidinet(half, "cccv4")
    for function in (convert.from_pidinet, convert.to_pidinet):
        with raises(ValueError, "state_dict must hold PiDiNet's layers"):
            function({"conv.weight": torch.zeros(1)})
        with raises(TypeError, "state_dict must be a mapping, got Linear"):
            function(nn.Linear(1, 1))
    with raises(ValueError, "config must name the kinds of the layers where converted=True"):
        convert.to_pidinet(state, converted=True)


def test_pidinets_configurations() -> None:
    """The 14 that PiDiNet has, by their letters: `v15` one and fifteen vanilla, `v4` four times, `16` all alike."""
    letters = {"v": "vanilla", "c": "central", "a": "angular", "r": "radial"}
    expected = {"baseline": 16 * "v", "carv4": 4 * "carv"}
    for a in "car":
        expected |= {f"{a}-v15": a + 15 * "v", f"{a}vvv4": 4 * f"{a}vvv", f"{3 * a}v4": 4 * f"{3 * a}v"}
        expected |= {f"{a}16": 16 * a}
    assert len(expected) == 14
    for config, row in expected.items():
        assert list(convert.pidinet_kinds(config).values()) == [letters[letter] for letter in row]
    names = list(convert.pidinet_kinds(CARV4))
    assert names[:5] == ["init_block", *(f"block1_{i}.conv1" for i in (1, 2, 3)), "block2_1.conv1"]
    assert len(names) == 16 and names[-1] == "block4_4.conv1"
    with raises(ValueError, "config must be one of baseline, c-v15"):
        convert.pidinet_kinds("carv5")
    with raises(ValueError, "config must hold 16 kinds, got 2"):
        convert.pidinet_kinds(["cd", "ad"])
    with raises(ValueError, "kind must be one of"):
        convert.pidinet_kinds(16 * ["xd"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_from_plain_weight_is_the_inverse(kind: str, theta: float, dtype: torch.dtype) -> None:
    weight = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    kernel = reference.pdc_weight(weight, kind=kind, theta=theta).to(dtype)
    back = convert.from_plain_weight(kernel, kind=kind, theta=theta)
    assert back.dtype == dtype and back.shape == weight.shape
    again = reference.pdc_weight(back.double(), kind=kind, theta=theta)
    eps = torch.finfo(dtype).eps
    assert (again - kernel.double()).abs().max() <= 10 * eps * weight.abs().max()
    if theta < 1.0 or kind == "vanilla":
        assert (back.double() - weight).abs().max() <= 20 * eps * weight.abs().max()
    else:
        assert back.double().square().sum() <= weight.square().sum()


@pytest.mark.parametrize("kind", ["central", "angular", "radial"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_from_plain_weight_refuses_other_kernels(kind: str, dtype: torch.dtype) -> None:
    side = 5 if kind == "radial" else 3
    with raises(ValueError, f"plain is not a kernel of kind {kind} with theta 1: off by"):
        convert.from_plain_weight(torch.randn(4, 1, side, side).to(dtype), kind=kind)
    with raises(ValueError, f"plain must be [O, I, {side}, {side}] for kind {kind!r}, got [4, 1, 7, 7]"):
        convert.from_plain_weight(torch.randn(4, 1, 7, 7), kind=kind)


def cdcn(make: Any, bias: bool) -> nn.Module:
    return nn.Sequential(make(3, 6, bias=bias), nn.BatchNorm2d(6), nn.Sequential(make(6, 4, bias=bias)))


@pytest.mark.parametrize("theta", [0.0, 0.7])
@pytest.mark.parametrize("bias", [False, True])
def test_cdcn(theta: float, bias: bool) -> None:
    theirs = cdcn(lambda *channels, **options: CDCNConv(*channels, theta=theta, **options), bias).double()
    options = {"padding": 1, "kind": "central", "theta": theta}
    net = cdcn(lambda *c, **given: fk.PDC2d(*c, **options, **given), bias).double()
    state = convert.from_cdcn({f"module.{k}": v for k, v in theirs.state_dict().items()}, theta=theta)
    net.load_state_dict(state)
    assert_same(theirs.eval(), net.eval(), 1e-12)
    back = convert.to_cdcn(net.state_dict(), ["0", "2.0"], theta=theta)
    assert back.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(back[key], value, rtol=0, atol=1e-15)


def test_cdcn_layers_can_be_named() -> None:
    """Another module that calls its convolution `conv` is left alone, if the layers are named."""
    weight = torch.randn(4, 4, 3, 3)
    state = {
        "a.conv.weight": weight,
        "b.conv.weight": weight,
        "conv.weight": weight,
        "c.conv.weight": weight[0],
    }
    assert list(convert.from_cdcn(state)) == ["a.weight", "b.weight", "weight", "c.conv.weight"]
    named = convert.from_cdcn(state, layers=["a"])
    assert list(named) == ["a.weight", "b.conv.weight", "conv.weight", "c.conv.weight"]
    assert list(convert.to_cdcn(named, ["a"])) == list(state)
    with raises(ValueError, "state_dict must hold c.conv.weight [O, I, 3, 3], got [4, 3, 3]"):
        convert.from_cdcn(state, layers=["c"])
    with raises(ValueError, "state_dict must hold a <layer>.conv.weight [O, I, 3, 3], got none"):
        convert.from_cdcn({"a.weight": weight})
    with raises(ValueError, "state_dict must hold d.weight [O, I, 3, 3], got none"):
        convert.to_cdcn(state, ["d"])
    with raises(ValueError, "theta must be in [0, 1], got 2"):
        convert.from_cdcn(state, theta=2)


def test_cdcn_has_no_bias_at_theta_1() -> None:
    state = {"a.weight": torch.randn(4, 4, 3, 3), "a.bias": torch.zeros(4)}
    assert not convert.to_cdcn(state, ["a"], theta=1.0)["a.conv.bias"].any()
    state["a.bias"] = torch.ones(4)
    with raises(ValueError, "a.bias must be 0 with theta 1"):
        convert.to_cdcn(state, ["a"], theta=1.0)


@pytest.mark.parametrize("theta", [1.0, 0.6])
@pytest.mark.parametrize("prefix", ["", "level1.block.conv1."])
@pytest.mark.parametrize("flat", [False, True], ids=["conv1_1.conv.weight", "conv1_1.weight"])
def test_deconv(theta: float, prefix: str, flat: bool) -> None:
    theirs = DEConv(6, theta).double()
    state: dict[str, Any] = {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}
    if flat:
        state = {key.replace(".conv.", "."): value for key, value in state.items()}
    state["other.weight"] = torch.ones(1)
    merged = convert.from_deconv({"model": state}, theta=theta)
    assert list(merged) == [f"{prefix}weight", f"{prefix}bias", "other.weight"]
    conv = nn.Conv2d(6, 6, 3, padding=1).double()
    conv.load_state_dict({name: merged[f"{prefix}{name}"] for name in ("weight", "bias")})
    x = torch.randn(2, 6, 9, 8).double()
    torch.testing.assert_close(conv(x), theirs(x), rtol=0, atol=1e-12)


def test_deconv_back() -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1).double()
    theirs = DEConv(6).double()
    theirs.load_state_dict(convert.to_deconv(conv.state_dict(), [""]))
    x = torch.randn(2, 6, 9, 8).double()
    torch.testing.assert_close(theirs(x), conv(x), rtol=0, atol=1e-12)
    assert all(
        torch.equal(v, conv.state_dict()[k]) for k, v in convert.from_deconv(theirs.state_dict()).items()
    )
    named = convert.to_deconv({"a.weight": conv.weight.detach(), "b": torch.ones(1)}, ["a"])
    assert "a.conv1_2.conv.weight" in named and not named["a.conv1_5.bias"].any()


def test_deconv_refusals() -> None:
    state = DEConv(6).state_dict()
    with raises(ValueError, "state_dict must hold <layer>.conv1_1.conv.weight"):
        convert.from_deconv({"weight": torch.zeros(1)})
    with raises(ValueError, "state_dict must hold conv1_3.conv.weight [O, I, 3], got none"):
        convert.from_deconv({k: v for k, v in state.items() if "conv1_3" not in k})
    with raises(ValueError, "state_dict must hold conv1_1.conv.weight [O, I, 3, 3], got [6, 6, 5, 5]"):
        convert.from_deconv(state | {"conv1_1.conv.weight": torch.zeros(6, 6, 5, 5)})
    with raises(ValueError, "state_dict must hold a.weight [O, I, 3, 3], got none"):
        convert.to_deconv({}, ["a"])


def test_every_op_has_a_kind() -> None:
    """The names that people know from PiDiNet serve in a configuration."""
    assert set(convert.pidinet_kinds(4 * list(OPS)).values()) == set(OPS.values())
