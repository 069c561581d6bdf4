"""The Triton backward of the clustering by itself: on what the CPU's forward saved, against the CPU's backward."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch

import frd_kernels as fk
from frd_kernels import _triton
from frd_kernels.cluster.reference import compute_dtype

from .. import backends
from .cases import PROJECTIONS, Grid, laid_out, map_projections, projections

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or not _triton.INTERPRETED,
        reason="needs triton's interpreter",
    ),
]

CPU = torch.ops.frd
TRITON = getattr(torch.ops, _triton.NAMESPACE)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Of two results in float32 sums that cancel, and in 16 bit those of the projected keys' gradients as well.
ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 2e-2}
NAN = float("nan")


def assert_close(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    """Each tensor within a few roundings of its largest element, laid out alike; alpha's and beta's behind them, sums
    over all tokens that cancel, in float32 within 1e-3."""
    last = len(found) - 2
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), f"tensor {number}"
        if a.numel():
            tolerance = 1e-3 if number >= last and a.dtype == torch.float32 else ROUNDING[dtype]
            torch.testing.assert_close(
                a.double(),
                b.double(),
                rtol=0,
                atol=tolerance * b.double().abs().max().item(),
                msg=lambda m, n=number: f"tensor {n}: {m}",
            )


def gates(dtype: torch.dtype, *values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=compute_dtype(dtype))


def cluster_arguments(
    k: torch.Tensor, v: torch.Tensor, hw: Grid, grid: Grid, aggregate: int, mask: torch.Tensor | None = None
) -> tuple[Any, ...]:
    """Those of `cluster_backward`."""
    gate, sizes = (gates(k.dtype, 1.5), gates(k.dtype, -0.25)), ([*grid], [*hw], aggregate)
    centres, labels, similarity, _, saved = CPU.cluster(k, v, mask, *gate, *sizes)
    grads = torch.randn(centres.shape).to(k.dtype), torch.randn_like(similarity)
    return (*grads, k, v, *gate, labels, saved, *sizes)


CLUSTERS: list[tuple[Grid, Grid, int]] = [
    ((1, 1), (1, 1), 3),
    ((20, 17), (3, 2), 40),
    ((13, 11), (5, 4), 7),
    ((7, 23), (4, 4), 33),
    ((33, 32), (32, 32), 5),
]


def some(*axes: Any) -> Any:
    """Combinations of the axes: a few of them in the interpreter, else all."""
    return backends.share("triton", list(itertools.product(*axes)))


@pytest.mark.parametrize(
    ("aggregate", "dtype", "layout", "case"), some([0, 1], DTYPES, ["tokens", "image"], CLUSTERS)
)
def test_cluster(aggregate: int, dtype: torch.dtype, layout: str, case: tuple[Grid, Grid, int]) -> None:
    hw, grid, channels = case
    shape = (2, hw[0] * hw[1], channels)
    k, v = laid_out(shape, dtype, layout), laid_out(shape, dtype, "tokens")
    if hw == (1, 1):  # its cosine is 1 whatever it is: the gradient is what roundings leave
        k = k * 0
    arguments = cluster_arguments(k, v, hw, grid, aggregate)
    assert_close(TRITON.cluster_backward(*arguments), CPU.cluster_backward(*arguments), dtype)


@pytest.mark.parametrize("poison", [0.0, NAN])
@pytest.mark.parametrize("aggregate", [0, 1])
def test_masked_tokens(aggregate: int, poison: float) -> None:
    """They are as if their keys, values and gradients did not exist, whatever those hold."""
    k, v = laid_out((2, 63, 6), torch.float32, "image"), torch.randn(2, 63, 6)
    mask = torch.rand(2, 63) > 0.4
    mask[1, :18] = False  # a row of bins without tokens
    k[~mask], v[~mask] = poison, poison
    arguments = cluster_arguments(k, v, (7, 9), (3, 2), aggregate, mask)
    arguments[1][~mask] = poison
    found = TRITON.cluster_backward(*arguments)
    assert_close(found, CPU.cluster_backward(*arguments), torch.float32)
    assert (found[0][~mask] == 0).all() and (found[1][~mask] == 0).all()
    assert all(grad.isfinite().all() for grad in found)


@pytest.mark.parametrize("aggregate", [0, 1])
def test_all_tokens_masked(aggregate: int) -> None:
    k, v = torch.full((2, 2, 35, 6), NAN)
    arguments = cluster_arguments(k, v, (5, 7), (2, 2), aggregate, torch.zeros(2, 35, dtype=torch.bool))
    assert all((grad == 0).all() for grad in TRITON.cluster_backward(*arguments))


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("aggregate", [0, 1])
def test_a_key_that_is_not_finite_stays_in_its_cluster(aggregate: int, value: float) -> None:
    k, v = torch.randn(2, 2, 300, 6)
    arguments = list(cluster_arguments(k, v, (20, 15), (3, 2), aggregate))
    arguments[2] = k.clone()
    arguments[2][1, 150, 3] = value  # after the forward pass: the labels are those of finite keys
    found, wanted = TRITON.cluster_backward(*arguments)[0], CPU.cluster_backward(*arguments)[0]
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
    assert not found[1, 150].isfinite().all() and found[1].isfinite().any() and found[0].isfinite().all()


ICMS: list[tuple[Grid, list[int], int, str]] = [
    ((5, 7), [3, 2], 6, "none"),
    ((20, 17), [8, 8, 4, 4, 2, 1], 10, "biases"),
    ((6, 5), [4, 4, 3, 2, 2, 2, 1, 2], 33, "mixed"),
    ((13, 11), [3, 5, 5, 4], 17, "no biases"),
]


def icm_arguments(
    x: torch.Tensor, hw: Grid, grids: list[int], projected: str, variant: int
) -> tuple[Any, ...]:
    """Those of `icm_backward`."""
    assert projected in PROJECTIONS
    rounds, channels = len(grids) // 2, x.size(2)
    maps: list[torch.Tensor] = []
    for entry in projections(projected, rounds, channels, x.dtype):
        if entry is None:
            maps += [x.new_empty(0) for _ in range(4)]
        else:
            maps += [x.new_zeros(channels) if part is None else part for part in entry]
    alpha, beta = gates(x.dtype, 0.125), gates(x.dtype, -0.25)
    if variant == 1:
        alpha, beta = gates(x.dtype, 1.5, 0.75, -0.5, 2.0)[:rounds], gates(x.dtype, 0.25)[:1].expand(rounds)
    out, labels, saved = CPU.icm(x, maps, alpha, beta, grids, [*hw], variant)
    grad = torch.randn(out.shape).to(out.dtype)
    return grad, x, maps, alpha, beta, labels, saved, grids, [*hw], variant


def flat(grads: Any) -> list[torch.Tensor]:
    return [grads[0], *grads[1], *grads[2:]]


@pytest.mark.parametrize(
    ("variant", "dtype", "layout", "case"), some([0, 1], DTYPES, ["tokens", "image"], ICMS)
)
def test_icm(variant: int, dtype: torch.dtype, layout: str, case: tuple[Grid, list[int], int, str]) -> None:
    hw, grids, channels, projected = case
    x = laid_out((2, hw[0] * hw[1], channels), dtype, layout)
    arguments = icm_arguments(x, hw, grids, projected, variant)
    assert_close(flat(TRITON.icm_backward(*arguments)), flat(CPU.icm_backward(*arguments)), dtype)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_icm_against_autograd(variant: str) -> None:
    """The reference's own derivative in float64."""
    x, maps = torch.randn(2, 35, 5, dtype=torch.float64), projections("mixed", 3, 5, torch.float64)
    options: dict[str, Any] = {"variant": variant, "alpha": 0.7, "beta": 0.2, "hw": (5, 7)}
    options["grids"] = [(3, 3), (2, 2), (2, 1)]

    def gradients() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_()]
        made = map_projections(lambda p: leaves.append(p.clone().requires_grad_()) or leaves[-1], maps)
        return list(torch.autograd.grad(fk.icm(leaves[0], made, **options).sin().sum(), leaves))

    with fk.use_backend("triton"):
        found = gradients()
    with fk.use_backend("reference"):
        wanted = gradients()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", [0, 1], ids=["paper", "released"])
