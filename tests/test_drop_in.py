"""Composite layers honour whatever is attached to an inner module or put in its place: each result is that of a plain
twin with merged weights, which runs the fused kernels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import frd_kernels as fk
from frd_kernels.pdc_block import layers as block_layers
from frd_model import create_model

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
GRIDS = ((3, 3), (2, 2), (2, 1))
_SMALL = {"fold_w": 2, "fold_h": 2, "heads": 2, "head_dim": 3}

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: fk.PDCBlock2d(6, 6, kind="angular", residual=True, bias=True, theta=0.7),
    "block with shortcut": lambda: fk.PDCBlock2d(6, 4, kind="radial", stride=2, residual=True),
    "DPM": lambda: fk.DPM(6),
    "ICM paper": lambda: fk.ICM(6, GRIDS),
    "ICM released": lambda: fk.ICM(6, GRIDS, "released"),
    "ContextCluster": lambda: fk.ContextCluster(6, 4, **_SMALL),
    "ContextCluster dense": lambda: fk.ContextCluster(6, 4, **_SMALL, dispatch="dense"),
    "FECCluster": lambda: fk.FECCluster(6, 4, **_SMALL),
    "ClusterPool": lambda: fk.ClusterPool(2, 6, 4),
}


def make(name: str) -> nn.Module:
    layer = LAYERS[name]().double()
    with torch.no_grad():
        for parameter_name, parameter in layer.named_parameters():
            if parameter_name.endswith("alpha"):
                parameter.fill_(0.5)
    return layer


def inner_names(layer: nn.Module) -> list[str]:
    return [name for name, m in layer.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def image(layer: nn.Module) -> torch.Tensor:
    return torch.randn(2, 6, 8, 6, dtype=torch.float64)


CASES = [(name, inner) for name in LAYERS for inner in inner_names(LAYERS[name]())]


class LoRA(nn.Module):
    """As adapters do it: the layer in a wrapper that shows its weight, plus a product of two small matrices."""

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base
        weight = base.weight.detach()
        self.down = nn.Parameter(torch.randn_like(weight[:2]))
        self.up = nn.Parameter(torch.randn_like(weight[:, :2].flatten(1)[:, :2]))

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def delta(self) -> torch.Tensor:
        return (self.up[:, :1] @ self.down[:1].flatten(1)).view_as(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapter = copy.copy(self.base_layer)
        adapter._parameters = {"weight": nn.Parameter(self.delta().detach()), "bias": None}
        return self.base_layer(x) + adapter(x)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Quantized(torch.Tensor):
    """A weight as torchao makes it: int8 beside a scale, and no storage of its own."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Quantized:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.data8, self.scale = data, scale

    def dequantize(self) -> torch.Tensor:
        return self.data8 * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data8, args[0].scale)
        args, kwargs = tree_map(lambda t: t.dequantize() if isinstance(t, cls) else t, (args, kwargs or {}))
        return func(*args, **kwargs)


def put(layer: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, module)


def forward_hook(layer: nn.Module, name: str) -> None:
    layer.get_submodule(name).register_forward_hook(lambda module, inputs, out: 2 * out)


def pre_hook(layer: nn.Module, name: str) -> None:
    layer.get_submodule(name).register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))


def lora(layer: nn.Module, name: str) -> None:
    put(layer, name, LoRA(layer.get_submodule(name)))


def spectral_norm(layer: nn.Module, name: str) -> None:
    nn.utils.parametrizations.spectral_norm(layer.get_submodule(name)).eval()


def old_spectral_norm(layer: nn.Module, name: str) -> None:
    nn.utils.spectral_norm(layer.get_submodule(name)).eval()


def weight_norm(layer: nn.Module, name: str) -> None:
    module = nn.utils.parametrizations.weight_norm(layer.get_submodule(name))
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(2)


def old_weight_norm(layer: nn.Module, name: str) -> None:
    module = nn.utils.weight_norm(layer.get_submodule(name))
    with torch.no_grad():
        module.weight_g.mul_(2)


