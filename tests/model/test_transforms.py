"""Nets under what torch does with functions: torch.func, torch.jit.trace, torch.fx, and counters of operations."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from frd_model import FRDNet, create_model
from frd_model.complexity import count_macs

# Grids that the coarsest maps of these images are larger than: no two centres are the same.
SMALL: dict[str, Any] = {"stages": (1, 2), "grids": ((2, 2), (2, 1), (1, 1)), "blocks": 1}
NETS: dict[str, Callable[[], FRDNet]] = {
    "lite": lambda: create_model("frdnet_mit_b0", preset="lite", pyramid_width=8, **SMALL),
    "paper": lambda: create_model("frdnet_mit_b0", preset="paper", decoder_widths=(8, 8), **SMALL),
    "divergent": lambda: create_model(
        "frdnet_mit_b0",
        icm_centres="divergent",
        decoder_widths=(8, 8),
        **{**SMALL, "grids": ((2, 2), (3, 1), (2, 1))},
    ),
    "released": lambda: create_model("frdnet_mit_b0", preset="released", decoder_widths=(8,), **SMALL),
    "timm": lambda: create_model("frdnet_resnet18", decoder_widths=(8, 8), **SMALL),
}
SIZES = [(1, 3, 32, 64), (2, 3, 33, 70), (1, 3, 7, 100)]


@pytest.fixture(params=NETS, scope="module")
def net(request: pytest.FixtureRequest) -> FRDNet:
    torch.manual_seed(0)
    return NETS[request.param]().double().eval()


def images(*size: int) -> Tensor:
    return torch.rand(size, dtype=torch.float64)


def test_jit_trace(net: FRDNet) -> None:
    """A saved trace serves other batches and sizes, those that have to be padded among them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(net, (images(1, 3, 64, 64),))
    assert not [str(each) for each in caught if Path(each.filename).parts[-2] in ("frd_model", "icm", "pdc")]
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    with torch.no_grad():
        for size in SIZES:
            x = images(*size)
            torch.testing.assert_close(loaded(x), net(x))


def test_fx(net: FRDNet) -> None:
    graph = torch.fx.symbolic_trace(net)
    with torch.no_grad():
        for size in SIZES:
            x = images(*size)
            assert torch.equal(graph(x), net(x))
        with pytest.raises(ValueError, match=r"images: must be \[B, 3, H, W\]"):
            graph(images(1, 4, 32, 32))


def test_feature_extractor(net: FRDNet) -> None:
    """torchvision's, by the names of modules, in train mode as well."""
    from torchvision.models.feature_extraction import create_feature_extractor

    modules = {"blocks.0.mixer.icm": "macro", "blocks.0.mixer.dpm.angular": "angular", "blocks.0": "block"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "NOTE: The nodes obtained by tracing")
        extractor = create_feature_extractor(net, modules)
    expected: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, key=key: expected.update({key: out})
        )
        for name, key in modules.items()
    ]
    x = images(2, 3, 33, 70)
    with torch.no_grad():
        net(x)
        found = extractor.eval()(x)
    for hook in hooks:
        hook.remove()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])


def test_per_sample_gradients(net: FRDNet) -> None:
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    x = images(2, 3, 40, 64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, (parameters, buffers), (x.unsqueeze(0),)).square().mean()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(2):
        out = net(x[i : i + 1]).square().mean()
        wanted = torch.autograd.grad(
            out, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        for each, one in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(each[i], one)


def test_jvp(net: FRDNet) -> None:
    x, tangent = images(1, 3, 40, 64).requires_grad_(), images(1, 3, 40, 64)
    out, pushed = jvp(net, (x.detach(),), (tangent,))
    cotangent = torch.randn_like(out)
    (pulled,) = torch.autograd.grad(net(x), x, cotangent)
    torch.testing.assert_close((pushed * cotangent).sum(), (pulled * tangent).sum())


def test_fvcore_counts_the_same(net: FRDNet) -> None:
    """All but the interpolation and the pooling, which tables do not count."""
    fvcore = pytest.importorskip("fvcore.nn")
    if net.config.encoder == "resnet18":
        pytest.skip("fvcore counts batch norms")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = fvcore.FlopCountAnalysis(net, images(1, 3, 64, 96)).unsupported_ops_warnings(False)
        macs = analysis.by_operator()
    counted = sum(macs[name] for name in ("conv", "linear", "matmul", "layer_norm", "group_norm"))
    assert counted == count_macs(net, 64, 96)["total"]


def test_tensorboard_graph(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with SummaryWriter(tmp_path) as writer:
            writer.add_graph(NETS["lite"](), torch.rand(1, 3, 64, 64))
    assert any(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
