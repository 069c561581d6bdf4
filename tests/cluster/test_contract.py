"""What a round of clustering promises at the edges: ties, NaN, norms of zero, empty clusters, equal bits."""

from __future__ import annotations

import math

import pytest
import torch

import frd_kernels as fk

from ..backends import is_slow
from .cases import (
    exact_pool,
    laid_out,
    on_device,  # noqa: F401  an autouse fixture
)

OP = "cluster"

AGGREGATES = ["count", "similarity"]
NAN, INF = float("nan"), float("inf")


def columns(directions: torch.Tensor) -> torch.Tensor:
    """Keys of images of three rows whose columns have these directions [B, O, C]."""
    return directions.repeat(1, 3, 1)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_ties_go_to_the_lowest_index(backend: str, aggregate: str) -> None:
    """One centre per column, each with an axis of its own, but column j repeats column i."""
    pairs = [(i, j) for i in (0, 1, 6, 7, 8, 15, 16, 17, 37) for j in (9, 18, 31, 32, 38) if i < j]
    directions = torch.eye(39).repeat(len(pairs), 1, 1)
    wanted = torch.arange(39).repeat(len(pairs), 3)
    for b, (i, j) in enumerate(pairs):
        directions[b, j] = directions[b, i]
        wanted[b][wanted[b] == j] = i
    k = columns(directions)
    assert torch.equal(fk.cluster(k, k, (1, 39), (3, 39), aggregate=aggregate).labels, wanted)


def test_a_negative_alpha_takes_the_least_similar(backend: str) -> None:
    k = columns(torch.tensor([[[1.0, 0], [0, 1.0], [-1.0, 0], [-1.0, 0]]]))
    labels = fk.cluster(k, k, (1, 4), (3, 4), aggregate="similarity", alpha=-2.0).labels
    assert labels.tolist() == [[2, 0, 0, 0] * 3]