def pruned(layer: nn.Module, name: str) -> None:
    module = layer.get_submodule(name)
    prune.l1_unstructured(module, "weight", 0.5)
    with torch.no_grad():
        module.weight_orig.mul_(2)  # an optimizer's step: the mask is applied at the next call


def parametrization(layer: nn.Module, name: str) -> None:
    parametrize.register_parametrization(layer.get_submodule(name), "weight", Doubled())


def subclass(layer: nn.Module, name: str) -> None:
    module = layer.get_submodule(name)
    base = type(module)
    module.__class__ = type("Own", (base,), {"forward": lambda self, x: 2 * base.forward(self, x)})


def patched(layer: nn.Module, name: str) -> None:
    module = layer.get_submodule(name)
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def quantized_tensor(layer: nn.Module, name: str) -> None:
    module = layer.get_submodule(name)
    scale = module.weight.detach().abs().max() / 127
    weight = Quantized((module.weight.detach() / scale).round().to(torch.int8), scale)
    module.weight = nn.Parameter(weight, requires_grad=False)


def wrapped(layer: nn.Module, name: str) -> None:
    put(layer, name, nn.Sequential(layer.get_submodule(name), nn.Identity()))


def effective(module: nn.Module) -> tuple[torch.Tensor, float]:
    """The weight that a call works with: that of a hook is made by the call."""
    for hook in module._forward_pre_hooks.values():
        hook(module, (None,))
    return module.weight, 1.0


# Attachment -> what it does, and the weight with which a plain module computes the same, and the factor of its bias.
ATTACHMENTS: dict[
    str, tuple[Callable[[nn.Module, str], None], Callable[[nn.Module], tuple[torch.Tensor, float]]]
] = {
    "forward hook": (forward_hook, lambda m: (2 * m.weight, 2.0)),
    "forward pre-hook": (pre_hook, lambda m: (3 * m.weight, 1.0)),
    "LoRA": (lora, lambda m: (m.weight + m.delta(), 1.0)),
    "spectral_norm": (spectral_norm, effective),
    "old spectral_norm": (old_spectral_norm, effective),
    "weight_norm": (weight_norm, effective),
    "old weight_norm": (old_weight_norm, effective),
    "prune": (pruned, effective),
    "parametrization": (parametrization, effective),
    "subclass": (subclass, lambda m: (2 * m.weight, 2.0)),
    "patched forward": (patched, lambda m: (2 * m.weight, 2.0)),
    "quantized tensor": (quantized_tensor, lambda m: (m.weight.dequantize(), 1.0)),
    "wrapped": (wrapped, lambda m: (m[0].weight, 1.0)),
}


def with_merged(twin: nn.Module, name: str, weight: torch.Tensor, factor: float) -> nn.Module:
    inner = twin.get_submodule(name)
    with torch.no_grad():
        inner.weight.copy_(weight.detach())
        if inner.bias is not None:
            inner.bias.mul_(factor)
    return twin


def with_gradient(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    (gradient,) = torch.autograd.grad((out * torch.linspace(1, 2, out.numel()).view_as(out)).sum(), x)
    return out, gradient


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("attachment", ATTACHMENTS)
@pytest.mark.parametrize(("name", "inner"), CASES)
def test_attachments_count(name: str, inner: str, attachment: str) -> None:
    layer, attach_and_merge = make(name), ATTACHMENTS[attachment]
    twin, x = copy.deepcopy(layer), image(layer)
    attach_and_merge[0](layer, inner)
    with_merged(twin, inner, *attach_and_merge[1](layer.get_submodule(inner)))
    wanted, found = with_gradient(twin, x), with_gradient(layer, x)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert found[0].stride() == wanted[0].stride()
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last), wanted[0], **CLOSE)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["block", "block with shortcut", "DPM", "ICM paper", "ICM released"])
def test_plain_layers_stay_fused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that comes with a layer's life costs it the fused path."""
    layer, x = make(name).requires_grad_(False).eval().float(), image(make(name)).float()
    seen: list[Any] = []
    monkeypatch.setattr(block_layers, "_is_fused", spied(block_layers._is_fused, seen))
    monkeypatch.setattr(fk.ICM, "_projections", spied(fk.ICM._projections, seen))
    wanted, state = layer(x), {k: v.clone() for k, v in layer.named_parameters()}
    for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert torch.equal(each(x), wanted)
    assert torch.equal(torch.func.functional_call(layer, state, (x,)), wanted)
    with FlopCounterMode(display=False):
        assert torch.equal(layer(x), wanted)
    ops = {str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes}
    assert len(seen) == 7 * len([m for m in layer.modules() if isinstance(m, fk.PDCBlock2d | fk.ICM)])
    assert all(seen) and ops & {"frd.pdc_block.default", "frd.icm.default"}