def test_bits_repeat_and_do_not_depend_on_the_batch(variant: int) -> None:
    x = laid_out((3, 340, 10), torch.float32, "image")
    arguments = icm_arguments(x, (20, 17), [8, 8, 4, 4, 2, 1], "biases", variant)
    first = flat(TRITON.icm_backward(*arguments))
    assert all(torch.equal(a, b) for a, b in zip(first, flat(TRITON.icm_backward(*arguments)), strict=True))
    for b in range(3):
        alone = [arguments[i][b : b + 1] if i in (0, 1, 5, 6) else arguments[i] for i in range(10)]
        assert torch.equal(TRITON.icm_backward(*alone)[0], first[0][b : b + 1])


@pytest.mark.parametrize("variant", [0, 1], ids=["paper", "released"])
def test_empty_batch(variant: int) -> None:
    arguments = icm_arguments(torch.empty(0, 35, 6), (5, 7), [3, 2, 2, 1], "mixed", variant)
    assert all((grad == 0).all() for grad in flat(TRITON.icm_backward(*arguments)))
    k = torch.empty(0, 35, 6)
    found = TRITON.cluster_backward(*cluster_arguments(k, k, (5, 7), (2, 2), 1))
    assert [list(grad.shape) for grad in found] == [[0, 35, 6], [0, 35, 6], [1], [1]]


