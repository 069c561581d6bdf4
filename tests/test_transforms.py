"""Every layer and function under what torch does with functions: torch.func, forward mode, torch.jit.trace, torch.fx,
counters of operations. Values in float64 against plain autograd and loops over samples."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import frd_kernels as fk


class Call(nn.Module):
    """A public function on a parameter of this shape."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def cluster(x: Tensor, weight: Tensor, **options: Any) -> Any:
    return fk.cluster(F.linear(tokens(x), weight), tokens(x), (2, 3), (x.shape[2], x.shape[3]), **options)


def masked(x: Tensor, weight: Tensor) -> Tensor:
    found = cluster(x, weight, mask=tokens(x)[..., 0] > -1, alpha=-1.0)
    return fk.dispatch(found.centres, found.labels, found.similarity, channels_first=True)


def icm(x: Tensor, weight: Tensor) -> Tensor:
    options: dict[str, Any] = {"alpha": 0.1, "beta": weight.sum(), "hw": (x.shape[2], x.shape[3])}
    return fk.icm(tokens(x), [(weight, None, weight, None), None], grids=((4, 3), (2, 1)), **options)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "PDC2d depthwise": lambda: fk.PDC2d(4, 4, padding=1, groups=4, kind="angular"),
    "PDC2d dense": lambda: fk.PDC2d(4, 6, padding=1, kind="radial", theta=0.7, stride=2),
    "PDC2d grouped, reflect": lambda: fk.PDC2d(4, 6, padding="same", groups=2, padding_mode="reflect"),
    "PDCBlock2d": lambda: fk.PDCBlock2d(4, 6, kind="radial", residual=True, stride=2, bias=True),
    "DPM": lambda: fk.DPM(4),
    "ICM paper": lambda: fk.ICM(4, grids=((3, 3), (2, 1))),
    "ICM released": lambda: fk.ICM(4, grids=((3, 3), (2, 1)), variant="released"),
    "ContextCluster": lambda: fk.ContextCluster(4, 4, heads=2, head_dim=4),
    "ContextCluster dense": lambda: fk.ContextCluster(
        4, 4, 2, 2, 1, 1, heads=2, head_dim=4, dispatch="dense"
    ),
    "ContextCluster centres": lambda: fk.ContextCluster(4, 4, heads=2, head_dim=4, return_center=True),
    "FECCluster": lambda: fk.FECCluster(4, 4, heads=2, head_dim=4),
    "ClusterPool": lambda: fk.ClusterPool(2, 4, 6),
    "pdc2d": lambda: Call(lambda x, w: fk.pdc2d(x, w, kind="central", padding=1, groups=2), 4, 2, 3, 3),
    "pdc_weight": lambda: Call(
        lambda x, w: F.conv2d(x, fk.pdc_weight(w, kind="rd", theta=0.5), padding=2), 4, 4, 3, 3
    ),
    "pdc_block": lambda: Call(
        lambda x, w: fk.pdc_block(x, w, w[:, :, :1, :1], kind="ad", residual=x), 4, 4, 3, 3
    ),
    "cluster": lambda: Call(lambda x, w: cluster(x, w, aggregate="similarity", beta=0.5).centres, 4, 4),
    "cluster and dispatch": lambda: Call(masked, 4, 4),
    "icm": lambda: Call(icm, 4, 4),
}


