"""`examples/pidinet.py`: PiDiNet's layout on `PDC2d`, small."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import frd_kernels as fk
from frd_kernels import convert

from .cases import OPS, PiDiNetConv, pidinet_function


@pytest.fixture(scope="module")
def example() -> Any:
    path = Path(__file__).parents[2] / "examples" / "pidinet.py"
    spec = importlib.util.spec_from_file_location("pidinet_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(example: Any, context: int, attention: bool) -> Any:
    torch.manual_seed(0)
    return example.EdgeNet("carv4", 4, context, attention).eval()


@torch.no_grad()
def test_the_published_checkpoints_layout(example: Any) -> None:
    """The paper's 710 k parameters, under the names of its checkpoints."""
    net = example.EdgeNet()
    assert sum(p.numel() for p in net.parameters()) == 710149
    names = set(net.state_dict())
    blocks = [f"block{s}_{i}" for s in range(1, 5) for i in range(1, 4 if s == 1 else 5)]
    assert {f"{block}.conv{i}.weight" for block in blocks for i in (1, 2)} <= names
    others = names - {f"{block}.conv{i}.weight" for block in blocks for i in (1, 2)}
    both = ("weight", "bias")
    sides = [
        *(f"dilations.{{}}.conv1.{key}" for key in both),
        *(f"dilations.{{}}.conv2_{i}.weight" for i in range(1, 5)),
        *(f"attentions.{{}}.conv1.{key}" for key in both),
        "attentions.{}.conv2.weight",
        *(f"conv_reduces.{{}}.conv.{key}" for key in both),
    ]
    expected = {name.format(i) for name in sides for i in range(4)} | {"init_block.weight"}
    expected |= {f"block{s}_1.shortcut.{key}" for s in (2, 3, 4) for key in both}
    assert others == expected | {f"classifier.{key}" for key in both}


@torch.no_grad()
@pytest.mark.parametrize("context, attention", [(3, True), (0, False), (0, True), (3, False)])
@pytest.mark.parametrize("converted", [False, True])
def test_a_checkpoint_gives_the_same_edges(
    example: Any, tmp_path: Path, context: int, attention: bool, converted: bool
) -> None:
    net = small(example, context, attention)
    state = convert.to_pidinet(net.state_dict(), "carv4", converted=converted)
    torch.save({"epoch": 9, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "net.pth")
    again = example.load(torch.load(tmp_path / "net.pth", weights_only=True))
    images = torch.randn(2, 3, 21, 35)
    logits = net(images)
    assert logits.shape == (2, 5, 21, 35)
    torch.testing.assert_close(again(images), logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_edges_are_those_of_pidinets_own_layers(example: Any) -> None:
    net, images = small(example, 3, True), torch.randn(1, 3, 24, 33)
    logits = net(images)
    assert not any(isinstance(layer, fk.PDC2d) for layer in convert.fold(net).modules())
    ops = {kind: op for op, kind in OPS.items()}
    for name, layer in list(net.named_modules()):
        if isinstance(layer, fk.PDC2d):
            shape = (layer.in_channels, layer.out_channels)
            theirs = PiDiNetConv(pidinet_function(ops[layer.kind]), *shape, groups=layer.groups)
            theirs.weight = layer.weight
            net.set_submodule(name, theirs)
    assert not any(isinstance(layer, fk.PDC2d) for layer in net.modules())
    torch.testing.assert_close(net(images), logits, rtol=1e-4, atol=1e-5)


def test_the_printed_differences(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(small(example, 3, True).state_dict(), tmp_path / "net.pth")
    for options in (["--width", "4"], ["--checkpoint", str(tmp_path / "net.pth")]):
        example.main([*options, "--size", "24", "32", "--seconds", "0.01"])
        head, table, *rows = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r"\d k parameters, 24x32, \d+ threads", head)
        largest = float(re.search(r"largest logit ([\d.e-]+)", table)[1])
        found = {row.split()[0]: (float(row.split()[1]), float(row.split()[2])) for row in rows}
        assert list(found) == ["PDC2d", "folded", "eager"]
        assert all(milliseconds > 0 and error <= 1e-5 * largest for milliseconds, error in found.values())
        assert found["PDC2d"][1] == 0