def dispatched(centres: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
    """Restated: the own centre times the similarity, 0 for label -1."""
    own = centres.gather(1, labels.clamp_min(0).long().unsqueeze(2).expand(-1, -1, centres.size(2)))
    return torch.where((labels >= 0).unsqueeze(2), similarity.unsqueeze(2) * own, 0.0)


@pytest.mark.parametrize(
    ("dtype", "sizes", "channels_first"),
    some(DTYPES, [(35, 4, 6), (340, 70, 33), (1, 1, 3)], [False, True]),
)
def test_dispatch(dtype: torch.dtype, sizes: tuple[int, int, int], channels_first: bool) -> None:
    tokens, count, channels = sizes
    centres = torch.randn(2, count, channels).to(dtype)
    labels = torch.randint(-1, count, (2, tokens), dtype=torch.int32)
    similarity = torch.randn(2, tokens, dtype=compute_dtype(dtype))
    out = TRITON.cluster_dispatch(centres, labels, similarity, channels_first)
    leaves = [centres.double().requires_grad_(), similarity.double().requires_grad_()]
    wanted = dispatched(leaves[0], labels, leaves[1])
    assert out.dtype == dtype and (out.stride(1) == 1 or not channels_first or channels == 1)
    subnormal = 2.0**-24 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(out.double(), wanted.detach(), rtol=ROUNDING[dtype], atol=subnormal)
    grad = laid_out((2, tokens, channels), dtype, "image" if channels_first else "tokens")
    found = TRITON.cluster_dispatch_backward(grad, centres, labels, similarity)
    exact = torch.autograd.grad(wanted, leaves, grad.double())
    for a, b, like in zip(found, exact, (centres, similarity), strict=True):
        assert a.dtype == like.dtype and a.shape == like.shape
        size = b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=0, atol=ROUNDING[dtype] * size)


def test_a_nan_in_a_dispatched_gradient_stays_in_its_cluster() -> None:
    centres, similarity = torch.randn(1, 4, 6), torch.rand(1, 35)
    labels = torch.arange(35, dtype=torch.int32).remainder(5).sub(1).unsqueeze(0)
    grad = torch.randn(1, 35, 6)
    grad[0, [2, 5], 3] = NAN  # of label 1, and of none
    grad_centres, grad_similarity = TRITON.cluster_dispatch_backward(grad, centres, labels, similarity)
    spoiled = torch.zeros(4, 6, dtype=torch.bool)
    spoiled[1, 3] = True
    assert torch.equal(grad_centres[0].isnan(), spoiled)
    assert grad_similarity[0].isnan().nonzero().flatten().tolist() == [2] and grad_similarity[0, 5] == 0
