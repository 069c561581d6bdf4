"""Gradients of the difference convolution: finite differences, the oracle in float64, bit-for-bit repetition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import frd_kernels as fk
from frd_kernels import reference
from frd_kernels.pdc.kinds import Kind

from ..backends import is_slow, subset
from .cases import (
    DEPTHWISE,
    DTYPES,
    KINDS,
    LAYOUTS,
    assert_layout,
    assert_rounded_once,
    doubles,
    eager,
    magnitude,
    worst,
)

OP = "pdc2d"

Gradients = tuple[torch.Tensor, ...]


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def leaf(*shape: int, layout: str = "nchw", **options: Any) -> torch.Tensor:
    tensor = torch.randn(shape, **options)
    if tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=LAYOUTS[layout])
    return tensor.requires_grad_()


def gradients(out: torch.Tensor, grad: torch.Tensor, *leaves: torch.Tensor) -> Gradients:
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 2, "stride": (2, 1), "dilation": 2}], ids=str
)
def test_finite_differences_depthwise(kind: str, layout: str, options: dict[str, Any]) -> None:
    x = leaf(1, 3, 3, 4, layout=layout, dtype=torch.float64)
    weight, bias = leaf(3, 1, 3, 3, dtype=torch.float64), leaf(3, dtype=torch.float64)

    def f(*operands: torch.Tensor) -> torch.Tensor:
        return fk.pdc2d(*operands, kind=kind, theta=0.7, groups=3, **options)

    assert gradcheck(f, (x, weight, bias))
    assert gradgradcheck(f, (x, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [2, 1])
def test_finite_differences_dense(kind: str, groups: int) -> None:
    x = leaf(1, 2, 3, 3, dtype=torch.float64)
    weight, bias = leaf(4, 2 // groups, 3, 3, dtype=torch.float64), leaf(4, dtype=torch.float64)

    def f(*operands: torch.Tensor) -> torch.Tensor:
        return fk.pdc2d(*operands, kind=kind, theta=0.7, padding=1, stride=(2, 1), groups=groups)

    assert gradcheck(f, (x, weight, bias))
    # The second derivative of the plain convolution is torch's own, and slow: one direction suffices.
    assert gradgradcheck(f, (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learns", [(True, False), (False, True)], ids=["x", "weight"])
def test_second_derivative_of_one_operand(kind: str, learns: tuple[bool, bool]) -> None:
    x = leaf(1, 2, 3, 4, dtype=torch.float64).requires_grad_(learns[0])
    weight = leaf(2, 1, 3, 3, dtype=torch.float64).requires_grad_(learns[1])

    def f(*operands: torch.Tensor) -> torch.Tensor:
        return fk.pdc2d(*operands, kind=kind, padding=1, groups=2).square()

    assert gradcheck(f, (x, weight))
    assert gradgradcheck(f, (x, weight))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_depthwise(backend: str, device: torch.device, kind: str, dtype: torch.dtype, layout: str) -> None:
    cases = [(*case, theta) for case in DEPTHWISE for theta in (0.7, 1.0)]
    for batch, channels, height, width, options, theta in subset(backend, cases):
        x = leaf(batch, channels, height, width, layout=layout, dtype=dtype, device=device)
        weight = leaf(channels, 1, 3, 3, dtype=dtype, device=device)
        bias = leaf(channels, dtype=dtype, device=device)
        keywords = options | {"kind": kind, "theta": theta, "groups": channels}
        out = fk.pdc2d(x, weight, bias, **keywords)
        exact = doubles(x, weight, bias)
        grad = torch.randn_like(out)
        dx, dw, db = gradients(out, grad, x, weight, bias)
        exact_dx, exact_dw, exact_db = gradients(reference.pdc2d(*exact, **keywords), grad, *exact)
        total = grad.double().abs().sum((0, 2, 3)).max().item()
        assert_rounded_once(dx, exact_dx, magnitude(grad, weight))
        assert_rounded_once(dw, exact_dw, 2 * total * x.detach().double().abs().max().item())
        assert_rounded_once(db, exact_db, total)


def test_more_channels_than_a_block(device: torch.device) -> None:
    """Forward and backward: a block of Triton has up to 128 channels, in the interpreter too."""
    x = leaf(1, 131, 4, 5, layout="channels_last", device=device)
    weight, bias = leaf(131, 1, 3, 3, device=device), leaf(131, device=device)
    options: dict[str, Any] = {"kind": "angular", "theta": 0.7, "padding": 1, "groups": 131}
    exact_operands = doubles(x, weight, bias)
    out, exact = fk.pdc2d(x, weight, bias, **options), reference.pdc2d(*exact_operands, **options)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    found = gradients(out, grad, x, weight, bias)
    for one, truth in zip(found, gradients(exact, grad, *exact_operands), strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [16, 4, 1], ids=["depthwise", "grouped", "dense"])
@pytest.mark.parametrize("mean", [0.0, 8.0])
def test_low_precision_errs_at_most_twice_as_much_as_eager(
    device: torch.device, kind: str, dtype: torch.dtype, groups: int, mean: float
) -> None:
    x = (torch.rand(2, 16, 14, 14, device=device) + mean).to(dtype).requires_grad_()
    weight = (torch.randn(16, 16 // groups, 3, 3, device=device) / 3).to(dtype).requires_grad_()
    options: dict[str, Any] = {"kind": kind, "theta": 0.7, "padding": 1, "groups": groups}
    grad = torch.randn(2, 16, 14, 14, device=device).to(dtype)
    exact_operands = doubles(x, weight)
    exact = gradients(reference.pdc2d(*exact_operands, **options), grad, *exact_operands)
    ours = gradients(fk.pdc2d(x, weight, **options), grad, x, weight)
    baseline = gradients(eager(x, weight, **options), grad, x, weight)
    for one, other, truth in zip(ours, baseline, exact, strict=True):
        assert worst(one, truth) <= 2 * worst(other, truth)


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("learns", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
def test_only_what_learns_gets_a_gradient(
    device: torch.device, groups: int, learns: tuple[int, int, int]
) -> None:
    shapes = [(2, 4, 5, 6), (4, 4 // groups, 3, 3), (4,)]
    operands = [leaf(*shape, device=device) for shape in shapes]
    options: dict[str, Any] = {"kind": "angular", "padding": 1, "groups": groups}
    out = fk.pdc2d(*operands, **options)
    grad = torch.randn_like(out)
    expected = gradients(out, grad, *operands)
    for operand, learn in zip(operands, learns, strict=True):
        operand.requires_grad_(bool(learn))
    fk.pdc2d(*operands, **options).backward(grad)
    for operand, learn, value in zip(operands, learns, expected, strict=True):
        assert (operand.grad is not None) == bool(learn)
        if operand.grad is not None:
            torch.testing.assert_close(operand.grad, value)


@pytest.mark.kernels
@pytest.mark.parametrize(("need_dx", "need_dw"), [(True, False), (False, True), (False, False)])
def test_unneeded_outputs_of_the_operator_are_empty(ops: Any, need_dx: bool, need_dw: bool) -> None:
    x, weight, grad = torch.randn(2, 3, 5, 6), torch.randn(3, 1, 3, 3), torch.randn(2, 3, 5, 6)
    options = (int(Kind.ANGULAR), 1.0, [1, 1], [1, 1], [1, 1])
    full = ops.pdc2d_depthwise_backward(grad, x, weight, *options, True, True)
    part = ops.pdc2d_depthwise_backward(grad, x, weight, *options, need_dx, need_dw)
    for value, expected, needed in zip(part, full, (need_dx, need_dw, need_dw), strict=True):
        assert torch.equal(value, expected) if needed else value.shape == (0,)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", ["expanded", "transposed", "sliced", "other layout"])
def test_gradients_that_are_views(device: torch.device, kind: str, layout: str, view: str) -> None:
    x = leaf(2, 5, 6, 7, layout=layout, device=device)
    weight = leaf(5, 1, 3, 3, device=device)
    grad = {
        "expanded": torch.randn((), device=device).expand(2, 5, 6, 7),
        "transposed": torch.randn(2, 5, 7, 6, device=device).mT,
        "sliced": torch.randn(2, 6, 8, 9, device=device)[:, 1:, 2:, 2:],
        "other layout": torch.randn(2, 6, 7, 5, device=device).permute(0, 3, 1, 2)
        if layout == "nchw"
        else torch.randn(2, 5, 6, 7, device=device),
    }[view]
    exact = doubles(x, weight)
    options: dict[str, Any] = {"kind": kind, "padding": 1, "groups": 5}
    ours = gradients(fk.pdc2d(x, weight, **options), grad, x, weight)
    expected = gradients(reference.pdc2d(*exact, **options), grad, *exact)
    torch.testing.assert_close([t.double() for t in ours], list(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_keep_the_layout(device: torch.device, layout: str) -> None:
    x = leaf(2, 5, 6, 7, layout=layout, device=device)
    weight = leaf(5, 1, 3, 3, device=device)
    dx, dw = gradients(
        fk.pdc2d(x, weight, kind="radial", padding=1, groups=5),
        torch.ones(2, 5, 6, 7, device=device),
        x,
        weight,
    )
    assert_layout(dx, layout)
    assert_layout(dw, "nchw")


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_bit_for_bit(
    backend: str, device: torch.device, threads: None, kind: str, dtype: torch.dtype, layout: str
) -> None:
    """Whatever the number of threads; the images are large enough to be shared out."""
    height, width = (10, 17) if is_slow(backend) else (64, 65)
    x = leaf(3, 9, height, width, layout=layout, dtype=dtype, device=device)
    weight, bias = leaf(9, 1, 3, 3, dtype=dtype, device=device), leaf(9, dtype=dtype, device=device)
    grad = torch.randn(3, 9, height, width, device=device)
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        out = fk.pdc2d(x, weight, bias, kind=kind, theta=0.7, padding=1, groups=9)
        results.append((out, *gradients(out, grad, x, weight, bias)))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_does_not_see_its_batch(device: torch.device, kind: str, layout: str) -> None:
    x = leaf(5, 9, 20, 33, layout=layout, device=device)
    weight = leaf(9, 1, 3, 3, device=device)
    grad = torch.randn(5, 9, 20, 33, device=device)
    options: dict[str, Any] = {"kind": kind, "padding": 1, "groups": 9}
    out = fk.pdc2d(x, weight, **options)
    (dx,) = gradients(out, grad, x)
    sample = x[3:4].detach().requires_grad_()
    alone = fk.pdc2d(sample, weight, **options)
    assert torch.equal(alone, out[3:4])
    assert torch.equal(gradients(alone, grad[3:4], sample)[0], dx[3:4])


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_gradients_pass(device: torch.device, special: float, layout: str) -> None:
    """They spoil what they spoil in eager, whose two convolutions turn more of it into inf - inf."""
    x, weight = leaf(1, 3, 9, 9, layout=layout, device=device), leaf(3, 1, 3, 3, device=device)
    grad = torch.randn(1, 3, 9, 9, device=device)
    grad[0, 1, 4, 4] = special
    options: dict[str, Any] = {"kind": "central", "theta": 0.7, "padding": 1, "groups": 3}
    dx, dw = gradients(fk.pdc2d(x, weight, **options), grad, x, weight)
    (baseline,) = gradients(eager(x, weight, **options), grad, x)
    finite = baseline.isfinite()
    assert torch.equal(dx.isfinite(), finite)
    torch.testing.assert_close(dx[finite], baseline[finite], rtol=1e-5, atol=1e-4)
    exact = doubles(x, weight)
    (exact_dw,) = gradients(reference.pdc2d(*exact, **options), grad, exact[1])
    torch.testing.assert_close(dw.double(), exact_dw, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [5, 17])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_infinite_pixel_at_the_border_spoils_only_its_own_sums(
    device: torch.device, kind: str, width: int, layout: str
) -> None:
    """In the last column of a row that fills no vector, whose lanes beyond the row must not count."""
    x = torch.randn(1, 3, 8, width, device=device)
    x[0, 1, 7, width - 1] = float("inf")
    x = x.contiguous(memory_format=LAYOUTS[layout])
    weight = leaf(3, 1, 3, 3, device=device)
    grad = torch.randn(1, 3, 8, width, device=device)
    (dw,) = gradients(fk.pdc2d(x, weight, kind=kind, padding=1, groups=3), grad, weight)
    x_exact, weight_exact = doubles(x, weight)
    exact = reference.pdc2d(x_exact, weight_exact, kind=kind, padding=1, groups=3)
    (exact_dw,) = gradients(exact, grad, weight_exact)
    torch.testing.assert_close(dw.double(), exact_dw, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_gradient_penalty(device: torch.device) -> None:
    """|dy/dx|^2 as a loss, in float32 against float64."""
    x, weight = leaf(2, 4, 6, 7, device=device), leaf(4, 1, 3, 3, device=device)
    results = []
    for function, operands in ((fk.pdc2d, (x, weight)), (reference.pdc2d, doubles(x, weight))):
        out = function(*operands, kind="angular", padding=1, groups=4).square().sum()
        (dx,) = torch.autograd.grad(out, operands[0], create_graph=True)
        results.append([t.double() for t in torch.autograd.grad(dx.square().sum(), operands)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)
