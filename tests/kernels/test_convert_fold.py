"""`convert.fold`: every PDC layer one plain convolution, batch norms folded where that is exact, and only there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import frd_kernels as fk
from frd_kernels.convert import PlainBlock2d, Report, fold

from .convert_cases import randomised
from .pdc_cases import KINDS, raises

GEOMETRIES: list[dict[str, Any]] = [
    {"padding": 1, "groups": 6},
    {"padding": 2, "dilation": 2, "groups": 2, "bias": False},
    {"padding": (2, 0), "stride": (2, 1), "dilation": (1, 2)},
]


def folded(model: nn.Module) -> tuple[nn.Module, Report]:
    """The fold of the model in float64, checked to be exact on a random image of six channels."""
    model = randomised(model).double()
    report = Report()
    plain = fold(model, report)
    assert not plain.training and not any(isinstance(m, fk.PDC2d | fk.PDCBlock2d) for m in plain.modules())
    assert_same(model, plain)
    return plain, report


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    x = torch.randn(2, 6, 11, 10, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), copy.deepcopy(model).eval()(x), rtol=0, atol=1e-12)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def notes(report: Report) -> dict[str, str]:
    return {entry.name: f"{entry.result}: {entry.note}" for entry in report}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_batch_norm_after(kind: str, theta: float, geometry: dict[str, Any], mode: str) -> None:
    layer = fk.PDC2d(6, 12, kind=kind, theta=theta, padding_mode=mode, **geometry)
    plain, report = folded(nn.Sequential(layer, nn.BatchNorm2d(12), nn.ReLU()))
    assert [type(m) for m in plain] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert plain[0].kernel_size == ((5, 5) if kind == "radial" else (3, 3)) and plain[0].bias is not None
    assert [(e.name, e.layer, e.kind, e.theta, e.result) for e in report] == [
        ("0", "PDC2d", kind, theta, "replaced"),
        ("1", "BatchNorm2d", None, None, "replaced"),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [0.7, 1.0])
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_batch_norm_before(kind: str, theta: float, groups: int, mode: str, padding: int) -> None:
    """Exact without zeros around the image; radial looks at zeros even with padding 0."""
    layer = fk.PDC2d(6, 12, kind=kind, theta=theta, groups=groups, padding=padding, padding_mode=mode)
    plain, report = folded(nn.Sequential(nn.BatchNorm2d(6), layer))
    sees_zeros = mode == "zeros" and (padding > 0 or kind == "radial")
    assert norms(plain) == sees_zeros
    assert [entry.result for entry in report] == ["kept" if sees_zeros else "replaced", "replaced"]
    assert ("pads with zeros" in report[0].note) == sees_zeros


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_norm_without_shift_before_zero_padding(kind: str) -> None:
    model = randomised(nn.Sequential(nn.BatchNorm2d(6), fk.PDC2d(6, 6, padding=1, kind=kind))).double()
    nn.init.zeros_(model[0].running_mean)
    nn.init.zeros_(model[0].bias)
    plain = fold(model)
    assert norms(plain) == 0
    assert_same(model, plain)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norms_on_both_sides(affine: bool, bias: bool) -> None:
    layer = fk.PDC2d(6, 4, groups=2, kind="central", theta=0.6, bias=bias)
    plain, _ = folded(nn.Sequential(nn.BatchNorm2d(6), layer, nn.BatchNorm2d(4, affine=affine, eps=0.1)))
    assert norms(plain) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"bias": True, "theta": 0.4, "dilation": 2}], ids=str)
@pytest.mark.parametrize("residual", [{}, {"residual": True}, {"residual": True, "stride": 2}], ids=str)
def test_blocks(kind: str, options: dict[str, Any], residual: dict[str, Any]) -> None:
    block = fk.PDCBlock2d(6, 6, kind=kind, **options, **residual)
    plain, report = folded(nn.Sequential(block, nn.BatchNorm2d(6)))
    assert isinstance(plain[0], PlainBlock2d) and report[0].name == "0.pdc"
    assert norms(plain) == bool(residual)  # beside a shortcut, the 1x1 is not all that the norm sees
    assert plain[0].state_dict().keys() >= block.state_dict().keys()


def test_dpm_and_the_models_root() -> None:
    plain, _ = folded(nn.Sequential(fk.DPM(6), nn.BatchNorm2d(6)))
    assert norms(plain) == 0
    assert type(folded(fk.DPM(6))[0].central) is PlainBlock2d
    assert type(folded(fk.PDC2d(6, 6))[0]) is nn.Conv2d
    assert type(folded(fk.PDCBlock2d(6, 6, kind="rd"))[0]) is PlainBlock2d


def test_the_model_is_left_as_it_was() -> None:
    model = randomised(nn.Sequential(fk.PDC2d(6, 6, groups=6), nn.BatchNorm2d(6), fk.DPM(6)))
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    plain = fold(model)
    assert model.training and isinstance(model[0], fk.PDC2d)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert memory.isdisjoint(p.untyped_storage().data_ptr() for p in plain.parameters())
    assert not plain[0].weight.requires_grad and plain[2].central.pdc.weight.requires_grad
    with raises(TypeError, "model must be an nn.Module, got str"):
        fold("model")  # type: ignore[arg-type]


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


def test_meta() -> None:
    """A net without data is folded in shape."""
    with torch.device("meta"):
        model = nn.Sequential(fk.PDC2d(6, 6, kind="rd"), nn.BatchNorm2d(6), fk.DPM(6))
    plain = fold(model)
    assert norms(plain) == 0 and plain(torch.empty(1, 6, 9, 9, device="meta")).shape == (1, 6, 7, 7)


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


def shared_layer() -> nn.Module:
    layer = fk.PDC2d(6, 6, padding=1)
    return nn.Sequential(layer, nn.BatchNorm2d(6), layer, nn.BatchNorm2d(6))


def shared_pair() -> nn.Module:
    pair = nn.Sequential(fk.PDC2d(6, 6, padding=1), nn.BatchNorm2d(6))
    return nn.Sequential(pair, pair)


@pytest.mark.parametrize(("model", "left"), [(shared_layer(), 2), (shared_pair(), 0)])
def test_modules_in_several_places(model: nn.Module, left: int) -> None:
    plain, _ = folded(model)
    assert norms(plain) == left and plain[0] is (plain[2] if left else plain[1])


def test_a_batch_norm_without_statistics_stays() -> None:
    report = Report()
    plain = fold(nn.Sequential(fk.PDC2d(6, 6), nn.BatchNorm2d(6, track_running_stats=False)), report)
    assert norms(plain) == 1 and notes(report)["1"] == "kept: it has no running statistics"


def test_layers_with_hooks_stay() -> None:
    model = nn.Sequential(
        *(fk.PDC2d(6, 6), nn.BatchNorm2d(6)), *(fk.PDC2d(6, 6, padding=1), nn.BatchNorm2d(6))
    ).double()
    model[0].register_forward_hook(lambda *_: None)
    model[3].register_forward_pre_hook(lambda *_: None)
    report = Report()
    plain = fold(randomised(model), report)
    assert [type(m) for m in plain] == [fk.PDC2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d]
    assert "hooks" in notes(report)["0"] and "hooks" in notes(report)["3"]
    assert_same(model, plain)


class Doubled(fk.PDC2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_subclass_with_a_forward_of_its_own_stays() -> None:
    model = randomised(nn.Sequential(Doubled(6, 6), nn.BatchNorm2d(6))).double()
    report = Report()
    plain = fold(model, report)
    assert [type(m) for m in plain] == [Doubled, nn.BatchNorm2d]
    assert notes(report)["0"] == "kept: its class has a forward of its own"
    assert_same(model, plain)


def test_a_parametrized_weight_is_baked_in() -> None:
    layer = nn.utils.parametrizations.weight_norm(fk.PDC2d(6, 6, kind="central"))
    plain, _ = folded(nn.Sequential(layer, nn.BatchNorm2d(6)))
    assert type(plain[0]) is nn.Conv2d and norms(plain) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["central", "angular", "radial"])
def test_16_bit_kernels_are_rounded_once_and_sum_to_zero(kind: str, dtype: torch.dtype) -> None:
    model = randomised(nn.Sequential(fk.PDC2d(6, 6, kind=kind), nn.BatchNorm2d(6))).to(dtype)
    weight = fold(model)[0].weight
    exact = fold(copy.deepcopy(model).double())[0].weight
    assert weight.dtype == dtype and (weight.double().sum((2, 3)) == 0).all()
    largest = exact.abs().amax((2, 3), keepdim=True)
    assert ((weight.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * largest).all()


def test_a_folded_model_is_saved_whole(tmp_path: Path) -> None:
    model = nn.Sequential(fk.PDC2d(6, 6), fk.DPM(6)).double()
    torch.save(fold(model), tmp_path / "net.pt")
    assert_same(model, torch.load(tmp_path / "net.pt", weights_only=False))


def test_the_report_prints_a_line_each() -> None:
    _, report = folded(nn.Sequential(fk.PDC2d(6, 6, kind="rd", theta=0.5), nn.BatchNorm2d(6)))
    assert str(report).splitlines() == [
        "0: PDC2d (radial, theta 0.5) replaced",
        "1: BatchNorm2d replaced: folded into 0",
    ]
