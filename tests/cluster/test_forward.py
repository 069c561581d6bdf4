"""One round of cosine clustering on every backend: against float64, and inputs of every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import frd_kernels as fk

from .cases import (
    VIEWS,
    Grid,
    exact_pool,
    exact_similarity,
    laid_out,
    on_device,  # noqa: F401  an autouse fixture
)

OP = "cluster"

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
AGGREGATES: dict[str, dict[str, Any]] = {
    "count": {"aggregate": "count"},
    "similarity": {"aggregate": "similarity", "alpha": 1.7, "beta": -0.4},
    "flipped": {"aggregate": "similarity", "alpha": torch.tensor(-2.0), "beta": 0.3},
}
# image, grid, channels
CASES: list[tuple[Grid, Grid, int]] = [
    ((2, 2), (2, 1), 16),
    ((1, 1), (1, 1), 3),
    ((4, 4), (1, 1), 256),
    ((4, 4), (2, 1), 1),
    ((8, 8), (4, 4), 32),
    ((16, 16), (8, 8), 24),
    ((13, 11), (3, 5), 7),
    ((7, 23), (4, 4), 33),
    ((3, 4), (5, 6), 16),
    ((39, 38), (8, 8), 32),
]
# Largest difference of two similarities that the sums' rounding may hide. 16-bit inputs are exact in float32.
NEAR = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6, torch.float64: 1e-14}
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 1e-14}


def exact_centres(
    v: torch.Tensor, hw: Grid, grid: Grid, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The centres [B, O, C] in float64 that belong to these labels."""
    mask = F.one_hot(labels, grid[0] * grid[1]) * weights.double().unsqueeze(2)
    sums = exact_pool(v, hw, grid) + mask.transpose(1, 2) @ v.double()
    return sums / (1 + mask.sum(1)).unsqueeze(2)


def check(k: torch.Tensor, v: torch.Tensor, hw: Grid, grid: Grid, options: dict[str, Any]) -> None:
    found = fk.cluster(k, v, grid, hw, **options)
    centres = grid[0] * grid[1]
    assert found.centres.shape == (*k.shape[:1], centres, k.size(2)) and found.centres.dtype == v.dtype
    assert found.labels.shape == k.shape[:2] and found.labels.dtype == torch.int64
    assert found.similarity.dtype == (torch.float64 if k.dtype == torch.float64 else torch.float32)
    assert found.counts.dtype == torch.int32
    assert torch.equal(found.counts, F.one_hot(found.labels, centres).sum(1).int())

    similarity = exact_similarity(k, hw, grid, **options)
    own = similarity.gather(2, found.labels.unsqueeze(2)).squeeze(2)
    best, first = similarity.max(2)
    # A label differs only where the two best similarities are as good as equal, and that is rare.
    differ = found.labels != first
    assert (best - own).max() <= NEAR[k.dtype]
    assert differ.sum() <= found.labels.numel() / 500, f"{differ.sum()} labels differ"
    torch.testing.assert_close(found.similarity.double(), own, rtol=0, atol=NEAR[k.dtype])
    weights = torch.ones_like(own) if options["aggregate"] == "count" else own
    wanted = exact_centres(v, hw, grid, found.labels, weights)
    torch.testing.assert_close(found.centres.double(), wanted, rtol=ROUNDING[v.dtype], atol=NEAR[k.dtype])


@pytest.mark.parametrize(("hw", "grid", "channels"), CASES)
@pytest.mark.parametrize("layout", ["tokens", "image"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("form", AGGREGATES)
def test_matches_float64(
    backend: str, form: str, dtype: torch.dtype, layout: str, hw: Grid, grid: Grid, channels: int
) -> None:
    shape = (2, hw[0] * hw[1], channels)
    k, v = laid_out(shape, dtype, layout), laid_out(shape, dtype, layout)
    check(k, v, hw, grid, AGGREGATES[form])


def test_many_centres(backend: str) -> None:
    """More centres than channels, tokens of several chunks, centres of several panels and blocks."""
    k, v = torch.randn(2, 1, 31 * 29, 8)
    check(k, v, (31, 29), (12, 11), AGGREGATES["count"])


def test_large_mean(backend: str) -> None:
    """All keys point nearly the same way: the cosines agree in their first digits."""
    k, v = 8 + torch.rand(2, 2, 12 * 12, 32, dtype=torch.float64)
    check(k, v, (12, 12), (4, 4), AGGREGATES["count"])
    check(k, v, (12, 12), (4, 4), {"aggregate": "similarity", "alpha": 40.0, "beta": -39.0})


@pytest.mark.parametrize("form", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).double()])
def test_forms_of_alpha_and_beta(backend: str, form: torch.Tensor) -> None:
    k, v = torch.randn(2, 2, 35, 6)
    number = fk.cluster(k, v, (2, 3), (5, 7), aggregate="similarity", alpha=0.5, beta=0.5)
    tensor = fk.cluster(k, v, (2, 3), (5, 7), aggregate="similarity", alpha=form, beta=form)
    assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))


