"""`convert.replace_pdc`: foreign PDC layers of a live model become `PDC2d`, or stay with a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import frd_kernels as fk
from frd_kernels.convert import Entry, fold, replace_pdc

from ..pdc.cases import raises
from .cases import OPS, CDCNConv, DEConv, PiDiNetConv, pidinet_function, randomised

GEOMETRIES: list[dict[str, Any]] = [
    {"groups": 6},
    {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "bias": True},
    {"bias": True},
]


def replaced(layer: nn.Module, exact: float = 1e-12) -> tuple[nn.Module, Entry]:
    """The layer that takes the place of `layer`, checked on a random image, and the one entry of the report."""
    model = nn.Sequential(nn.Identity(), layer).eval()
    x = torch.randn(2, 6, 11, 10, dtype=next(layer.parameters()).dtype)
    with torch.no_grad():
        expected = model(x)
        (entry,) = replace_pdc(model)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=exact)
    assert (entry.name, entry.layer) == ("1", type(layer).__name__)
    return model[1], entry


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("theta", [0.25, 0.7, 1.0])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_pidinets_closures(op: str, theta: float, geometry: dict[str, Any]) -> None:
    """All closures are called `func`; PiDiNet's radial one runs in float32 only."""
    layer = PiDiNetConv(pidinet_function(op, theta), 6, 12, **geometry)
    if op != "rd":
        layer = layer.double()
    weight, bias = layer.weight, layer.bias
    new, entry = replaced(layer, 1e-12 if op != "rd" else 1e-4)
    assert type(new) is fk.PDC2d and new.kind == OPS[op]
    assert new.theta == (theta if op != "cv" else 1.0)
    assert new.weight is weight and new.bias is bias
    assert (entry.kind, entry.theta, entry.result, entry.note) == (new.kind, new.theta, "replaced", "")


def test_radial_with_any_padding() -> None:
    """PiDiNet's radial layer ignores its padding and gives an output of the input's size."""
    for padding in (0, 1, 3):
        new, _ = replaced(PiDiNetConv(pidinet_function("rd"), 6, 6, padding=padding), 1e-4)
        assert new.padding == (1, 1)


def test_vanilla_may_be_torchs_function() -> None:
    """createConvFunc("cv") of PiDiNet is F.conv2d itself."""
    new, _ = replaced(PiDiNetConv(F.conv2d, 6, 6, padding=0).double())
    assert (new.kind, new.padding) == ("vanilla", (0, 0))


def test_theta_is_told_where_nothing_declares_it() -> None:
    def hidden(*arguments: Any) -> torch.Tensor:
        return pidinet_function("ad", 0.123456)(*arguments)

    new, _ = replaced(PiDiNetConv(hidden, 6, 6).double())
    assert new.theta == pytest.approx(0.123456, abs=1e-12)


@pytest.mark.parametrize("theta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 2, "dilation": 2, "groups": 3}, {"padding_mode": "reflect"}],
    ids=str,
)
def test_cdcn(theta: float, options: dict[str, Any]) -> None:
    layer = CDCNConv(6, 12, theta, **options).double()
    weight = layer.conv.weight
    new, entry = replaced(layer)
    assert (new.kind, new.theta) == ("central", theta)
    assert new.weight is weight and "conv.weight is weight" in entry.note
    assert new.padding_mode == options.get("padding_mode", "zeros")


@pytest.mark.parametrize(("theta", "scale"), [(0.7, 0.3), (0.0, 1.0)])
def test_cdcns_bias_counts_one_minus_theta_times(theta: float, scale: float) -> None:
    layer = CDCNConv(6, 12, theta, bias=True).double()
    bias = layer.conv.bias
    new, entry = replaced(layer)
    torch.testing.assert_close(new.bias, scale * bias, rtol=0, atol=1e-15)
    assert (new.bias is bias) == (theta == 0.0) == ("new parameter" not in entry.note)


def test_cdcns_bias_without_effect_is_left_out() -> None:
    new, entry = replaced(CDCNConv(6, 12, 1.0, bias=True).double())
    assert new.bias is None and "left out" in entry.note


@pytest.mark.parametrize("theta", [1.0, 0.6])
def test_deconv(theta: float) -> None:
    new, entry = replaced(DEConv(6, theta).double())
    assert (new.kind, new.padding) == ("vanilla", (1, 1)) and "new parameters" in entry.note


