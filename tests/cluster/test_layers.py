"""The ICM as a layer: its parameters, layouts, copies on disk and in memory, autocast, compile."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch

import frd_kernels as fk

from .cases import (
    CLEAR,
    VARIANTS,
    on_device,  # noqa: F401  an autouse fixture
    smallest_gap,
)

OP = "icm"

GRIDS = ((3, 3), (2, 2), (2, 1))


def layer_and_image(
    variant: str, channels: int = 6, hw: tuple[int, int] = (7, 5)
) -> tuple[fk.ICM, torch.Tensor]:
    """A layer with parameters that are not the initial ones, and an image [2, C, H, W] it labels without
    doubt."""
    layer = fk.ICM(channels, GRIDS, variant)
    with torch.no_grad():
        layer.alpha += 0.125 * torch.rand_like(layer.alpha)
        layer.beta -= 0.25 * torch.rand_like(layer.beta)
    maps = [(r.key.weight, r.key.bias, r.value.weight, r.value.bias) for r in layer.rounds]
    options = {"variant": variant, "alpha": layer.alpha, "beta": layer.beta, "grids": GRIDS, "hw": hw}
    for _ in range(50):
        x = torch.randn(2, channels, *hw)
        if smallest_gap(x.flatten(2).transpose(1, 2), maps, options) > CLEAR:
            return layer, x
    raise AssertionError("no clear data found")


def test_signature() -> None:
    parameters = inspect.signature(fk.ICM).parameters
    assert list(parameters)[:3] == ["channels", "grids", "variant"]
    assert parameters["grids"].default == ((8, 8), (4, 4), (2, 1))
    assert parameters["variant"].default == "paper"


@pytest.mark.parametrize(("variant", "shape"), [("paper", (1,)), ("released", (3,))])
def test_parameters(variant: str, shape: tuple[int, ...]) -> None:
    layer = fk.ICM(10, variant=variant, dtype=torch.float64)
    names = {
        f"rounds.{t}.{kind}.{part}"
        for t in range(3)
        for kind in ("key", "value")
        for part in ("weight", "bias")
    }
    assert layer.state_dict().keys() == names | {"alpha", "beta"}
    assert all(p.dtype == torch.float64 and p.requires_grad for p in layer.parameters())
    assert layer.alpha.shape == layer.beta.shape == shape
    assert (layer.alpha == (1 / (64 * 16) if variant == "paper" else 1)).all() and (layer.beta == 0).all()
    # the weights of nn.Linear, a 1x1 convolution's start
    assert layer.rounds[0].key.weight.shape == (10, 10)
    assert 0.2 < layer.rounds[0].key.weight.abs().max() <= 10**-0.5


def test_reset_parameters_starts_anew() -> None:
    layer = fk.ICM(6, GRIDS, "released")
    started = []
    for _ in range(2):
        torch.manual_seed(5)
        layer.reset_parameters()
        started.append(copy.deepcopy(layer.state_dict()))
        with torch.no_grad():
            for p in layer.parameters():
                p.fill_(7)
    assert all(torch.equal(p, started[1][name]) for name, p in started[0].items())
    assert (started[0]["alpha"] == 1).all() and (started[0]["beta"] == 0).all()


def test_meta_device_and_repr() -> None:
    layer = fk.ICM(6, ((3, 3), [2, 1]), "released", device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
    assert repr(layer).startswith("ICM(\n  6, grids=((3, 3), (2, 1)), variant='released'\n")
    out = layer(torch.empty(2, 6, 7, 5, device="meta", dtype=torch.bfloat16))
    assert out.is_meta and out.shape == (2, 6, 7, 5) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_the_function_over_its_parameters(backend: str, variant: str) -> None:
    layer, x = layer_and_image(variant)
    maps = [(r.key.weight, r.key.bias, r.value.weight, r.value.bias) for r in layer.rounds]
    tokens = x.flatten(2).transpose(1, 2)
    options = {"variant": variant, "alpha": layer.alpha, "beta": layer.beta, "grids": GRIDS, "hw": (7, 5)}
    wanted = fk.icm(tokens, maps, **options).transpose(1, 2).unflatten(2, (7, 5))
    assert torch.equal(layer(x), wanted)
    exact = fk.reference.icm(tokens.double(), [tuple(p.double() for p in m) for m in maps], **options)
    torch.testing.assert_close(
        wanted.double(), exact.transpose(1, 2).unflatten(2, (7, 5)), rtol=1e-5, atol=5e-6
    )


def results(layer: fk.ICM, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of the image and of all parameters."""
    x = x.detach().requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_backends_agree(backend: str, variant: str) -> None:
    layer, x = layer_and_image(variant)
    found = results(layer, x)
    with fk.use_backend("reference"):
        wanted = results(layer.double(), x.double())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4 * b.abs().max().item())


def test_a_backend_of_another_device_is_refused() -> None:
    layer, x = (value.cpu() for value in layer_and_image("paper"))
    with (
        fk.use_backend("cuda"),
        pytest.raises(NotImplementedError, match="icm: backend 'cuda' was requested"),
    ):
        layer(x)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_is_kept(backend: str, variant: str, dtype: torch.dtype) -> None:
    layer, x = layer_and_image(variant)
    layer, x = layer.to(dtype), x.to(dtype)
    plain = layer(x)
    assert plain.dtype == dtype and plain.shape == x.shape
    last = layer(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain)
    if backend != "reference":
        assert plain.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (17, 3)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_size(backend: str, variant: str, size: tuple[int, int]) -> None:
    layer = fk.ICM(5, variant=variant)
    assert all(t.isfinite().all() for t in results(layer, torch.randn(2, 5, *size)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_compute_the_same(backend: str, variant: str) -> None:
    layer, x = layer_and_image(variant)
    wanted = layer(x)
    loaded = fk.ICM(6, GRIDS, variant)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(copied(x), wanted)
        assert repr(copied) == repr(layer)
        assert copied.alpha is not layer.alpha


def test_frozen_parameters_get_no_gradient(backend: str) -> None:
    layer, x = layer_and_image("released")
    wanted = results(layer, x)[2:]
    layer.rounds[1].requires_grad_(False)
    layer.beta.requires_grad_(False)
    layer(x).square().sum().backward()
    for (name, p), grad in zip(layer.named_parameters(), wanted, strict=True):
        if name == "beta" or name.startswith("rounds.1."):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(backend: str, variant: str) -> None:
    layer, x = layer_and_image(variant)
    with torch.autocast(x.device.type, torch.bfloat16):
        out, *grads = results(layer, x)
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
    if variant == "paper":
        # alpha and beta are not rounded
        gates = layer.alpha.clone(), layer.beta.clone()
        layer = layer.bfloat16()
        layer.alpha, layer.beta = map(torch.nn.Parameter, gates)
        assert torch.equal(layer(x.bfloat16()), out)


def test_compile() -> None:
    """Two sizes in one graph, by the default compiler, forward and backward."""
    layer, x = layer_and_image("paper")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for image in (x, torch.randn(3, 6, 8, 9)):
        image.requires_grad_()
        inputs = [image, *layer.parameters()]
        found, wanted = compiled(image), layer(image)
        assert found.stride() == wanted.stride()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (found, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