# As keys these would have equal cosines with all centres.
VALUES = {
    "expanded tokens": lambda: torch.randn(2, 1, 6).expand(-1, 35, -1),
    "expanded channels": lambda: torch.randn(2, 35, 1).expand(-1, -1, 6),
}


def run(k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> list[torch.Tensor]:
    """The results for a 5x7 image, and the gradients of k and v."""
    k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
    found = fk.cluster(k, v, (2, 3), (5, 7), **options)
    loss = (found.centres * torch.linspace(-1, 1, 6)).sum() + found.similarity.square().sum()
    return [*found, *torch.autograd.grad(loss, (k, v))]


@pytest.mark.parametrize("name", VIEWS | VALUES)
@pytest.mark.parametrize("form", ["count", "similarity"])
def test_strides(backend: str, name: str, form: str) -> None:
    options = AGGREGATES[form]
    view = (VIEWS | VALUES)[name]()
    k = view if name in VIEWS else torch.randn(2, 35, 6)
    check(k, view, (5, 7), (2, 3), options)
    for found, wanted in zip(
        run(k, view, options), run(k.clone(), view.contiguous().clone(), options), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k_layout", ["tokens", "image"])
@pytest.mark.parametrize("v_layout", ["tokens", "image"])
@pytest.mark.parametrize("form", ["count", "similarity"])
def test_every_element_is_written(
    backend: str, poisoned: None, k_layout: str, v_layout: str, form: str
) -> None:
    shape = (2, 35, 6)
    k, v = laid_out(shape, torch.float32, k_layout), laid_out(shape, torch.float32, v_layout)
    assert all(t.isfinite().all() for t in run(k, v, AGGREGATES[form]))


def test_gradients_keep_the_layout() -> None:
    k, v = laid_out((2, 35, 6), torch.float32, "image"), laid_out((2, 35, 6), torch.float32, "tokens")
    grad_k, grad_v = run(k, v, AGGREGATES["similarity"])[-2:]
    assert grad_k.stride() == k.stride() and grad_v.stride() == v.stride()


@pytest.mark.parametrize("form", ["count", "similarity"])
def test_empty_batch(backend: str, form: str) -> None:
    k = torch.empty(0, 35, 6)
    found = run(k, k, AGGREGATES[form])
    assert [list(t.shape) for t in found] == [[0, 6, 6], [0, 35], [0, 35], [0, 6], [0, 35, 6], [0, 35, 6]]


def test_single_token(backend: str) -> None:
    """One pixel under many bins: every pooled centre is that pixel, and it joins the first."""
    k, v = torch.randn(2, 3, 1, 4)
    found = fk.cluster(k, v, (2, 2), (1, 1))
    assert found.labels.tolist() == [[0]] * 3 and found.counts.tolist() == [[1, 0, 0, 0]] * 3
    torch.testing.assert_close(found.centres, v.expand(-1, 4, -1))
    torch.testing.assert_close(found.similarity, torch.ones(3, 1))


def test_keys_and_values_may_be_one_tensor(backend: str) -> None:
    x = torch.randn(2, 35, 6, requires_grad=True)
    k, v = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    together = fk.cluster(x, x, (2, 3), (5, 7), **AGGREGATES["similarity"]).centres.square().sum()
    apart = fk.cluster(k, v, (2, 3), (5, 7), **AGGREGATES["similarity"]).centres.square().sum()
    (grad,) = torch.autograd.grad(together, x)
    torch.testing.assert_close(grad, sum(torch.autograd.grad(apart, (k, v))))


def test_labels_and_counts_are_constants(backend: str) -> None:
    k = torch.randn(2, 35, 6, requires_grad=True)
    found = fk.cluster(k, k, (2, 3), (5, 7))
    assert found.centres.requires_grad and found.similarity.requires_grad
    assert not found.labels.requires_grad and not found.counts.requires_grad
    with torch.inference_mode():
        again = fk.cluster(k, k, (2, 3), (5, 7))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_meta_tensors(dtype: torch.dtype) -> None:
    k = torch.empty(2, 35, 6, dtype=dtype, device="meta")
    real = fk.cluster(*torch.randn(2, 2, 35, 6).to(dtype), (2, 3), (5, 7))
    for found, wanted in zip(fk.cluster(k, k, (2, 3), (5, 7)), real, strict=True):
        assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
