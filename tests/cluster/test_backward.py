"""Gradients of the clustering and of the ICM: finite differences, float64, 16 bit against the eager form."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import frd_kernels as fk

from ..backends import is_slow
from .cases import (
    VARIANTS,
    Case,
    Grid,
    clear_case,
    clear_tokens,
    map_projections,
    on_device,  # noqa: F401  an autouse fixture
    run_icm,
)

OP = "icm"

AGGREGATES = ["count", "similarity"]
# Between the best similarities: finite differences of 1e-6 cross no tie.
WIDE = 1e-4
ROUNDS: list[tuple[Grid, Grid]] = [((3, 4), (2, 2)), ((5, 3), (2, 2)), ((3, 3), (4, 4)), ((4, 1), (1, 1))]


@pytest.mark.parametrize(("hw", "grid"), ROUNDS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_cluster_gradcheck(backend: str, aggregate: str, hw: Grid, grid: Grid) -> None:
    k, v = clear_tokens(hw, grid, 3, torch.float64, WIDE)
    gates = [torch.tensor(1.4, dtype=torch.float64), torch.tensor([-0.3], dtype=torch.float64)]
    weighted = aggregate == "similarity"

    def f(k: torch.Tensor, v: torch.Tensor, *gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        options = dict(zip(("alpha", "beta"), gates, strict=weighted))
        found = fk.cluster(k, v, grid, hw, aggregate=aggregate, **options)
        return found.centres, found.similarity

    assert gradcheck(
        f, [t.requires_grad_() for t in (k, v, *gates[: 2 * weighted])], fast_mode=is_slow(backend, OP)
    )


ICMS = [
    Case((3, 4), [(2, 2)], 3, "none"),
    Case((4, 3), [(3, 2), (2, 1)], 3, "biases"),
    Case((3, 3), [(2, 2), (1, 2)], 2, "no biases"),
    Case((3, 4), [(3, 3), (2, 2), (2, 1)], 3, "mixed"),
    Case((2, 3), [(3, 3), (2, 3), (2, 2), (2, 1)], 4, "mixed"),
]


@pytest.mark.parametrize("case", ICMS, ids=lambda case: f"{len(case.grids)}-{case.projected}")
@pytest.mark.parametrize("variant", VARIANTS)
def test_icm_gradcheck(backend: str, variant: str, case: Case) -> None:
    x, maps, options = clear_case(case, variant, torch.float64, clear=WIDE)
    inputs = [x]
    map_projections(lambda p: inputs.append(p) or p, maps)
    inputs += [options[name].double() for name in ("alpha", "beta")]

    def f(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        rest = iter(parameters)
        made = map_projections(lambda _: next(rest), maps)
        return fk.icm(x, made, **options | {"alpha": next(rest), "beta": next(rest)})

    assert gradcheck(f, [t.requires_grad_() for t in inputs], fast_mode=is_slow(backend, OP))


def run_cluster(
    k: torch.Tensor, v: torch.Tensor, hw: Grid, grid: Grid, aggregate: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Centres and similarities computed in `dtype`, and the gradients of k, v, alpha and beta."""
    inputs = [t.to(dtype).detach().requires_grad_() for t in (k, v)]
    inputs += [torch.tensor(value, requires_grad=True) for value in (1.5, -0.25)]
    found = fk.cluster(*inputs[:2], grid, hw, aggregate=aggregate, alpha=inputs[2], beta=inputs[3])
    loss = (
        found.centres * torch.linspace(-1, 1, k.size(2), dtype=dtype)
    ).sum() + found.similarity.sin().sum()
    return [*found[::2], *torch.autograd.grad(loss, inputs, materialize_grads=True)]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    """Within `tolerance` of the largest element of each."""
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        largest = b.abs().max().item() if b.numel() > 0 else 0.0
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=0,
            atol=tolerance * largest,
            msg=lambda m, n=number: f"tensor {n}: {m}",
        )