@pytest.fixture(params=MODULES)
def layer(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    yield MODULES[request.param]().double()


@pytest.fixture
def x(layer: nn.Module) -> Tensor:
    return torch.randn(2, 4, 6, 8, dtype=torch.float64)


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Of a sum of squares, for x and every parameter, by plain autograd through the kernels."""
    leaf = x.clone().requires_grad_()
    loss = layer(leaf).square().sum()
    return torch.autograd.grad(loss, [leaf, *layer.parameters()], allow_unused=True, materialize_grads=True)


def check_grad(layer: nn.Module, x: Tensor) -> None:
    def loss(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    dx, parameters = grad(loss, (0, 1))(x, dict(layer.named_parameters()))
    for found, wanted in zip((dx, *parameters.values()), gradients(layer, x), strict=True):
        torch.testing.assert_close(found, wanted)


def check_per_sample_gradients(layer: nn.Module, x: Tensor) -> None:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x.unsqueeze(0),)).square().sum()

    found = vmap(grad(loss), (None, 0))(dict(layer.named_parameters()), x)
    for i in range(len(x)):
        for each, wanted in zip(found.values(), gradients(layer, x[i : i + 1])[1:], strict=True):
            torch.testing.assert_close(each[i], wanted)


def check_vmap(layer: nn.Module, x: Tensor) -> None:
    """Over images, over parameters, over both."""
    xs = torch.stack((x, 2 * x.flip(0)), 1)
    torch.testing.assert_close(vmap(layer, 1)(xs), torch.stack([layer(xs[:, i]) for i in range(2)]))
    nets = [{name: (i + 1) * p.detach() for name, p in layer.named_parameters()} for i in range(2)]
    stacked = {name: torch.stack([net[name] for net in nets]) for name in nets[0]}

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))

    torch.testing.assert_close(vmap(call, (0, None))(stacked, x), torch.stack([call(net, x) for net in nets]))
    both = torch.stack([call(net, xs[:, i]) for i, net in enumerate(nets)])
    torch.testing.assert_close(vmap(call, (0, 1))(stacked, xs), both)


def check_vjp_and_jvp(layer: nn.Module, x: Tensor) -> None:
    out, backward = vjp(layer, x)
    torch.testing.assert_close(out, layer(x))
    cotangent, tangent = torch.randn_like(out), torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(layer(leaf), leaf, cotangent)
    torch.testing.assert_close(backward(cotangent)[0], wanted)
    pushed = jvp(layer, (x,), (tangent,))[1]
    torch.testing.assert_close((pushed * cotangent).sum(), (wanted * tangent).sum())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(dual.tangent, pushed)


def check_jacobians(layer: nn.Module, x: Tensor) -> None:
    x = x[:1, :, :4, :4]
    wanted = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(jacrev(layer)(x), wanted)
    torch.testing.assert_close(jacfwd(layer)(x), wanted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # torch's loop over a backward
        torch.testing.assert_close(torch.autograd.functional.jacobian(layer, x, vectorize=True), wanted)


def check_hessian(layer: nn.Module, x: Tensor) -> None:
    x = x[:1, :, :4, :4]

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    with fk.use_backend("reference"):
        wanted = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(hessian(loss)(x), wanted)


def check_jit_trace(layer: nn.Module, x: Tensor) -> None:
    """A trace holds no operator of ours, so that it loads without the library, and serves other sizes."""
    with warnings.catch_warnings(record=True) as caught:
        traced = torch.jit.trace(layer, (x,))
    assert not [str(each) for each in caught if "frd_kernels" in each.filename]
    assert "frd" not in {node.kind().partition("::")[0] for node in traced.inlined_graph.nodes()}
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for size in ((2, 4, 6, 8), (1, 4, 10, 8), (3, 4, 6, 14)):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(loaded(x), layer(x))
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(loaded(leaf).square().sum(), leaf)
    torch.testing.assert_close(found, gradients(layer, x)[0])


def check_fx(layer: nn.Module, x: Tensor) -> None:
    """As the root of a graph and below one; the graph runs the kernels."""
    for module in (layer, nn.Sequential(layer)):
        graph = torch.fx.symbolic_trace(module)
        for size in ((2, 4, 6, 8), (1, 4, 10, 8)):
            x = torch.randn(size, dtype=torch.float64)
            torch.testing.assert_close(graph(x), layer(x), rtol=0, atol=0)


CHECKS = [
    check_grad,
    check_per_sample_gradients,
    check_vmap,
    check_vjp_and_jvp,
    check_jacobians,
    check_hessian,
    check_jit_trace,
    check_fx,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_transform(check: Callable[[nn.Module, Tensor], None], layer: nn.Module, x: Tensor) -> None:
    check(layer, x)


@pytest.mark.parametrize("name", ["PDC2d dense", "PDCBlock2d", "ICM paper", "ClusterPool"])
def test_compiled_transforms(name: str) -> None:
    layer, x = MODULES[name]().double(), torch.randn(2, 4, 6, 8, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return layer(x.unsqueeze(0)).square().sum()

    compiled = torch.compile(vmap(grad(loss)), fullgraph=True, backend="eager")
    wanted = [gradients(layer, x[i : i + 1])[0] for i in range(len(x))]
    torch.testing.assert_close(compiled(x), torch.cat(wanted))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["ContextCluster", "FECCluster", "ClusterPool"])
def test_fx_keeps_optional_arguments(name: str) -> None:
    layer = MODULES[name]()
    graph = torch.fx.symbolic_trace(layer)
    x = torch.randn(1, 4, 8, 8)
    mask = torch.rand(1, 8, 8) > 0.3
    for found, wanted in zip(graph(x, mask, True), layer(x, mask, True), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["PDCBlock2d", "ICM paper", "ICM released"])
def test_composed_layers(name: str) -> None:
    """Layers that call their modules, for what is attached to one of them."""
    layer, x = MODULES[name]().double(), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    inner = next(module for module in layer.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    inner.register_forward_hook(lambda _module, _inputs, out: 2 * out)
    for check in (check_grad, check_vmap, check_jit_trace):
        check(layer, x)
    graph = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(graph(x), layer(x))
    assert [node.op for node in graph.graph.nodes].count("call_module") > 0


def test_fx_records_functions_wherever_they_come_from() -> None:
    from frd_kernels import pdc2d

    graph = torch.fx.symbolic_trace(lambda x, w: pdc2d(x, w, kind="central"))
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    assert [node.op for node in graph.graph.nodes].count("call_function") == 1
    assert torch.equal(graph(x, w), pdc2d(x, w, kind="central"))


@pytest.mark.parametrize("kind", ["angular", "radial"])
def test_16_bit_is_computed_in_float32(kind: str) -> None:
    layer = fk.PDC2d(4, 4, padding=1, groups=4, bias=False, kind=kind).bfloat16()
    x = 100 + torch.randn(2, 4, 6, 8).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(vmap(layer)(x), layer(x), rtol=0.01, atol=0.01)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(vmap(layer)(x.float()), layer(x.float()), rtol=0.01, atol=0.01)


def test_gradients_in_batches(layer: nn.Module, x: Tensor) -> None:
    """The forward pass has run on the kernels when vmap meets their backward."""
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    cotangents = torch.randn(3, *out.shape, dtype=out.dtype)
    wanted = torch.stack([torch.autograd.grad(out, leaf, c, retain_graph=True)[0] for c in cotangents])
    found = vmap(lambda c: torch.autograd.grad(out, leaf, c, retain_graph=True)[0])(cotangents)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["PDC2d depthwise", "PDC2d dense", "PDCBlock2d", "ICM paper", "FECCluster"])
def test_a_backend_that_was_asked_for_is_not_replaced_in_silence(name: str) -> None:
    layer, x = MODULES[name](), torch.randn(1, 4, 8, 8)
    calls: list[Callable[[], Any]] = [
        lambda: grad(lambda x: layer(x).sum())(x),
        lambda: vmap(layer)(x.unsqueeze(0)),
        lambda: jvp(layer, (x,), (x,)),
        lambda: torch.jit.trace(layer, (x,)),
    ]
    with fk.use_backend("cpu"):
        for call in calls:
            with pytest.raises(NotImplementedError, match="leave use_backend out") as caught:
                call()
            assert "\n" not in str(caught.value)
        with forward_ad.dual_level():
            layer(x)  # nothing to lose
            if name not in ("PDC2d dense", "FECCluster"):  # those differentiate without operators
                with pytest.raises(NotImplementedError, match="leave use_backend out"):
                    layer(forward_ad.make_dual(x, x))
    with fk.use_backend("reference"):
        calls[0](), calls[1](), calls[2]()


def flops(function: Callable[[], Tensor]) -> tuple[int, int]:
    """Of the forward and of the backward pass."""
    with FlopCounterMode(display=False) as forward:
        loss = function().sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("namespace", ["frd", "frd_triton"])
def test_every_operator_has_a_formula(namespace: str) -> None:
    schemas = (schema.name.partition("::") for schema in torch._C._jit_get_all_schemas())
    names = {name for owner, _, name in schemas if owner == namespace}
    assert {"pdc_weight", "pdc2d_depthwise", "pdc_block", "cluster", "cluster_dispatch", "icm"} <= names
    for name in names:
        assert getattr(getattr(torch.ops, namespace), name) in flop_registry, name


@pytest.mark.parametrize("kind", ["angular", "radial"])
@pytest.mark.parametrize("stride", [1, 2])
def test_flops_of_difference_convolutions(kind: str, stride: int) -> None:
    """As of the plain convolution; twice that for both gradients. (torch takes grouped weights' gradients for those
    of one group.)"""
    x, weight = torch.randn(2, 4, 9, 8, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    point = torch.randn(6, 4, 1, 1, requires_grad=True)
    plain = fk.pdc_weight(weight, kind=kind).detach()
    padding = plain.shape[-1] // 2
    with FlopCounterMode(display=False) as counter:
        hidden = F.conv2d(x, plain, stride=stride, padding=padding, groups=4)
        first = counter.get_total_flops()
        F.conv2d(hidden, point)
    both = counter.get_total_flops()
    options: dict[str, Any] = {"kind": kind, "stride": stride}
    assert flops(lambda: fk.pdc2d(x, weight, padding=1, groups=4, **options)) == (first, 2 * first)
    assert flops(lambda: fk.pdc2d(x.detach(), weight, padding=1, groups=4, **options)) == (first, first)
    assert flops(lambda: fk.pdc_block(x, weight, point, **options)) == (both, 2 * both)


@pytest.mark.parametrize("name", ["ICM paper", "ICM released", "ContextCluster", "FECCluster", "icm"])
def test_flops_of_clusterings(name: str) -> None:
    """As of the reference, whose products are all matrix products."""
    layer, x = MODULES[name](), torch.randn(2, 4, 8, 12, requires_grad=True)
    with fk.use_backend("reference"):
        wanted = flops(lambda: layer(x))
    assert wanted[0] > 0
    assert flops(lambda: layer(x)) == wanted


def test_fvcore_counts_the_same(layer: nn.Module) -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    x = torch.randn(1, 4, 8, 12, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = fvcore.FlopCountAnalysis(layer, x).unsupported_ops_warnings(False)
        macs = analysis.by_operator()
    products = sum(macs[name] for name in ("conv", "linear", "matmul", "bmm", "addmm"))
    assert products == counter.get_total_flops() // 2