@pytest.mark.parametrize("alpha", [0.0, -0.0, NAN])
def test_an_alpha_without_sign_ties_all(backend: str, alpha: float) -> None:
    k, v = torch.randn(2, 2, 12, 4)
    found = fk.cluster(k, v, (2, 2), (3, 4), aggregate="similarity", alpha=alpha, beta=0.5)
    assert (found.labels == 0).all()
    own = NAN if math.isnan(alpha) else 1 / (1 + math.exp(-0.5))
    torch.testing.assert_close(found.similarity, torch.full((2, 12), own), equal_nan=True)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_empty_clusters_keep_their_pooled_centre(backend: str, aggregate: str) -> None:
    k = torch.tensor([1.0, 2.0, 2.0]).expand(1, 24, 3).contiguous()
    v = torch.arange(72.0).view(1, 24, 3)
    found = fk.cluster(k, v, (2, 3), (4, 6), aggregate=aggregate)
    assert found.counts.tolist() == [[24, 0, 0, 0, 0, 0]]
    pooled = v.view(2, 2, 3, 2, 3).mean((1, 3)).view(1, 6, 3)
    assert torch.equal(found.centres[:, 1:], pooled[:, 1:])
    weight = 1.0 if aggregate == "count" else 1 / (1 + math.exp(-1))
    wanted = (pooled[:, 0] + weight * v.sum(1)) / (1 + weight * 24)
    torch.testing.assert_close(found.centres[:, 0], wanted)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_key_of_zero_joins_centre_0_and_passes_no_gradient(
    backend: str, aggregate: str, dtype: torch.dtype
) -> None:
    k, v = torch.randn(2, 2, 24, 3).to(dtype)
    k[0, 17] = 0
    k.requires_grad_()
    found = fk.cluster(k, v, (2, 3), (4, 6), aggregate=aggregate)
    own = 0.0 if aggregate == "count" else 0.5
    assert found.labels[0, 17] == 0 and found.similarity[0, 17] == own
    (grad,) = torch.autograd.grad(found.similarity[0, 17], k)
    assert (grad == 0).all()


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_keys_of_zero_everywhere(backend: str, aggregate: str) -> None:
    k = torch.zeros(2, 24, 3, requires_grad=True)
    v = torch.randn(2, 24, 3)
    found = fk.cluster(k, v, (2, 3), (4, 6), aggregate=aggregate)
    assert (found.labels == 0).all() and found.centres.isfinite().all()
    (grad,) = torch.autograd.grad(found.similarity.sum() + found.centres.square().sum(), k)
    assert (grad == 0).all()


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_are_not_finite_stay_in_their_cluster_and_channel(
    backend: str, dtype: torch.dtype, aggregate: str
) -> None:
    """NaN and both infinities, apart and together, among finite ones."""
    k, v = torch.randn(2, 1, 143, 20).to(dtype)
    options = {"aggregate": aggregate, "alpha": 1.7, "beta": -0.4} if aggregate == "similarity" else {}
    clean = fk.cluster(k, v, (4, 3), (13, 11), **options)
    spoiled = v.clone()
    for token, channel, value in [(3, 1, NAN), (50, 2, INF), (90, 2, -INF), (142, 7, -INF)]:
        spoiled[0, token, channel] = value
    found = fk.cluster(k, spoiled, (4, 3), (13, 11), **options)
    assert torch.equal(found.labels, clean.labels) and torch.equal(found.similarity, clean.similarity)
    weights = torch.ones(143).double() if aggregate == "count" else clean.similarity[0].double()
    sums, size = exact_pool(spoiled, (13, 11), (4, 3))[0], torch.ones(12).double()
    for token, label in enumerate(clean.labels[0]):
        sums[label] += weights[token] * spoiled[0, token].double()
        size[label] += weights[token]
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-10
    wanted = sums / size.unsqueeze(1)
    torch.testing.assert_close(found.centres[0].double(), wanted, rtol=rounding, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_nan_keys_win_as_in_argmax(backend: str, aggregate: str) -> None:
    """The bins of NaN keys have NaN cosines with all: the first wins every token, but a NaN token has only
    NaN and goes to centre 0."""
    k, v = torch.randn(2, 2, 12, 4)
    k[1, 3, 2] = k[1, 4, 0] = NAN  # bins 1 and 2 of 3
    found = fk.cluster(k, v, (1, 3), (2, 6), aggregate=aggregate)
    wanted = torch.ones(12, dtype=torch.int64)
    wanted[[3, 4]] = 0
    assert torch.equal(found.labels[1], wanted) and found.counts[1].tolist() == [2, 10, 0]
    assert found.similarity[1].isnan().all()
    if aggregate == "count":
        assert found.centres.isfinite().all()
    alone = fk.cluster(k[:1], v[:1], (1, 3), (2, 6), aggregate=aggregate)
    assert torch.equal(found.labels[0], alone.labels[0])
    torch.testing.assert_close(found.centres[0], alone.centres[0], rtol=1e-6, atol=1e-6)


def scaled(scale: float, which: str) -> torch.Tensor:
    """Keys of a 4x6 image: all scaled, or one of them."""
    k = torch.randn(2, 24, 16)
    k[:, 9 if which == "one" else slice(None)] *= scale
    return k.requires_grad_()


TINY, LARGE = [1e-42, 1e-30, 1e-20, 1e-12], [1e-6, 1e10, 1e18, 1e25, 1e30, INF]


# Not "similarity" of tiny keys: there the reference ties, as the sigmoids of all cosines round to one number.
@pytest.mark.kernels
@pytest.mark.parametrize(
    ("aggregate", "scale"), [("count", s) for s in TINY + LARGE] + [("similarity", s) for s in LARGE]
)
@pytest.mark.parametrize("which", ["one", "all"])
def test_magnitudes_as_in_the_reference(backend: str, aggregate: str, scale: float, which: str) -> None:
    """Norms that count as zero, that overflow, and all between."""
    k, v = scaled(scale, which), torch.randn(2, 24, 16)
    found = fk.cluster(k, v, (2, 3), (4, 6), aggregate=aggregate)
    wanted = fk.reference.cluster(k, v, (2, 3), (4, 6), aggregate=aggregate)
    assert torch.equal(found.labels, wanted.labels)
    largest = wanted.similarity.abs().nan_to_num().max().item()
    torch.testing.assert_close(
        found.similarity, wanted.similarity, rtol=1e-5, atol=1e-6 * largest, equal_nan=True
    )
    torch.testing.assert_close(found.centres, wanted.centres, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.kernels
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-6, 1e10, 1e15])
@pytest.mark.parametrize("which", ["one", "all"])
def test_gradients_at_magnitudes(backend: str, scale: float, which: str) -> None:
    k = scaled(scale, which)
    found, wanted = (
        torch.autograd.grad(cluster(k, k, (2, 3), (4, 6)).similarity.square().sum(), k)[0].flatten(0, 1)
        for cluster in (fk.cluster, fk.reference.cluster)
    )
    for n, norm in enumerate(k.detach().norm(dim=2).flatten().tolist()):
        # 1 / norm is the size of a term; the terms may cancel
        size = 1 / norm if norm > 1e-12 else wanted[n].abs().max().item()
        torch.testing.assert_close(found[n], wanted[n], rtol=1e-5, atol=2e-6 * size)


def everything(k: torch.Tensor, v: torch.Tensor, aggregate: str) -> list[torch.Tensor]:
    """Results for a 20x17 image, a few chunks of tokens, and the gradients of k, v, alpha and beta."""
    gates = torch.tensor([[1.5], [-0.2]])
    inputs = [t.detach().requires_grad_() for t in (k, v, *gates)]
    k, v, alpha, beta = inputs
    found = fk.cluster(k, v, (3, 2), (20, 17), aggregate=aggregate, alpha=alpha, beta=beta)
    loss = found.centres.square().sum() + found.similarity.sin().sum()
    return [t.detach() for t in found] + list(torch.autograd.grad(loss, inputs, materialize_grads=True))


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["tokens", "image"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_sample_does_not_depend_on_its_batch(backend: str, aggregate: str, layout: str) -> None:
    k, v = laid_out((3, 340, 10), torch.float32, layout), laid_out((3, 340, 10), torch.float32, layout)
    together = everything(k, v, aggregate)[:-2]
    turned = everything(k.flip(0), v.flip(0), aggregate)[:-2]
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(together, turned, strict=True))
    for b in range(3):
        alone = everything(k[b : b + 1], v[b : b + 1], aggregate)[:-2]
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(together, alone, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_bits_repeat_for_any_number_of_threads(backend: str, aggregate: str) -> None:
    k, v = laid_out((3, 340, 10), torch.float32, "tokens"), laid_out((3, 340, 10), torch.float32, "image")
    first = everything(k, v, aggregate)
    before = torch.get_num_threads()
    try:
        for threads in (2,) if is_slow(backend, OP) else (1, 1, 2, 3):
            torch.set_num_threads(threads)
            again = everything(k, v, aggregate)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)
