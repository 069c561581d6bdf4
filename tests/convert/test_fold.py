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

from ..pdc.cases import KINDS, raises
from .cases import assert_same, folded, norms, notes, randomised

GEOMETRIES: list[dict[str, Any]] = [
    {"padding": 1, "groups": 6},
    {"padding": 2, "dilation": 2, "groups": 2, "bias": False},
    {"padding": (2, 0), "stride": (2, 1), "dilation": (1, 2)},
]


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


def test_meta() -> None:
    """A net without data is folded in shape."""
    with torch.device("meta"):
        model = nn.Sequential(fk.PDC2d(6, 6, kind="rd"), nn.BatchNorm2d(6), fk.DPM(6))
    plain = fold(model)
    assert norms(plain) == 0 and plain(torch.empty(1, 6, 9, 9, device="meta")).shape == (1, 6, 7, 7)


def test_the_report_prints_a_line_each() -> None:
    _, report = folded(nn.Sequential(fk.PDC2d(6, 6, kind="rd", theta=0.5), nn.BatchNorm2d(6)))
    assert str(report).splitlines() == [
        "0: PDC2d (radial, theta 0.5) replaced",
        "1: BatchNorm2d replaced: folded into 0",
    ]
