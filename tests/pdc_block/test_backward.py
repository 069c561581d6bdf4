"""Gradients of the fused block: finite differences, the oracle in float64, bit-for-bit repetition."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import frd_kernels as fk
from frd_kernels import reference

from ..backends import is_slow, subset
from ..pdc.cases import (
    KINDS,
    LAYOUTS,
    assert_layout,
    block_operands,
    eager_block,
    in_double,
    off_the_kink,
    worst,
)

OP = "pdc_block"

# batch, in and out channels, height, width, options
CASES: list[tuple[int, int, int, int, int, dict[str, Any]]] = [
    (1, 1, 1, 1, 1, {}),
    (2, 3, 5, 1, 7, {}),
    (2, 17, 8, 17, 31, {}),
    (1, 17, 49, 9, 13, {"stride": 2, "dilation": 2}),
    (1, 64, 64, 5, 6, {"stride": (2, 1)}),
    (1, 2, 1, 3, 200, {}),
    (3, 5, 7, 40, 33, {"stride": (1, 2), "dilation": 3}),  # more tiles than partial sums
    (1, 400, 6, 3, 3, {}),
]


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def learning(operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: operand.requires_grad_() for name, operand in operands.items()}


def gradients(
    out: torch.Tensor, grad: torch.Tensor, operands: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(out, list(operands.values()), grad.to(out.dtype))
    return dict(zip(operands, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"stride": (2, 1), "dilation": 2}], ids=str)
def test_finite_differences(kind: str, layout: str, options: dict[str, Any]) -> None:
    draw = partial(block_operands, 1, 3, 2, 3, 4, dtype=torch.float64, layout=layout, **options)
    operands = learning(off_the_kink(draw, kind=kind, theta=0.7, **options))

    def f(*values: torch.Tensor) -> torch.Tensor:
        return fk.pdc_block(**dict(zip(operands, values, strict=True)), kind=kind, theta=0.7, **options)

    assert gradcheck(f, tuple(operands.values()))
    assert gradgradcheck(f, tuple(operands.values()))


@pytest.mark.parametrize("absent", [("pdc_bias",), ("point_bias", "residual")], ids=str)
@pytest.mark.parametrize("groups", [2, 1], ids=["depthwise", "dense"])
def test_finite_differences_without(absent: tuple[str, ...], groups: int) -> None:
    def draw() -> dict[str, torch.Tensor]:
        operands = block_operands(1, 2, 2, 3, 3, groups=groups, dtype=torch.float64)
        return {name: operand for name, operand in operands.items() if name not in absent}

    operands = learning(off_the_kink(draw, kind="angular"))

    def f(*values: torch.Tensor) -> torch.Tensor:
        return fk.pdc_block(**dict(zip(operands, values, strict=True)), kind="angular")

    assert gradcheck(f, tuple(operands.values()))
    assert gradgradcheck(f, tuple(operands.values()), fast_mode=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_oracle(
    backend: str, device: torch.device, kind: str, dtype: torch.dtype, layout: str
) -> None:
    eps = torch.finfo(dtype).eps
    for batch, channels, filters, height, width, options in subset(backend, CASES):
        shape = (batch, channels, filters, height, width)
        draw = partial(block_operands, *shape, dtype=dtype, layout=layout, device=device, **options)
        operands = learning(off_the_kink(draw, kind=kind, theta=0.7, **options))
        exact_operands = in_double(operands)
        out = fk.pdc_block(**operands, kind=kind, theta=0.7, **options)
        grad = torch.randn_like(out)
        ours = gradients(out, grad, operands)
        exact_out = reference.pdc_block(**exact_operands, kind=kind, theta=0.7, **options)
        exact = gradients(exact_out, grad, exact_operands)
        for name, gradient in ours.items():
            scale = exact[name].abs().max().item() + 10  # sums of terms of order 1 to 10 that cancel
            assert gradient.dtype == dtype
            assert worst(gradient, exact[name]) <= 64 * eps * scale, name


def test_more_channels_than_a_block(device: torch.device) -> None:
    """Forward and backward: a block of Triton has up to 128 channels and filters, in the interpreter too."""
    draw = partial(block_operands, 1, 131, 130, 3, 4, device=device)
    operands = learning(off_the_kink(draw, kind="central"))
    exact_operands = in_double(operands)
    out, exact = (f.pdc_block(**o, kind="central") for f, o in ((fk, operands), (reference, exact_operands)))
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(out)
    found, truth = gradients(out, grad, operands), gradients(exact, grad, exact_operands)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), truth[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_precision_errs_at_most_twice_as_much_as_eager(
    device: torch.device, kind: str, dtype: torch.dtype, layout: str
) -> None:
    draw = partial(block_operands, 2, 16, 24, 14, 14, dtype=dtype, device=device, layout=layout)
    operands = learning(off_the_kink(draw, kind=kind))
    exact_operands = in_double(operands)
    grad = torch.randn(2, 24, 14, 14, device=device).to(dtype)
    exact = gradients(reference.pdc_block(**exact_operands, kind=kind), grad, exact_operands)
    ours = gradients(fk.pdc_block(**operands, kind=kind), grad, operands)
    baseline = gradients(eager_block(**operands, kind=kind), grad, operands)
    for name, gradient in ours.items():
        assert worst(gradient, exact[name]) <= 2 * worst(baseline[name], exact[name]), name


@pytest.mark.parametrize("groups", [4, 1], ids=["depthwise", "dense"])
@pytest.mark.parametrize("name", ["x", "pdc_weight", "point_weight", "pdc_bias", "point_bias", "residual"])
def test_only_what_learns_gets_a_gradient(device: torch.device, groups: int, name: str) -> None:
    operands = learning(block_operands(2, 4, 4, 5, 6, groups=groups, device=device))
    out = fk.pdc_block(**operands, kind="angular")
    grad = torch.randn_like(out)
    expected = gradients(out, grad, operands)[name]
    for other, operand in operands.items():
        operand.requires_grad_(other == name)
    fk.pdc_block(**operands, kind="angular").backward(grad)
    assert [other for other, operand in operands.items() if operand.grad is not None] == [name]
    torch.testing.assert_close(operands[name].grad, expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", ["expanded", "transposed", "sliced", "channels_last"])
def test_gradients_that_are_views(device: torch.device, layout: str, view: str) -> None:
    draw = partial(block_operands, 2, 5, 4, 6, 7, device=device, layout=layout)
    operands = learning(off_the_kink(draw, kind="radial"))
    exact_operands = in_double(operands)
    grad = {
        "expanded": torch.randn((), device=device).expand(2, 4, 6, 7),
        "transposed": torch.randn(2, 4, 7, 6, device=device).mT,
        "sliced": torch.randn(2, 6, 8, 9, device=device)[:, 2:, 2:, 2:],
        "channels_last": torch.randn(2, 6, 7, 4, device=device).permute(0, 3, 1, 2),
    }[view]
    ours = gradients(fk.pdc_block(**operands, kind="radial"), grad, operands)
    exact = gradients(reference.pdc_block(**exact_operands, kind="radial"), grad, exact_operands)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient.double(), exact[name], rtol=1e-5, atol=1e-4)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_keep_the_layout(device: torch.device, layout: str) -> None:
    operands = learning(block_operands(2, 5, 4, 6, 7, device=device, layout=layout))
    out = fk.pdc_block(**operands, kind="central")
    found = gradients(out, torch.ones_like(out), operands)
    assert_layout(found["x"], layout)
    assert_layout(found["pdc_weight"], "nchw")
    assert found["point_weight"].is_contiguous()


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["angular", "radial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeats_bit_for_bit(
    backend: str, device: torch.device, threads: None, kind: str, dtype: torch.dtype, layout: str
) -> None:
    """Whatever the number of threads."""
    size = (10, 17) if is_slow(backend) else (40, 41)
    operands = learning(block_operands(3, 9, 12, *size, dtype=dtype, device=device, layout=layout))
    grad = torch.randn(3, 12, *size, device=device)
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        out = fk.pdc_block(**operands, kind=kind, theta=0.7)
        results.append([out, *gradients(out, grad, operands).values()])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "dilation": 2}], ids=str)
def test_a_sample_does_not_see_its_batch(
    backend: str, device: torch.device, layout: str, options: dict[str, Any]
) -> None:
    operands = learning(block_operands(5, 9, 12, 20, 33, device=device, layout=layout, **options))
    out = fk.pdc_block(**operands, kind="angular", **options)
    grad = torch.randn_like(out)
    dx = gradients(out, grad, operands)["x"]
    single = dict(operands)
    for name in ("x", "residual"):
        single[name] = operands[name][3:4].detach().requires_grad_()
    alone = fk.pdc_block(**single, kind="angular", **options)
    assert torch.equal(alone, out[3:4])
    found = gradients(alone, grad[3:4], single)["x"]
    if backend.startswith("cuda_chain"):
        # The library orders the sums of a product by its size.
        torch.testing.assert_close(found, dx[3:4], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, dx[3:4])


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_gradients_pass(device: torch.device, special: float, layout: str) -> None:
    """They spoil the gradient of x where they do in eager, and pass through no closed ReLU."""
    operands = learning(block_operands(1, 3, 4, 9, 9, device=device, layout=layout))
    grad = torch.randn(1, 4, 9, 9, device=device)
    grad[0, 1, 4, 4] = special
    found = gradients(fk.pdc_block(**operands, kind="central"), grad, operands)
    baseline = gradients(eager_block(**operands, kind="central"), grad, operands)
    finite = baseline["x"].isfinite()
    assert torch.equal(found["x"].isfinite(), finite)
    torch.testing.assert_close(found["x"][finite], baseline["x"][finite], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["point_bias"], baseline["point_bias"], equal_nan=True)
    assert torch.equal(found["residual"], grad) or special != special


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_special_values_pass_in_the_second_derivative(special: float) -> None:
    """A closed ReLU holds an infinity back; it does not turn it into 0 * inf."""
    operands = learning(block_operands(1, 3, 4, 7, 7, dtype=torch.float64))
    with torch.no_grad():
        operands["x"][0, 1, 3, 3] = special
    names = ("x", "pdc_weight", "pdc_bias", "point_weight")
    directions = [torch.randn_like(operands[name]) for name in names]
    grad = torch.randn(1, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (fk.pdc_block, reference.pdc_block):
        out = function(**operands, kind="vanilla")
        first = torch.autograd.grad(out, [operands[name] for name in names], grad, create_graph=True)
        results.append(torch.autograd.grad(first, grad, directions)[0])
    torch.testing.assert_close(results[0], results[1], equal_nan=True)
    assert results[0].isfinite().any()
