"""Tokens that take no part in a round of clustering, and the sign of alpha in the counted round."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import frd_kernels as fk
from frd_kernels.cluster.reference import cosines

from .. import backends
from ..backends import is_slow
from .cases import (
    CLEAR,
    Grid,
    gap,
    laid_out,
    on_device,  # noqa: F401  an autouse fixture
    scattered,
)

OP = "cluster"

AGGREGATES = ["count", "similarity"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")
ROUNDING = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 1e-12}
# image, grid, channels
DISTINCT: list[tuple[Grid, Grid, int]] = [
    ((4, 6), (2, 3), 5),
    ((5, 7), (3, 4), 16),
    ((13, 11), (3, 3), 24),
    ((24, 20), (8, 8), 32),
]
CASES = [*DISTINCT[:3], ((3, 2), (4, 5), 3), ((1, 1), (1, 1), 2)]


def plain_round(
    k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, hw: Grid, grid: Grid, weigh: Callable[[Any], Any]
) -> tuple[list[Any], list[int], list[float]]:
    """One sample by the equations, over the tokens that take part: centres, labels, cosines."""
    kept = [n for n in range(len(k)) if mask[n]]
    bins = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            ys = range(i * hw[0] // grid[0], -(-(i + 1) * hw[0] // grid[0]))
            xs = range(j * hw[1] // grid[1], -(-(j + 1) * hw[1] // grid[1]))
            bins.append([y * hw[1] + x for y in ys for x in xs if y * hw[1] + x in kept])
    zero = torch.zeros_like(k[0])
    keys = [sum((k[n] for n in bin), zero) / max(len(bin), 1) for bin in bins]
    sums = [sum((v[n] for n in bin), zero) / max(len(bin), 1) for bin in bins]
    weight_sums, labels, own = [1.0] * len(bins), [-1] * len(k), [0.0] * len(k)
    for n in kept:
        found = [float(k[n] @ key / max(k[n].norm(), 1e-12) / max(key.norm(), 1e-12)) for key in keys]
        labels[n] = found.index(max(found))
        own[n] = found[labels[n]]
        weight = weigh(own[n])
        sums[labels[n]] = sums[labels[n]] + weight * v[n]
        weight_sums[labels[n]] += weight
    return [s / m for s, m in zip(sums, weight_sums, strict=True)], labels, own


@pytest.mark.parametrize(("hw", "grid", "channels"), CASES)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_is_the_equations(backend: str, aggregate: str, hw: Grid, grid: Grid, channels: int) -> None:
    k, v = torch.randn(2, 2, hw[0] * hw[1], channels, dtype=torch.float64)
    mask = torch.rand(2, hw[0] * hw[1]) < 0.6
    found = fk.cluster(k, v, grid, hw, aggregate=aggregate, alpha=1.5, beta=-0.3, mask=mask)
    assert found.labels.dtype == torch.int64 and found.counts.dtype == torch.int32

    def sigmoid(cosine: float) -> float:
        return 1 / (1 + math.exp(0.3 - 1.5 * cosine))

    for b in range(2):
        weigh = sigmoid if aggregate == "similarity" else lambda cosine: 1.0
        centres, labels, own = plain_round(k[b], v[b], mask[b], hw, grid, weigh)
        assert found.labels[b].tolist() == labels
        assert found.counts[b].tolist() == [labels.count(o) for o in range(len(centres))]
        torch.testing.assert_close(found.centres[b], torch.stack(centres), rtol=1e-12, atol=1e-12)
        if aggregate == "similarity":
            own = [sigmoid(c) if label >= 0 else 0.0 for c, label in zip(own, labels, strict=True)]
        wanted = torch.tensor(own, dtype=torch.float64)
        torch.testing.assert_close(found.similarity[b], wanted, rtol=1e-12, atol=1e-12)


def everything(
    k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, hw: Grid, grid: Grid, aggregate: str
) -> list[torch.Tensor]:
    """The results, and the gradients of k, v, alpha and beta."""
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    inputs = [
        t.detach().requires_grad_()
        for t in (k, v, torch.tensor(1.5).to(dtype), torch.tensor(-0.25).to(dtype))
    ]
    found = fk.cluster(
        inputs[0], inputs[1], grid, hw, aggregate=aggregate, alpha=inputs[2], beta=inputs[3], mask=mask
    )
    weights = torch.linspace(-1, 1, found.centres.numel(), dtype=dtype).view(found.centres.shape)
    loss = (found.centres.to(dtype) * weights).sum() + found.similarity.sin().sum()
    return [t.detach() for t in found] + list(torch.autograd.grad(loss, inputs, materialize_grads=True))


def clear_tokens(
    hw: Grid, grid: Grid, channels: int, dtype: torch.dtype, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [2, N, C] and a mask [2, N] that leave no label in doubt."""
    shape = (2, hw[0] * hw[1], channels)
    mask = torch.rand(shape[:2]) < 0.7
    for _ in range(100):
        k = scattered(shape, hw, grid, dtype, 1.0)
        exact = cosines(torch.where(mask.unsqueeze(2), k.double(), 0), hw, grid, mask)
        if min(gap(exact[b : b + 1, mask[b]]) for b in range(2)) > CLEAR:
            if layout == "image":
                k = k.transpose(1, 2).contiguous().transpose(1, 2)
            return k, laid_out(shape, dtype, layout), mask
    raise AssertionError("no clear data found")