@pytest.mark.parametrize(("hw", "grid", "channels"), [((20, 17), (3, 2), 40), ((13, 11), (5, 4), 7)])
@pytest.mark.parametrize("layout", ["tokens", "image"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_cluster_gradients(
    backend: str, aggregate: str, layout: str, hw: Grid, grid: Grid, channels: int
) -> None:
    k, v = clear_tokens(hw, grid, channels, torch.float32, 1e-5)
    if layout == "image":
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    found = run_cluster(k, v, hw, grid, aggregate, torch.float32)
    with fk.use_backend("reference"):
        wanted = run_cluster(k, v, hw, grid, aggregate, torch.float64)
    assert_same(found, wanted, 1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case((20, 17), [(8, 8), (4, 4), (2, 1)], 10, "biases"),
        Case((13, 11), [(3, 5), (2, 2)], 7, "none"),
        Case((8, 8), [(4, 4), (2, 1)], 70, "mixed"),
        Case((6, 5), [(4, 4), (3, 2), (2, 2), (1, 2)], 33, "no biases"),
        Case((5, 4), [(3, 2), (2, 1)], 40, "biases"),  # rows of whole 16 bytes
    ],
    ids=lambda case: f"{case.hw}-{case.projected}",
)
@pytest.mark.parametrize("layout", ["tokens", "image"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_icm_gradients(backend: str, variant: str, layout: str, case: Case) -> None:
    x, maps, options = clear_case(case, variant, layout=layout)
    found = run_icm(x, maps, options)
    with fk.use_backend("reference"):
        wanted = run_icm(x.double(), map_projections(torch.Tensor.double, maps), options)
    assert_same(found, wanted, 1e-4)


CALLS = {
    "cluster": lambda k, v: fk.cluster(k, v, (2, 2), (5, 7), aggregate="similarity"),
    "icm": lambda x, w: (fk.icm(x, [(w, None, w, None)], alpha=0.5, beta=0.0, grids=[(2, 2)], hw=(5, 7)),),
}


def two_inputs(name: str) -> list[torch.Tensor]:
    second = torch.randn(2, 35, 6) if name == "cluster" else torch.randn(6, 6)
    return [torch.randn(2, 35, 6).requires_grad_(), second.requires_grad_()]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("asked", [0, 1])
def test_some_inputs_need_no_gradient(backend: str, name: str, asked: int) -> None:
    inputs = two_inputs(name)
    wanted = torch.autograd.grad(CALLS[name](*inputs)[0].sin().sum(), inputs)[asked]
    inputs[1 - asked].requires_grad_(False)
    CALLS[name](*inputs)[0].sin().sum().backward()
    assert inputs[1 - asked].grad is None
    torch.testing.assert_close(inputs[asked].grad, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("used", ["centres", "similarity"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_one_result_of_a_cluster_is_used(backend: str, aggregate: str, used: str) -> None:
    k, v = two_inputs("cluster")
    found = fk.cluster(k, v, (2, 2), (5, 7), aggregate=aggregate)
    zero = (found.similarity if used == "centres" else found.centres).mul(0).sum()
    loss = getattr(found, used).sin().sum()
    wanted = torch.autograd.grad(loss + zero, (k, v), retain_graph=True)
    grads = torch.autograd.grad(loss, (k, v), materialize_grads=True)
    assert_same(list(grads), list(wanted), 1e-6)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("layout", ["permuted", "expanded", "expanded channels", "sliced", "batch reversed"])
def test_gradients_of_any_strides(backend: str, name: str, layout: str) -> None:
    inputs = two_inputs(name)
    out = CALLS[name](*inputs)[0]
    batch, rows, channels = out.shape
    grad = {
        "permuted": lambda: torch.randn(channels, batch, rows).permute(1, 2, 0),
        "expanded": lambda: torch.randn(1, 1, channels).expand(out.shape),
        "expanded channels": lambda: torch.randn(batch, rows, 1).expand(out.shape),
        "sliced": lambda: torch.randn(batch, 2 * rows, channels + 3)[:, ::2, 1 : channels + 1],
        "batch reversed": lambda: torch.randn(batch, channels, rows).transpose(1, 2).flip(0),
    }[layout]()
    found = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    wanted = torch.autograd.grad(out, inputs, grad.contiguous().clone())
    assert_same(list(found), list(wanted), 1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_double_backward_says_that_it_is_not_supported(name: str) -> None:
    inputs = two_inputs(name)
    (grad,) = torch.autograd.grad(CALLS[name](*inputs)[0].sin().sum(), inputs[0], create_graph=True)
    with pytest.raises(
        NotImplementedError, match=rf"{name}: double backward is not .*use_backend\('reference'\)"
    ):
        grad.square().sum().backward()
    with fk.use_backend("reference"):
        (again,) = torch.autograd.grad(CALLS[name](*inputs)[0].sin().sum(), inputs[0], create_graph=True)
    torch.testing.assert_close(again, grad, rtol=1e-5, atol=1e-6)
    again.square().sum().backward()
    assert inputs[0].grad is not None and inputs[0].grad.isfinite().all()
