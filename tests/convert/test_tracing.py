"""`convert.fold` knows what feeds what from the forwards themselves, and keeps what it cannot know."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import frd_kernels as fk
from frd_kernels.convert import Report, fold

from .cases import assert_same, folded, norms, notes, randomised


class Net(nn.Module):
    """A forward of its own, given by the test, over a layer, its batch norm, and a second pair in a Sequential."""

    def __init__(self, forward: str) -> None:
        super().__init__()
        self.pdc, self.norm = fk.PDC2d(6, 6, padding=1, kind="central"), nn.BatchNorm2d(6)
        self.tail = nn.Sequential(fk.PDC2d(6, 6, kind="angular"), nn.BatchNorm2d(6))
        self.ways = nn.ModuleList([nn.Identity(), fk.PDC2d(6, 6, padding=1)])
        self.run = forward

    def forward(self, x: torch.Tensor, early: bool = False, mask: torch.Tensor | None = None) -> torch.Tensor:
        return FORWARDS[self.run](self, x, early, mask)

    def taps(self, x: torch.Tensor) -> torch.Tensor:
        out = 0.0
        for layer in self.tail:
            x = layer(x)
            out = out + x.mean()
        return x + out

    def early(self, x: torch.Tensor, early: bool) -> torch.Tensor:
        y = self.pdc(x)
        return y if early else self.norm(y)

    def masked(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.pdc(x)
        return self.norm(y) if mask is None else self.norm(y * mask)


FORWARDS: dict[str, Any] = {
    "in order": lambda self, x, *_: self.tail(self.norm(self.pdc(x))),
    "twice": lambda self, x, *_: self.norm(self.pdc(x)) + self.norm(self.pdc(2 * x)),
    "both results": lambda self, x, *_: self.norm(y := self.pdc(x)) + y,
    "norm elsewhere": lambda self, x, *_: self.norm(self.pdc(x)) + self.norm(x),
    "layer elsewhere": lambda self, x, *_: self.norm(self.pdc(x)) + self.pdc(x),
    "functional between": lambda self, x, *_: self.norm(self.pdc(x).relu()),
    "own use of the norm": lambda self, x, *_: self.norm(self.pdc(x)) + self.norm.bias.sum(),
    "taps": lambda self, x, *_: self.taps(x),
    "early": lambda self, x, early, _: self.early(x, early),
    "masked": lambda self, x, _, mask: self.masked(x, mask),
}


@pytest.mark.parametrize(
    ("forward", "folds"),
    [
        *(("in order", {"norm", "tail.1"}), ("twice", {"norm"})),
        *((name, set()) for name in FORWARDS if name not in ("in order", "twice")),
    ],
)
def test_adjacency_is_that_of_the_forward(forward: str, folds: set[str]) -> None:
    _, report = folded(Net(forward))
    assert {e.name for e in report if e.layer == "BatchNorm2d" and e.result == "replaced"} == folds


@pytest.mark.parametrize("forward", ["early", "masked"])
def test_every_path_of_the_forward_counts(forward: str) -> None:
    model = randomised(Net(forward)).double().eval()
    plain = fold(model)
    x, mask = torch.randn(1, 6, 8, 8).double(), torch.rand(8, 8).double()
    for arguments in ({}, {"early": True}, {"mask": mask}):
        torch.testing.assert_close(plain(x, **arguments), model(x, **arguments), rtol=0, atol=1e-12)


class Untraceable(nn.Module):
    """A forward that depends on the size of its input, before it uses its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(fk.PDC2d(6, 6, padding=1), nn.BatchNorm2d(6))
        self.inner = nn.Sequential(Net("in order"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % 2:
            raise ValueError("the width must be even")
        for layer in self.body:
            x = layer(x)
        return self.inner(x)


class UsesTheWeight(Untraceable):
    """Calls the function with the layer's own weight, where a trace does not come."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % 2:
            raise ValueError("the width must be even")
        layer = self.body[0]
        return fk.pdc2d(x, layer.weight, layer.bias, kind=layer.kind, padding=1)


class UsesTheWeightFirst(UsesTheWeight):
    """As above, but the trace comes to the use and fails in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.body[0]
        return fk.pdc2d(x, layer.weight, layer.bias, kind=layer.kind, padding=1)


def test_what_cannot_be_traced_keeps_its_batch_norms() -> None:
    plain, report = folded(Untraceable())
    assert type(plain.body[0]) is nn.Conv2d and type(plain.body[1]) is nn.BatchNorm2d
    assert type(plain.inner[0].norm) is nn.Identity  # that forward was traced by itself
    assert "the forward of Untraceable cannot be traced (TraceError" in notes(report)[""]
    assert "kept" in notes(report)[""]


@pytest.mark.parametrize("model", [UsesTheWeight, UsesTheWeightFirst])
def test_a_weight_that_a_forward_uses_itself_stays(model: type[nn.Module]) -> None:
    net = randomised(model()).double()
    report = Report()
    plain = fold(net, report)
    assert type(plain.body[0]) is fk.PDC2d and "weight" in notes(report)["body.0"]
    assert type(plain.inner[0].pdc) is nn.Conv2d
    assert_same(net, plain)


class HalfTraceable(nn.Module):
    """One of its paths depends on the values; it calls its layer without the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.pdc, self.norm = fk.PDC2d(6, 6, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor, early: bool = False) -> torch.Tensor:
        y = self.pdc(x)
        if early:
            return y if y.sum() > 0 else -y
        return self.norm(y)


def test_a_path_that_cannot_be_traced_counts() -> None:
    plain, report = folded(HalfTraceable())
    assert type(plain.pdc) is nn.Conv2d and norms(plain) == 1 and "TraceError" in report[0].note


class ReachesIn(nn.Module):
    """Calls the parts of a module that cannot be traced, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = HalfTraceable()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.norm(self.inner.pdc(x))


def test_what_an_untraceable_module_holds_is_unknown_to_others_too() -> None:
    plain, _ = folded(ReachesIn())
    assert norms(plain) == 1


class ReachesIntoADPM(nn.Module):
    """A batch norm after the DPM, and a second use of the block that ends it."""

    def __init__(self) -> None:
        super().__init__()
        self.dpm, self.norm = fk.DPM(6), nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dpm(x)) + self.dpm.central(x)


def test_the_end_of_a_dpm_that_others_use() -> None:
    plain, report = folded(ReachesIntoADPM())
    assert norms(plain) == 1 and notes(report)["norm"] == "kept: dpm.central is called by others too"


class Remembers(nn.Module):
    """Leaves traces of every call behind."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(fk.PDC2d(6, 6, padding=1), nn.BatchNorm2d(6))
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        self.seen.append(x)
        self.last = x
        return self.body(x)


def test_tracing_leaves_nothing_behind() -> None:
    net = Remembers().double()
    plain = fold(net)
    assert norms(plain) == 0
    for model in (net, plain):
        assert model.calls == 0 and model.seen == [] and not hasattr(model, "last")
    assert_same(net, copy.deepcopy(plain))


def test_a_forward_replaced_on_the_object_is_not_traced() -> None:
    net = Net("in order")
    net.forward = lambda x: net.norm(net.pdc(x)) + net.pdc(x)  # type: ignore[method-assign]
    plain = fold(net)
    assert type(plain.norm) is nn.BatchNorm2d
    layer = fk.PDC2d(6, 6)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert type(fold(nn.Sequential(layer))[0]) is fk.PDC2d


def test_too_many_optional_arguments() -> None:
    class Flags(Net):
        def forward(self, x: torch.Tensor, a=None, b=None, c=None, d=False, e=False) -> torch.Tensor:  # type: ignore
            return self.norm(self.pdc(x))

    plain, report = folded(Flags("in order"))
    assert norms(plain) == 2 and "too many optional arguments" in report[0].note