def spied(function: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    def spy(*args: Any) -> Any:
        seen.append(function(*args))
        return seen[-1]

    return spy


@pytest.mark.parametrize(("name", "inner"), CASES)
def test_composed_path_equals_the_fused_one(name: str, inner: str) -> None:
    """Backward hooks, on the layer and on a copy: results and all gradients, also where the modules see 16 bit."""
    layer, x = make(name), image(make(name))
    twin, calls = copy.deepcopy(layer), []
    layer.get_submodule(inner).register_full_backward_hook(lambda *args: calls.append(args[0]))
    results = []
    for each in (layer, copy.deepcopy(layer), twin):
        entry = x.clone().requires_grad_()
        each(entry).square().sum().backward()
        results.append([entry.grad, *(p.grad for p in each.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[0], results[2], **CLOSE)
    torch.testing.assert_close(results[1], results[2], **CLOSE)
    assert len(calls) == (0 if inner == "conv_f" else 2)  # FEC's keys get no gradient
    layer, twin = layer.float(), twin.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = layer(x.float()), twin(x.float())
    assert found.dtype == wanted.dtype == torch.bfloat16
    bound = 0.1 * wanted.abs().max().item()
    assert (found - wanted).abs().double().quantile(0.9) < bound  # a label may change where two centres tie


@pytest.mark.parametrize("cls", [nn.Linear, nn.Conv2d, fk.PDC2d], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_of_all_modules_count(name: str, cls: type[nn.Module]) -> None:
    layer, x = make(name), image(make(name))
    twin = copy.deepcopy(layer)
    for inner in inner_names(layer):
        if type(layer.get_submodule(inner)) is cls:
            with_merged(twin, inner, 2 * layer.get_submodule(inner).weight, 2.0)
    wanted = twin(x)
    handle = torch_module.register_module_forward_hook(
        lambda module, inputs, out: 2 * out if type(module) is cls else None
    )
    try:
        torch.testing.assert_close(layer(x), wanted, **CLOSE)
    finally:
        handle.remove()


@pytest.mark.parametrize("how", ["forward of the class", "class of that name"])
@pytest.mark.parametrize("name", LAYERS)
def test_changed_classes_count(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tools add adapters or quantization to all layers of a class: by its forward, or by a class in its place
    from which nets are built."""
    twin = make(name)
    for cls in (nn.Linear, nn.Conv2d):
        forward = cls.forward

        def doubled(self: nn.Module, x: torch.Tensor, forward: Any = forward) -> torch.Tensor:
            return 2 * forward(self, x)

        if how == "forward of the class":
            monkeypatch.setattr(cls, "forward", doubled)
        else:
            monkeypatch.setattr(
                nn, cls.__name__, type(f"Doubled{cls.__name__}", (cls,), {"forward": doubled})
            )
    layer, x = make(name), image(twin)
    layer.load_state_dict(twin.state_dict())
    found = layer(x)
    monkeypatch.undo()
    for inner in inner_names(twin):
        if not isinstance(twin.get_submodule(inner), fk.PDC2d):  # its forward is its own
            with_merged(twin, inner, 2 * twin.get_submodule(inner).weight, 2.0)
    torch.testing.assert_close(found, twin(x), **CLOSE)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_hook_on_a_round_counts(variant: str) -> None:
    layer = make(f"ICM {variant}")
    twin, x = copy.deepcopy(layer), image(layer)
    layer.rounds[1].register_forward_hook(lambda module, inputs, out: (out[0], 2 * out[1]))
    with_merged(twin, "rounds.1.value", 2 * twin.rounds[1].value.weight, 2.0)
    torch.testing.assert_close(with_gradient(layer, x), with_gradient(twin, x), **CLOSE)


def identity(twin: nn.Module, name: str) -> None:
    """The weights with which an inner module gives back its input."""
    inner = twin.get_submodule(name)
    with torch.no_grad():
        if isinstance(inner, fk.PDC2d):
            inner.kind = "vanilla"
            inner.weight.zero_()[:, :, 1, 1] = 1
        else:
            inner.weight.copy_(torch.eye(6).view_as(inner.weight))
        if inner.bias is not None:
            inner.bias.zero_()


@pytest.mark.parametrize(
    ("name", "inner"), [case for case in CASES if case[0] in ("block", "DPM", "ICM paper", "ICM released")]
)
def test_identity_in_place_of_a_module(name: str, inner: str) -> None:
    layer, x = make(name), image(make(name))
    twin = copy.deepcopy(layer)
    put(layer, inner, nn.Identity())
    identity(twin, inner)
    torch.testing.assert_close(with_gradient(layer, x), with_gradient(twin, x), **CLOSE)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer(x).isfinite().all()


EDITS: dict[str, Callable[[fk.PDCBlock2d], Any]] = {
    "padding_mode": lambda block: setattr(block.pdc, "padding_mode", "reflect"),
    "padding": lambda block: setattr(
        block, "pdc", fk.PDC2d(6, 6, padding="same", dilation=2, groups=6).double()
    ),
    "point's stride": lambda block: setattr(block.point, "stride", (2, 2)),
    "point's kernel": lambda block: setattr(block, "point", nn.Conv2d(6, 6, 3, padding=1).double()),
    "dense": lambda block: setattr(block, "pdc", fk.PDC2d(6, 6, padding=1, kind="cd").double()),
    "seamless": lambda block: setattr(block.point, "_conv_forward", lambda x, w, b: F.conv2d(2 * x, w, b)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_layers_of_a_block_count(edit: str) -> None:
    block, x = fk.PDCBlock2d(6, 6, kind="angular", bias=True).double(), torch.randn(2, 6, 8, 6).double()
    EDITS[edit](block)
    torch.testing.assert_close(block(x), block.point(F.relu(block.pdc(x))), **CLOSE)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize(("name", "inner"), CASES)
def test_power_iterations_run(name: str, inner: str, norm: Callable[[nn.Module], nn.Module]) -> None:
    layer = make(name).train()
    module = norm(layer.get_submodule(inner))
    before = [b.clone() for b in module.buffers()]
    layer(image(layer))
    assert before and not all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True))


@pytest.mark.parametrize(("name", "inner"), CASES)
def test_compiled_inner_module_runs(name: str, inner: str) -> None:
    runs = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return lambda *args: (runs.append(1), graph(*args))[1]

    layer, x = make(name), image(make(name))
    wanted = layer(x)
    layer.get_submodule(inner).compile(backend=counting)
    torch.testing.assert_close(layer(x), wanted, **CLOSE)
    assert runs


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_dynamic_quantization(name: str) -> None:
    """Of all linear layers to 8 bit: close to the float net, and not the same."""
    layer, x = make(name).float().eval(), image(make(name)).float()
    quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    found, wanted = quantized(x), layer(x)
    assert (found - wanted).abs().quantile(0.9) < 0.05 * wanted.abs().max()
    assert torch.equal(found, wanted) != name.startswith("ICM")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["block", "ICM paper"])
def test_compile_sees_what_is_attached_later(name: str) -> None:
    layer, x = make(name), image(make(name))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), **CLOSE)
    handle = layer.get_submodule(inner_names(layer)[-1]).register_forward_hook(
        lambda module, inputs, out: 2 * out
    )
    wanted = layer(x)
    torch.testing.assert_close(compiled(x), wanted, **CLOSE)
    handle.remove()
    torch.testing.assert_close(compiled(x), layer(x), **CLOSE)
    assert not torch.allclose(layer(x), wanted)


@pytest.mark.parametrize("name", ["block", "ICM paper"])
def test_compile_sees_hooks_of_all_modules_later(name: str) -> None:
    layer, x = make(name), image(make(name))
    compiled = torch.compile(layer, backend="eager")
    compiled(x)
    seen: list[nn.Module] = []
    handle = torch_module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        compiled(x)
    finally:
        handle.remove()
    assert all(layer.get_submodule(inner) in seen for inner in inner_names(layer))


@pytest.mark.parametrize("name", LAYERS)
def test_meta_device(name: str) -> None:
    """Built without memory, then given some and reset: as built at once."""
    torch.manual_seed(5)
    wanted = LAYERS[name]()
    with torch.device("meta"):
        layer = LAYERS[name]()
    layer.to_empty(device="cpu")
    torch.manual_seed(5)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = image(layer).float()
    assert layer(x).isfinite().all() and layer.state_dict().keys() == wanted.state_dict().keys()
    for key, value in layer.state_dict().items():
        assert value.std(unbiased=False) < 1 and (
            value.numel() == 1 or torch.equal(value, value.clamp(-1, 1))
        )
        if key.endswith(("alpha", "beta")):
            assert torch.equal(value, wanted.state_dict()[key])


@pytest.mark.parametrize(
    "make_layer",
    [
        lambda **o: nn.utils.skip_init(fk.PDC2d, 4, 6, **o),
        lambda **o: nn.utils.skip_init(fk.PDCBlock2d, 4, 6, kind="cd", **o),
        lambda **o: nn.utils.skip_init(fk.DPM, 4, **o),
        lambda **o: nn.utils.skip_init(fk.ICM, 4, **o),
        lambda **o: nn.utils.skip_init(fk.ContextCluster, 4, 4, **o),
        lambda **o: nn.utils.skip_init(fk.FECCluster, 4, 4, **o),
        lambda **o: nn.utils.skip_init(fk.ClusterPool, 2, 4, 4, **o),
    ],
)
def test_skip_init(make_layer: Callable[..., nn.Module]) -> None:
    layer = make_layer(dtype=torch.float64)
    assert all(p.device.type == "cpu" and p.dtype == torch.float64 for p in layer.parameters())


@pytest.mark.parametrize("inner", ["pdc", "point"])
def test_fold_keeps_what_an_adapter_adds(inner: str) -> None:
    """`fold` leaves the block, which calls its modules, and makes plain convolutions of the PDC layers in it."""
    block, x = make("block").eval(), image(make("block"))
    put(block, inner, nn.Sequential(block.get_submodule(inner), Scale()))
    plain = fk.convert.fold(nn.Sequential(block))
    assert not any(isinstance(module, fk.PDC2d) for module in plain.modules())
    torch.testing.assert_close(plain(x), block(x), **CLOSE)


class Scale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x


@pytest.mark.parametrize(
    ("inner", "cls"), [("icm.rounds.0.value", nn.Linear), ("icm", fk.ICM), ("dpm.central.pdc", fk.PDC2d)]
)
def test_hooks_within_a_net_count(inner: str, cls: type[nn.Module]) -> None:
    net = create_model("frdnet_mit_b0", preset="lite").double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    twin, name = copy.deepcopy(net), f"blocks.0.mixer.{inner}"
    module = net.get_submodule(name)
    assert type(module) is cls
    module.register_forward_hook(lambda module, inputs, out: 2 * out)
    if cls is fk.ICM:
        twin.get_submodule("blocks.0.mixer.macro").weight.data *= 2
    else:
        with_merged(twin, name, 2 * module.weight, 2.0)
    with torch.no_grad():
        torch.testing.assert_close(net(x), twin(x), rtol=1e-7, atol=1e-7)