class AngularConv(nn.Conv2d):
    """A difference convolution written as a subclass, without a telling attribute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = self.weight.shape
        weight = self.weight - self.weight.flatten(2)[..., [3, 0, 1, 6, 4, 2, 7, 8, 5]].view(shape)
        return self._conv_forward(x, weight, self.bias)


def test_a_subclass_of_conv2d() -> None:
    new, _ = replaced(AngularConv(6, 6, 3, padding=1, padding_mode="circular").double())
    assert (new.kind, new.padding_mode) == ("angular", "circular")


def test_device_dtype_mode_and_learning_are_kept() -> None:
    layer = PiDiNetConv(pidinet_function("cd"), 6, 6, bias=True).bfloat16().train()
    layer.weight.requires_grad_(False)
    model = nn.Sequential(layer)
    replace_pdc(model)
    new = model[0]
    assert new.training and new.weight.dtype == torch.bfloat16 and new.weight.device == layer.weight.device
    assert not new.weight.requires_grad and new.bias.requires_grad


def test_an_optimizer_goes_on() -> None:
    model = nn.Sequential(PiDiNetConv(pidinet_function("ad"), 6, 6), nn.BatchNorm2d(6), CDCNConv(6, 6))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    replace_pdc(model)
    model(torch.randn(1, 6, 8, 8)).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_global_random_state_is_left_alone() -> None:
    model = nn.Sequential(PiDiNetConv(pidinet_function("rd"), 6, 6), DEConv(6))
    state = torch.get_rng_state()
    replace_pdc(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_in_two_places_stays_one() -> None:
    layer = PiDiNetConv(pidinet_function("cd"), 6, 6)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    assert len(replace_pdc(model)) == 1 and type(model["a"]) is fk.PDC2d and model["a"] is model["b"][0]


class Squared(PiDiNetConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square()


class Biased(PiDiNetConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.bias[:, None, None]


class PerPixel(PiDiNetConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out + torch.arange(out.shape[-1])


class Conv2dHoriVeriCross(CDCNConv):
    """Five weights in a cross, as in DC-CDN."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.conv = nn.Conv2d(6, 6, (1, 5))


class BrokenSum(DEConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.conv1_5(x)


class OnAnotherDevice(DEConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("torch.cuda.FloatTensor is not available")


def hooked() -> nn.Module:
    layer = PiDiNetConv(pidinet_function("cd"), 6, 6)
    layer.register_forward_hook(lambda *_: None)
    return layer


def counter_clockwise() -> nn.Module:
    def func(x: torch.Tensor, w: torch.Tensor, b: Any, *_: int) -> torch.Tensor:
        return F.conv2d(x, w - w.flatten(2)[..., [1, 2, 5, 0, 4, 8, 3, 6, 7]].view(w.shape), b, padding=1)

    return PiDiNetConv(func, 6, 6)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (counter_clockwise(), "it computes none of the kinds of PDC2d"),
        (Squared(pidinet_function("cd"), 6, 6), "it computes none of the kinds of PDC2d"),
        (PiDiNetConv(pidinet_function("cd", -0.5), 6, 6), "it computes none of the kinds of PDC2d"),
        (Biased(pidinet_function("cd"), 6, 6, bias=True), "its bias is added in a way of its own"),
        (PerPixel(pidinet_function("cd"), 6, 6), "its output for x = 0 is not constant"),
        (PiDiNetConv(pidinet_function("ad"), 6, 6, padding=0), "it cannot be run (AssertionError: padding"),
        (PiDiNetConv(pidinet_function("cd"), 6, 6).to("meta"), "it is on the meta device"),
        (Conv2dHoriVeriCross(), "its conv is a Conv2d (1, 5)"),
        (BrokenSum(6), "it does not compute the sum of its five branches"),
        (OnAnotherDevice(6), "it cannot be run (RuntimeError: torch.cuda.FloatTensor"),
        (hooked(), "has hooks"),
        (
            nn.utils.parametrizations.weight_norm(PiDiNetConv(pidinet_function("cd"), 6, 6)),
            "no parameter weight",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_not_understood_stays_with_a_reason(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(layer)
    (entry,) = replace_pdc(model)
    assert model[0] is layer
    assert (entry.kind, entry.theta, entry.result) == (None, None, "kept") and reason in entry.note


class Samepad(nn.Conv2d):
    """A plain convolution with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def test_other_layers_are_not_mentioned() -> None:
    wrapper = nn.ModuleDict({"conv": nn.Conv2d(6, 6, 3)})
    layers = [nn.Conv2d(6, 6, 3), Samepad(6, 6, 3), nn.ConvTranspose2d(6, 6, 3), nn.Conv3d(6, 6, 3), wrapper]
    model = nn.Sequential(*layers, fk.PDC2d(6, 6), fk.DPM(6), nn.Linear(6, 6))
    assert replace_pdc(model) == []
    assert all(module is layer for module, layer in zip(model, layers, strict=False))


def test_the_model_itself_is_reported() -> None:
    (entry,) = replace_pdc(PiDiNetConv(pidinet_function("cd"), 6, 6))
    assert (entry.name, entry.result) == ("", "kept") and "it is the model itself" in entry.note
    with raises(TypeError, "model must be an nn.Module, got dict"):
        replace_pdc({})  # type: ignore[arg-type]


def test_replaced_then_folded() -> None:
    """From a foreign net to plain convolutions: nothing of it is left, and it computes the same."""
    model = nn.Sequential(
        *(CDCNConv(6, 6, bias=True), nn.BatchNorm2d(6), nn.ReLU()),
        *(PiDiNetConv(pidinet_function("cd"), 6, 6), nn.BatchNorm2d(6), DEConv(6)),
    )
    model = randomised(model).double().eval()
    original = copy.deepcopy(model)
    assert [entry.result for entry in replace_pdc(model)] == 3 * ["replaced"]
    plain = fold(model)
    kinds = [nn.Conv2d, nn.Identity, nn.ReLU, nn.Conv2d, nn.Identity, nn.Conv2d]
    assert [type(module) for module in plain] == kinds
    x = torch.randn(2, 6, 9, 8).double()
    torch.testing.assert_close(plain(x), original(x), rtol=0, atol=1e-12)
