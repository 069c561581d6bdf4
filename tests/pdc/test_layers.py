"""`PDC2d` as a layer: a drop-in for `nn.Conv2d` and for PiDiNet's, in every padding mode, saved and copied."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import frd_kernels as fk
from frd_kernels import reference

from .cases import KINDS, LAYOUTS

OP = "pdc2d"

GROUPS = {"depthwise": 6, "grouped": 2, "dense": 1}


def by_formula(layer: fk.PDC2d, x: torch.Tensor) -> torch.Tensor:
    """The layer's output in float64: pads by its mode as far as the outermost tap reaches, then the oracle."""
    padding = layer.padding
    if isinstance(padding, str):
        padding = layer.dilation if padding == "same" else (0, 0)
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    options: dict[str, Any] = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    if layer.padding_mode == "zeros":
        return reference.pdc2d(
            x.double(), weight, bias, kind=layer.kind, theta=layer.theta, padding=padding, **options
        )
    if layer.kind == "radial":
        padding = padding[0] + layer.dilation[0], padding[1] + layer.dilation[1]
    padded = F.pad(x.double(), (padding[1], padding[1], padding[0], padding[0]), mode=layer.padding_mode)
    plain = reference.pdc_weight(weight, kind=layer.kind, theta=layer.theta)
    return F.conv2d(padded, plain, bias, **options)


def test_signature_and_defaults_are_those_of_conv2d() -> None:
    """nn.Conv2d's parameters in nn.Conv2d's order, then the two of its own by keyword."""
    theirs = dict(inspect.signature(nn.Conv2d.__init__).parameters)
    ours = dict(inspect.signature(fk.PDC2d.__init__).parameters)
    assert list(ours) == [*theirs, "kind", "theta"]
    for name, parameter in theirs.items():
        assert ours[name].default == (3 if name == "kernel_size" else parameter.default)
    assert {ours[name].kind for name in ("kind", "theta")} == {inspect.Parameter.KEYWORD_ONLY}
    layer, conv = fk.PDC2d(4, 6), nn.Conv2d(4, 6, 3)
    assert isinstance(layer, nn.Conv2d) and (layer.kind, layer.theta) == ("angular", 1.0)
    assert {n: p.shape for n, p in layer.named_parameters()} == {
        n: p.shape for n, p in conv.named_parameters()
    }


def test_initialised_as_conv2d() -> None:
    torch.manual_seed(3)
    layer = fk.PDC2d(4, 6, groups=2, kind="radial")
    torch.manual_seed(3)
    conv = nn.Conv2d(4, 6, 3, groups=2)
    assert torch.equal(layer.weight, conv.weight) and torch.equal(layer.bias, conv.bias)