@pytest.mark.parametrize(("hw", "grid", "channels"), DISTINCT)
@pytest.mark.parametrize("layout", ["tokens", "image"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_matches_float64(
    backend: str, aggregate: str, dtype: torch.dtype, layout: str, hw: Grid, grid: Grid, channels: int
) -> None:
    k, v, mask = clear_tokens(hw, grid, channels, dtype, layout)
    found = everything(k, v, mask, hw, grid, aggregate)
    with fk.use_backend("reference"):
        wanted = everything(k.double(), v.double(), mask, hw, grid, aggregate)
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[3], wanted[3])
    rounding = ROUNDING[dtype]
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=rounding, atol=2e-6)
    torch.testing.assert_close(found[2].double(), wanted[2], rtol=0, atol=1e-6)
    for a, b in zip(found[4:6], wanted[4:6], strict=True):
        # The gradient of the centres arrives rounded to their dtype.
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4 * max(rounding, 1e-5) * b.abs().max().item())
    for a, b in zip(found[6:], wanted[6:], strict=True):
        size = max(1.0, float(mask.sum()) ** 0.5)
        torch.testing.assert_close(a.double(), b, rtol=4 * max(rounding, 1e-5), atol=4 * rounding * size)


@pytest.mark.parametrize("layout", ["tokens", "image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_mask_that_keeps_all_changes_no_bit(
    backend: str, aggregate: str, dtype: torch.dtype, layout: str
) -> None:
    k, v = laid_out((2, 143, 24), dtype, layout), laid_out((2, 143, 24), dtype, layout)
    mask = torch.ones(2, 143, dtype=torch.bool)
    with_mask = everything(k, v, mask, (13, 11), (3, 4), aggregate)
    without = everything(k, v, None, (13, 11), (3, 4), aggregate)
    backends.assert_same_bits(backend, with_mask, without)


@pytest.mark.parametrize("layout", ["tokens", "image"])
@pytest.mark.parametrize("what", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_what_masked_tokens_hold_has_no_effect(
    backend: str, poisoned: None, aggregate: str, what: float, layout: str
) -> None:
    k, v = laid_out((2, 143, 24), torch.float32, layout), laid_out((2, 143, 24), torch.float32, layout)
    mask = torch.rand(2, 143) < 0.6
    clean = everything(k, v, mask, (13, 11), (3, 4), aggregate)
    k[~mask], v[~mask] = what, what
    found = everything(k, v, mask, (13, 11), (3, 4), aggregate)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    assert all(t.isfinite().all() for t in found)
    assert (found[1][~mask] == -1).all() and (found[1][mask] >= 0).all()
    assert (found[2][~mask] == 0).all() and torch.equal(found[3].sum(1), mask.sum(1))
    assert (found[4][~mask] == 0).all() and (found[5][~mask] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_nan_of_a_token_that_takes_part_stays_in_its_cluster_and_bins(
    backend: str, aggregate: str, masked: bool
) -> None:
    k, v = torch.randn(2, 2, 35, 4)
    mask = torch.rand(2, 35) < 0.7 if masked else None
    if mask is not None:
        mask[1, 16] = True
    clean = fk.cluster(k, v, (2, 3), (5, 7), aggregate=aggregate, mask=mask)
    v = v.clone()
    v[1, 16, 3] = NAN  # row 2 lies in both rows of bins, column 2 in the first two of three
    if mask is not None:
        v[~mask] = NAN
    found = fk.cluster(k, v.requires_grad_(), (2, 3), (5, 7), aggregate=aggregate, mask=mask)
    assert torch.equal(found.labels, clean.labels) and torch.equal(found.similarity, clean.similarity)
    spoiled = torch.zeros(2, 6, 4, dtype=torch.bool)
    spoiled[1, [0, 1, 3, 4, int(found.labels[1, 16])], 3] = True
    assert torch.equal(found.centres.isnan(), spoiled)
    torch.testing.assert_close(found.centres[~spoiled], clean.centres[~spoiled], rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(found.centres.sum(), v)
    assert grad.isfinite().all()


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_bin_without_tokens_pools_to_zeros(backend: str, aggregate: str) -> None:
    """Of three columns of bins the middle one is masked: no token joins it, as all look like their own."""
    k, v = torch.randn(1, 3, 2).repeat_interleave(2, 1).repeat(1, 4, 1), torch.randn(1, 24, 2)
    k[0, :, 0] = k[0, :, 0].abs() + 1
    mask = torch.tensor([True, True, False, False, True, True]).repeat(4).view(1, 24)
    found = fk.cluster(k, v, (1, 3), (4, 6), aggregate=aggregate, mask=mask)
    assert (found.centres[0, 1] == 0).all() and found.counts[0, 1] == 0
    assert set(found.labels[mask].tolist()) <= {0, 2}
    # Where every cosine is negative, the zero of the empty bin is the largest.
    found = fk.cluster(-k, v, (1, 3), (4, 6), aggregate="count", alpha=-1.0, mask=mask)
    assert (found.labels[mask] == 1).all() and (found.similarity == 0).all()
    torch.testing.assert_close(found.centres[0, 1], v[mask].sum(0) / 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_sample_wholly_masked(backend: str, aggregate: str, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 3, 35, 6).to(dtype)
    k[1], v[1] = NAN, NAN
    mask = torch.ones(3, 35, dtype=torch.bool)
    mask[1] = False
    found = everything(k, v, mask, (5, 7), (2, 3), aggregate)
    centres, labels, similarity, counts, grad_k, grad_v, *gates = found
    assert (labels[1] == -1).all() and all(
        (t[1] == 0).all() for t in (centres, similarity, counts, grad_k, grad_v)
    )
    assert all(t.isfinite().all() for t in (*gates, centres, grad_k, grad_v))
    k[1], v[1] = 1, 1
    others = everything(k, v, None, (5, 7), (2, 3), aggregate)
    for a, b in zip(found[:4], others[:4], strict=True):
        torch.testing.assert_close(a[[0, 2]], b[[0, 2]])


MASKS: dict[str, Callable[[], torch.Tensor]] = {
    "tokens innermost": lambda: torch.rand(2, 35) < 0.7,
    "batch innermost": lambda: (torch.rand(35, 2) < 0.7).t(),
    "sliced": lambda: (torch.rand(4, 80) < 0.7)[1:3, 3:73:2],
    "expanded batch": lambda: (torch.rand(1, 35) < 0.7).expand(2, -1),
    "expanded tokens": lambda: torch.tensor([[True], [False]]).expand(-1, 35),
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_strides_of_the_mask(backend: str, aggregate: str, name: str) -> None:
    k, v, mask = torch.randn(2, 35, 6), torch.randn(2, 35, 6), MASKS[name]()
    found = everything(k, v, mask, (5, 7), (2, 3), aggregate)
    wanted = everything(k, v, mask.clone(memory_format=torch.contiguous_format), (5, 7), (2, 3), aggregate)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_empty_batch(backend: str) -> None:
    k, mask = torch.empty(0, 35, 6), torch.empty(0, 35, dtype=torch.bool)
    found = everything(k, k, mask, (5, 7), (2, 3), "similarity")
    assert [list(t.shape) for t in found[:4]] == [[0, 6, 6], [0, 35], [0, 35], [0, 6]]
    assert found[6] == 0 and found[7] == 0


@pytest.mark.kernels
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_sample_does_not_depend_on_its_batch(backend: str, aggregate: str) -> None:
    k, v = torch.randn(2, 3, 340, 10)
    mask = torch.rand(3, 340) < 0.7
    together = everything(k, v, mask, (20, 17), (3, 2), aggregate)
    turned = everything(k.flip(0), v.flip(0), mask.flip(0), (20, 17), (3, 2), aggregate)
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(together[:4], turned[:4], strict=True))
    alone = everything(k[1:2], v[1:2], mask[1:2], (20, 17), (3, 2), aggregate)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together[:4], alone[:4], strict=True))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_gradcheck(backend: str, aggregate: str) -> None:
    k, v = (torch.randn(2, 12, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    gates = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.5, -0.25)]
    mask = torch.rand(2, 12) < 0.7

    def differentiable(
        k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = fk.cluster(k, v, (2, 2), (3, 4), aggregate=aggregate, alpha=alpha, beta=beta, mask=mask)
        return found.centres, found.similarity

    assert torch.autograd.gradcheck(differentiable, (k, v, *gates), fast_mode=is_slow(backend, OP))


@pytest.mark.kernels
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("dtype", "aggregate"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_opcheck(backend: str, ops: Any, dtype: torch.dtype, aggregate: int, grad: bool) -> None:
    k, v = (laid_out((2, 35, 6), dtype, "image").detach().requires_grad_(grad) for _ in range(2))
    mask, gates = torch.rand(2, 35) < 0.7, (torch.tensor([0.5]), torch.tensor([0.25]))
    sizes = [3, 2], [5, 7], aggregate
    torch.library.opcheck(ops.cluster.default, (k, v, mask, *gates, *sizes))
    k, v = k.detach(), v.detach()
    centres, labels, similarity, _counts, saved = ops.cluster(k, v, mask, *gates, *sizes)
    grads = torch.randn_like(centres), torch.randn_like(similarity)
    torch.library.opcheck(ops.cluster_backward.default, (*grads, k, v, *gates, labels, saved, *sizes))


def test_compile() -> None:
    def function(k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, height: int) -> torch.Tensor:
        found = fk.cluster(k, v, (2, 2), (height, k.size(1) // height), mask=mask)
        return found.centres.sum(1) + found.similarity.mean() + found.labels.min()

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for height, width in ((5, 7), (4, 9)):
        k, v = (torch.randn(2, height * width, 6, requires_grad=True) for _ in range(2))
        mask = torch.rand(2, height * width) < 0.7
        found, wanted = compiled(k, v, mask, height), function(k, v, mask, height)
        torch.testing.assert_close(found, wanted)
        grads = [torch.autograd.grad(out.square().sum(), (k, v)) for out in (found, wanted)]
        torch.testing.assert_close(*grads)


def test_autocast(backend: str) -> None:
    k, mask = torch.randn(2, 35, 6), torch.rand(2, 35) < 0.7
    with torch.autocast(k.device.type, torch.bfloat16):
        found = fk.cluster(k, k, (2, 3), (5, 7), mask=mask)
    wanted = fk.cluster(k.bfloat16(), k.bfloat16(), (2, 3), (5, 7), mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_negative_alpha_takes_the_least_similar_in_the_counted_round(
    backend: str, dtype: torch.dtype, masked: bool
) -> None:
    k, v = torch.randn(2, 2, 24, 5).to(dtype)
    mask = torch.rand(2, 24) < 0.7 if masked else torch.ones(2, 24, dtype=torch.bool)
    exact = cosines(torch.where(mask.unsqueeze(2), k.double(), 0), (4, 6), (2, 3), mask)
    for alpha in (-2.0, torch.tensor(-1e-3), torch.tensor([-7.0])):
        found = fk.cluster(k, v, (2, 3), (4, 6), alpha=alpha, mask=mask if masked else None)
        assert torch.equal(found.labels[mask], exact.argmin(2)[mask])
        own = exact.min(2).values[mask]
        torch.testing.assert_close(found.similarity[mask].double(), own, rtol=0, atol=1e-6)
        one_hot = torch.nn.functional.one_hot(found.labels.clamp_min(0), 6) * mask.unsqueeze(2)
        assert torch.equal(found.counts, one_hot.sum(1).int())


@pytest.mark.parametrize("alpha", [0.0, -0.0, NAN])
def test_an_alpha_without_sign_ties_all_in_the_counted_round(backend: str, alpha: float) -> None:
    k, v = torch.randn(2, 2, 12, 4)
    found = fk.cluster(k, v, (2, 2), (3, 4), alpha=alpha)
    assert (found.labels == 0).all() and (found.counts[:, 0] == 12).all()
    assert found.centres.isfinite().all() and found.similarity.isfinite().all()