@pytest.mark.parametrize("kernel_size", [3, (3, 3), [3, 3]])
def test_positional_arguments(kernel_size: Any) -> None:
    layer = fk.PDC2d(4, 8, kernel_size, (2, 1), (1, 2), 2, 2, False, "circular", "meta", torch.float64)
    assert layer.weight.shape == (8, 2, 3, 3) and layer.bias is None
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.float64)
    assert (layer.stride, layer.padding, layer.dilation) == ((2, 1), (1, 2), (2, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": (2, 0), "stride": (2, 1), "dilation": 2}], ids=str
)
def test_matches_the_formula(
    device: torch.device, kind: str, groups: int, mode: str, options: dict[str, Any]
) -> None:
    layer = fk.PDC2d(6, 6, groups=groups, kind=kind, theta=0.7, padding_mode=mode, device=device, **options)
    x = torch.randn(2, 6, 9, 8, device=device)
    for training in (True, False):
        out = layer.train(training)(x)
        torch.testing.assert_close(out.double(), by_formula(layer, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), out[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "options", [{"padding": "same", "dilation": 2}, {"padding": "valid", "stride": 2}], ids=str
)
def test_named_paddings(device: torch.device, kind: str, mode: str, options: dict[str, Any]) -> None:
    layer = fk.PDC2d(6, 6, groups=6, kind=kind, padding_mode=mode, device=device, **options)
    x = torch.randn(2, 6, 9, 8, device=device)
    torch.testing.assert_close(layer(x).double(), by_formula(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "stride": 2, "bias": False},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_to_conv2d_is_exact(
    device: torch.device, kind: str, groups: int, mode: str, options: dict[str, Any]
) -> None:
    options = options | {"groups": groups, "padding_mode": mode, "dtype": torch.float64, "device": device}
    layer = fk.PDC2d(6, 12, kind=kind, theta=0.7, **options).eval()
    conv = layer.to_conv2d()
    assert type(conv) is nn.Conv2d and not conv.training
    assert conv.kernel_size == ((5, 5) if kind == "radial" else (3, 3))
    assert (conv.bias is None) == (layer.bias is None)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64, device=device)
    torch.testing.assert_close(conv(x), layer(x), rtol=0, atol=1e-12)
    conv.weight.data.zero_()  # nothing is shared with the layer
    assert (layer.weight != 0).all()


@pytest.mark.parametrize(("kind", "side", "padding"), [("angular", 3, (2, 2)), ("radial", 5, (4, 4))])
def test_to_conv2d_of_a_dilated_layer(kind: str, side: int, padding: tuple[int, int]) -> None:
    conv = fk.PDC2d(2, 2, padding=2, dilation=2, kind=kind).train().to_conv2d()
    assert conv.weight.shape == (2, 2, side, side)
    assert (conv.padding, conv.dilation, conv.training) == (padding, (2, 2), True)


def test_state_dict_is_that_of_conv2d_and_of_pidinet() -> None:
    """PiDiNet's layer holds weight [O, I, 3, 3] for every kind, and no bias; DataParallel's prefix is the net's."""
    conv = nn.Conv2d(6, 6, 3, groups=6, bias=False)
    for kind in KINDS:
        layer = fk.PDC2d(6, 6, groups=6, bias=False, padding=1, kind=kind)
        assert layer.load_state_dict(conv.state_dict(), strict=True).missing_keys == []
        assert torch.equal(layer.weight, conv.weight)
        assert list(layer.state_dict()) == ["weight"]
    net = nn.Sequential(
        fk.PDC2d(3, 6, kind="cd", bias=False), fk.PDC2d(6, 6, kind="rd", groups=6, bias=False)
    )
    saved = {"module.0.weight": torch.randn(6, 3, 3, 3), "module.1.weight": torch.randn(6, 1, 3, 3)}
    net.load_state_dict({name.removeprefix("module."): value for name, value in saved.items()})
    assert torch.equal(net[1].weight, saved["module.1.weight"])


def test_converted_checkpoint_does_not_load_by_accident() -> None:
    layer = fk.PDC2d(4, 4, kind="radial")
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(layer.to_conv2d().state_dict())


def through_file(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


COPIES: dict[str, Callable[[fk.PDC2d], fk.PDC2d]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: through_file(layer, weights_only=False),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind: str, way: str) -> None:
    layer = fk.PDC2d(4, 6, padding=1, kind=kind, theta=0.7, padding_mode="replicate").freeze()
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        expected = layer(x)  # the kept kernel stays behind: it belongs to the weight's address
        twin = COPIES[way](layer)
        assert torch.equal(twin(x), expected)
        twin.weight.mul_(2)
        assert not torch.equal(twin(x), expected) and torch.equal(layer(x), expected)
    assert repr(twin) == repr(layer)


def test_state_dict_through_a_safe_file() -> None:
    layer, other = fk.PDC2d(4, 6, kind="radial"), fk.PDC2d(4, 6, kind="radial")
    other.load_state_dict(through_file(layer.state_dict(), weights_only=True))
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(layer(x), other(x))


def optimizer_step(layer: fk.PDC2d, fused: bool = False) -> None:
    layer.requires_grad_(True)
    with torch.enable_grad():
        layer(torch.ones(1, 4, 6, 6)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused).step()


def assign(layer: fk.PDC2d) -> None:
    """The memory of the first weight is free when the third is made, and may become its."""
    for _ in range(3):
        state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)


def another_view(layer: fk.PDC2d) -> None:
    """A weight of the same address and version."""
    layer.weight = nn.Parameter(layer.weight.data)
    layer(torch.ones(1, 4, 6, 6))
    layer.weight = nn.Parameter(layer.weight.data.mT)


def in_inference_mode(layer: fk.PDC2d) -> None:
    with torch.inference_mode():
        layer.weight.mul_(2)


CHANGES: dict[str, Callable[[fk.PDC2d], Any]] = {
    "optimizer step": optimizer_step,
    "step of a fused optimizer": lambda layer: optimizer_step(layer, fused=True),
    "load_state_dict": lambda layer: layer.load_state_dict(fk.PDC2d(4, 6, padding=1).state_dict()),
    "load_state_dict assigns": assign,
    "in place": lambda layer: layer.weight.mul_(2),
    "in place in inference mode": in_inference_mode,
    "in place through a view": lambda layer: layer.weight[0, 0].zero_(),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(6, 4, 3, 3))),
    "another view of the memory": another_view,
    "dtype there and back": lambda layer: layer.bfloat16().float(),
    "dtype": lambda layer: layer.double(),
    "kind": lambda layer: setattr(layer, "kind", "central"),
    "theta": lambda layer: setattr(layer, "theta", 0.5),
    "data, then freeze()": lambda layer: (layer.weight.data.mul_(2), layer.freeze()),
    "data, then unfreeze()": lambda layer: (layer.weight.data.mul_(2), layer.unfreeze()),
    "data, then train()": lambda layer: (layer.weight.data.mul_(2), layer.train()),
    "shared memory": lambda layer: layer.share_memory().weight.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_kernel_follows_the_weight(change: str) -> None:
    """A frozen layer keeps its plain kernel; nothing that PyTorch counts may leave it one of an older weight."""
    for _ in range(10):  # memory comes back at the same address now and then only
        layer = fk.PDC2d(4, 6, padding=1).freeze()
        x = torch.randn(1, 4, 6, 6)
        with torch.no_grad():
            layer(x)
            CHANGES[change](layer)
            out = layer(x.to(layer.weight.dtype))
        torch.testing.assert_close(out.double(), by_formula(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.kernels
def test_kernel_is_kept_on_request_and_at_inference_only(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    plain_weight = fk.pdc.api.plain_weight
    monkeypatch.setattr(fk.pdc.api, "plain_weight", lambda *a: made.append(1) or plain_weight(*a))
    layer = fk.PDC2d(4, 6, padding=1, device=device)
    x = torch.randn(1, 4, 6, 6, device=device)

    def count(runs: int = 3) -> int:
        made.clear()
        for _ in range(runs):
            layer(x)
        return len(made)

    assert count() == 3  # training
    layer.eval()
    with torch.no_grad():
        assert count() == 3  # nobody has asked for it
    assert layer.freeze() is layer and not layer.training
    assert count() == 3  # it could be asked for gradients of the weight
    with torch.no_grad():
        assert count() == 1
    with torch.inference_mode():
        assert count() == 0
        layer.freeze()
        assert count() == 1
        layer.eval()
        assert count() == 0
    layer.requires_grad_(False)
    assert count() == 0
    with torch.no_grad():
        assert layer.unfreeze() is layer
        assert count() == 3
    layer.freeze().train()
    layer.eval()
    with torch.no_grad():
        assert count() == 3


BEHIND: dict[str, Callable[[fk.PDC2d], Any]] = {
    "data": lambda layer: layer.weight.data.copy_(torch.ones(6, 4, 3, 3)),
    "numpy": lambda layer: layer.weight.detach().numpy().fill(1),
    "set_": lambda layer: layer.weight.data.set_(torch.randn(6, 4, 3, 3)),
}


@pytest.mark.parametrize("write", BEHIND)
@pytest.mark.parametrize("kind", KINDS)
def test_writes_that_nothing_counts_are_seen(kind: str, write: str) -> None:
    layer, x = fk.PDC2d(4, 6, padding=1, kind=kind, theta=0.7).eval(), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        layer(x)
        BEHIND[write](layer)
        torch.testing.assert_close(layer(x).double(), by_formula(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kept_kernel_in_another_dtype(dtype: torch.dtype) -> None:
    """Autocast and a cast of the layer make one of their own, rounded to a sum of zero."""
    layer, x = fk.PDC2d(4, 6, padding=1, bias=False).freeze(), torch.full((1, 4, 6, 6), 100.0)
    with torch.no_grad():
        layer(x)
        with torch.autocast("cpu", dtype):
            assert layer(x)[..., 1:-1, 1:-1].abs().max() < 1e-3
        assert layer.to(dtype)(x.to(dtype))[..., 1:-1, 1:-1].abs().max() < 1e-3


TOOLS: dict[str, Callable[[fk.PDC2d], nn.Module]] = {
    "half": lambda layer: layer.half(),
    "memory_format": lambda layer: layer.to(memory_format=torch.channels_last),
    "share_memory": lambda layer: layer.share_memory(),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned": lambda layer: prune.remove(prune.random_unstructured(layer, "weight", 0.5), "weight"),
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": lambda layer: nn.utils.parametrizations.spectral_norm(layer).eval(),
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer).eval(),
    "init": lambda layer: nn.init.kaiming_normal_(layer.weight) is None or layer,
    "empty": lambda layer: layer.to("meta").to_empty(device="cpu").reset_parameters() or layer,
}


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_tools_of_torch(groups: int, tool: str) -> None:
    """What PyTorch does to the weight of an nn.Conv2d it does to ours, frozen or not."""
    layer, x = fk.PDC2d(6, 6, groups=groups, padding=1, theta=0.7), torch.randn(1, 6, 7, 8)
    before = layer.weight.detach().clone()
    layer = TOOLS[tool](layer)
    assert isinstance(layer, fk.PDC2d)
    with torch.no_grad():
        out = layer(x.to(layer.weight.dtype))
        eps = max(1e-5, 4 * torch.finfo(out.dtype).eps)
        torch.testing.assert_close(out.double(), by_formula(layer, x), rtol=eps, atol=eps)
        assert torch.equal(layer.freeze()(x.to(layer.weight.dtype)), out)
        assert torch.equal(layer(x.to(layer.weight.dtype)), out)
    if tool == "parametrize":
        assert torch.equal(layer.weight, 2 * before)
    if "prune" in tool:
        assert (layer.weight == 0).sum() == before.numel() // 2


def test_fusion_with_a_batch_norm() -> None:
    conv, norm = (
        fk.PDC2d(4, 6, padding=1, kind="radial", theta=0.7, bias=False).eval(),
        nn.BatchNorm2d(6).eval(),
    )
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    x = torch.randn(1, 4, 7, 8)
    fused = nn.utils.fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(fused(x), norm(conv(x)), rtol=1e-4, atol=1e-5)


def test_kept_kernel_passes_gradients_to_the_input() -> None:
    layer = fk.PDC2d(4, 6, padding=1, kind="radial").freeze().requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(1, 4, 6, 6))
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    layer(x).square().sum().backward()
    twin = x.detach().double().requires_grad_()
    by_formula(layer, twin).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=1e-4, atol=1e-4)


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = fk.PDC2d(4, 6, padding=1).freeze()
        x = torch.randn(1, 4, 6, 6)
        layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x).double(), by_formula(layer, x), rtol=1e-5, atol=1e-5)


def test_attributes_that_were_edited_count() -> None:
    """Segmentation code turns the stride of a loaded net into dilation."""
    layer = fk.PDC2d(4, 4, stride=2, padding=1, groups=4)
    layer.stride, layer.dilation, layer.padding = (1, 1), (2, 2), (2, 2)
    x = torch.randn(1, 4, 9, 9)
    torch.testing.assert_close(layer(x).double(), by_formula(layer, x), rtol=1e-5, atol=1e-5)


def test_frozen_weight_gets_no_gradient(device: torch.device) -> None:
    layer = fk.PDC2d(4, 4, padding=1, groups=4, device=device)
    layer.weight.requires_grad_(False)
    layer(torch.randn(1, 4, 6, 6, device=device)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    frozen = fk.PDC2d(4, 4, device=device).requires_grad_(False)
    assert not frozen(torch.randn(1, 4, 6, 6, device=device)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    layer = fk.PDC2d(8, 8, padding=1, groups=8, device=device, dtype=dtype)
    x = torch.randn(2, 8, 6, 6, device=device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    out = layer(x)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        out.double(), by_formula(layer, x), rtol=2 * eps, atol=1e-5 if eps > 1e-8 else 1e-12
    )


def test_repr() -> None:
    layer = fk.PDC2d(4, 8, padding=1, groups=4, kind="rd", theta=0.7)
    assert repr(layer) == (
        "PDC2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=4, kind='radial', theta=0.7)"
    )
