"""From centres back to the tokens on every backend: against float64, at the edges, and in torch's machinery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import frd_kernels as fk

from .cases import (
    laid_out,
    on_device,  # noqa: F401  an autouse fixture
)

OP = "cluster_dispatch"

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 1e-13}
NAN, INF = float("nan"), float("inf")
# batch, centres, channels, tokens
CASES = [(2, 4, 24, 49), (1, 1, 1, 1), (3, 64, 32, 333), (1, 100, 7, 50), (2, 3, 256, 130), (5, 2, 17, 64)]


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(
    case: tuple[int, int, int, int], dtype: torch.dtype, layout: str = "tokens"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centres, labels of which some are -1, similarities."""
    batch, centres, channels, tokens = case
    labels = torch.randint(-1, centres, (batch, tokens))
    return (
        laid_out((batch, centres, channels), dtype, layout),
        labels,
        torch.randn(batch, tokens).to(compute(dtype)),
    )


def run(
    centres: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor, grad: torch.Tensor, **options: bool
) -> list[torch.Tensor]:
    """The result and the gradients of centres and similarity."""
    centres, similarity = centres.detach().requires_grad_(), similarity.detach().requires_grad_()
    out = fk.dispatch(centres, labels, similarity, **options)
    return [out.detach(), *torch.autograd.grad(out, (centres, similarity), grad)]


def dense(
    centres: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor, grad: torch.Tensor
) -> list[torch.Tensor]:
    """The same in float64 by the [N, O] matrix of masked similarities."""
    one_hot = F.one_hot(labels + 1, centres.size(1) + 1)[..., 1:].double()
    matrix = similarity.double().unsqueeze(2) * one_hot
    grads = matrix.transpose(1, 2) @ grad.double(), ((grad.double() @ centres.double().mT) * one_hot).sum(2)
    return [matrix @ centres.double(), *grads]


def assert_agrees(found: list[torch.Tensor], wanted: list[torch.Tensor], tokens: int) -> None:
    out, grad_centres, grad_similarity = found
    rounding, wide = ROUNDING[out.dtype], ROUNDING[grad_similarity.dtype]
    torch.testing.assert_close(out.double(), wanted[0], rtol=rounding, atol=1e-7)
    size = 4 * wide * max(tokens, 16) ** 0.5
    torch.testing.assert_close(grad_centres.double(), wanted[1], rtol=rounding, atol=size)
    torch.testing.assert_close(grad_similarity.double(), wanted[2], rtol=4 * wide, atol=4 * size)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_matches_float64(
    backend: str, poisoned: None, dtype: torch.dtype, channels_first: bool, case: tuple[int, int, int, int]
) -> None:
    centres, labels, similarity = inputs(case, dtype)
    batch, _centres, channels, tokens = case
    grad = laid_out((batch, tokens, channels), dtype, "image" if channels_first else "tokens")
    found = run(centres, labels, similarity, grad, channels_first=channels_first)
    assert [t.dtype for t in found] == [dtype, dtype, compute(dtype)]
    assert found[0].shape == (batch, tokens, channels)
    assert (found[0].transpose(1, 2) if channels_first else found[0]).is_contiguous()
    assert_agrees(found, dense(centres, labels, similarity, grad), tokens)


def test_many_tokens_of_few_centres(backend: str) -> None:
    """Sums of several chunks."""
    centres, labels, similarity = inputs((2, 3, 16, 2500), torch.float32)
    grad = torch.randn(2, 2500, 16)
    found = run(centres, labels, similarity, grad)
    assert_agrees(found, dense(centres, labels, similarity, grad), 2500)


def test_takes_the_results_of_cluster(backend: str) -> None:
    """With the results of a masked round: every token has its own centre, the masked ones zeros."""
    k, v = torch.randn(2, 2, 35, 6)
    mask = torch.rand(2, 35) < 0.7
    with fk.use_backend("reference"):
        found = fk.cluster(k, v, (2, 3), (5, 7), aggregate="similarity", mask=mask)
    out = fk.dispatch(found.centres, found.labels, found.similarity)
    for b in range(2):
        for n in range(35):
            own = found.centres[b, found.labels[b, n]] * found.similarity[b, n]
            wanted = own if mask[b, n] else torch.zeros(6)
            torch.testing.assert_close(out[b, n], wanted, rtol=1e-6, atol=1e-7)


VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "permuted": lambda: torch.randn(2, 6, 5).transpose(1, 2),
    "sliced": lambda: torch.randn(4, 9, 8)[1:3, 2:7, 1:7],
    "every other channel": lambda: torch.randn(2, 5, 12)[:, :, ::2],
    "batch innermost": lambda: torch.randn(5, 6, 2).permute(2, 0, 1),
    "expanded batch": lambda: torch.randn(1, 5, 6).expand(2, -1, -1),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("channels_first", [False, True])
def test_strides(backend: str, channels_first: bool, name: str) -> None:
    centres = VIEWS[name]()
    labels, similarity = torch.randint(-1, 5, (40, 2)).t()[:, 5:], torch.randn(2, 70)[:, ::2]
    for grad in (
        torch.randn(1, 1, 6).expand(2, 35, -1),
        torch.randn(2, 6, 40)[..., 3:38].mT,
        torch.randn(2, 70, 6)[:, ::2],
    ):
        found = run(centres, labels, similarity, grad, channels_first=channels_first)
        assert_agrees(found, dense(centres, labels, similarity, grad), 35)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_of_both_dtypes(backend: str, dtype: torch.dtype) -> None:
    centres, labels, similarity = inputs((2, 4, 6, 35), torch.float32)
    out = fk.dispatch(centres, labels.to(dtype), similarity)
    torch.testing.assert_close(out, fk.reference.dispatch(centres, labels, similarity))


@pytest.mark.parametrize("dtype", DTYPES)
def test_similarity_of_another_dtype(backend: str, dtype: torch.dtype) -> None:
    """It is taken in the dtype of the sums, and its gradient comes back in its own."""
    centres, labels, _ = inputs((2, 4, 6, 35), torch.float32)
    similarity = torch.randn(2, 35).to(dtype).requires_grad_()
    out = fk.dispatch(centres, labels, similarity)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, fk.reference.dispatch(centres, labels, similarity))
    (grad,) = torch.autograd.grad(out.sum(), similarity)
    assert grad.dtype == dtype


@pytest.mark.parametrize("what", [NAN, INF])
def test_tokens_without_a_centre_are_zero_whatever_comes(backend: str, what: float) -> None:
    centres, labels, similarity = inputs((2, 4, 6, 35), torch.float32)
    grad = torch.randn(2, 35, 6)
    clean = run(centres, labels, similarity, grad)
    similarity[labels < 0], grad[labels < 0] = what, what
    found = run(centres, labels, similarity, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    assert (found[0][labels < 0] == 0).all() and (found[2][labels < 0] == 0).all()
    centres[:] = what
    out, _, grad_similarity = run(centres, labels, similarity, grad)
    assert (out[labels < 0] == 0).all() and (grad_similarity[labels < 0] == 0).all()


@pytest.mark.kernels
def test_a_label_beyond_the_centres_is_not_followed(backend: str) -> None:
    """An error where the labels can be looked at, else NaN: a kernel would read foreign memory."""
    centres, labels, similarity = inputs((2, 4, 6, 35), torch.float32)
    grad = torch.randn(2, 35, 6)
    labels[1, 7] = 2**20
    if backend == "cpu":
        with pytest.raises(ValueError, match="labels must lie in -1"):
            run(centres, labels, similarity, grad)
        return
    out, _, grad_similarity = run(centres, labels, similarity, grad)
    assert out[1, 7].isnan().all() and out.isnan().sum() == 6 and grad_similarity[1, 7] == 0


@pytest.mark.parametrize("what", [NAN, INF])
def test_a_nan_stays_in_its_centre_and_channel(backend: str, what: float) -> None:
    centres, labels, similarity = inputs((2, 5, 6, 35), torch.float32)
    labels[0, :5] = torch.arange(5)
    similarity, grad = similarity.abs() + 0.5, torch.randn(2, 35, 6)
    clean = run(centres, labels, similarity, grad)
    spoilt = centres.clone()
    spoilt[0, 3, 2] = what
    found = run(spoilt, labels, similarity, grad)
    touched = torch.zeros(2, 35, 6, dtype=torch.bool)
    touched[0, labels[0] == 3, 2] = True
    assert torch.equal(~found[0].isfinite(), touched)
    assert torch.equal(found[0][~touched], clean[0][~touched]) and torch.equal(found[1], clean[1])
    assert torch.equal(~found[2].isfinite(), touched.any(2))
    spoilt = grad.clone()
    spoilt[0, 3, 2] = what  # of centre 3
    found = run(centres, labels, similarity, spoilt)
    touched = torch.zeros(2, 5, 6, dtype=torch.bool)
    touched[0, 3, 2] = True
    assert torch.equal(~found[1].isfinite(), touched)
    torch.testing.assert_close(found[1][~touched], clean[1][~touched], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels_first", [False, True])
def test_empty_batch(backend: str, channels_first: bool) -> None:
    found = run(
        torch.empty(0, 4, 6),
        torch.empty(0, 35, dtype=torch.int64),
        torch.empty(0, 35),
        torch.empty(0, 35, 6),
        channels_first=channels_first,
    )
    assert [list(t.shape) for t in found] == [[0, 35, 6], [0, 4, 6], [0, 35]]


@pytest.mark.kernels
@pytest.mark.parametrize("channels_first", [False, True])
def test_bits_repeat_and_a_sample_does_not_depend_on_its_batch(backend: str, channels_first: bool) -> None:
    centres, labels, similarity = inputs((3, 6, 20, 700), torch.float32)
    grad = laid_out((3, 700, 20), torch.float32, "image" if channels_first else "tokens")
    together = run(centres, labels, similarity, grad, channels_first=channels_first)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = run(centres, labels, similarity, grad, channels_first=channels_first)
            assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    finally:
        torch.set_num_threads(before)
    for b in range(3):
        one = slice(b, b + 1)
        alone = run(centres[one], labels[one], similarity[one], grad[one], channels_first=channels_first)
        assert all(torch.equal(a[one], c) for a, c in zip(together, alone, strict=True))


@pytest.mark.parametrize("channels_first", [False, True])
def test_gradcheck(backend: str, channels_first: bool) -> None:
    centres, labels, similarity = inputs((2, 3, 4, 9), torch.float64)
    assert torch.autograd.gradcheck(
        lambda c, s: fk.dispatch(c, labels, s, channels_first=channels_first),
        (centres.requires_grad_(), similarity.requires_grad_()),
        fast_mode=backend == "triton",
    )


@pytest.mark.kernels
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("layout", ["tokens", "image"])
@pytest.mark.parametrize(
    ("dtype", "grad"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_opcheck(
    backend: str, ops: Any, dtype: torch.dtype, grad: bool, layout: str, channels_first: bool
) -> None:
    centres, labels, similarity = inputs((2, 4, 6, 35), dtype, layout)
    centres, similarity = centres.detach().requires_grad_(grad), similarity.requires_grad_(grad)
    given = centres, labels.int(), similarity
    torch.library.opcheck(ops.cluster_dispatch.default, (*given, channels_first))
    of_out = laid_out((2, 35, 6), dtype, "image" if channels_first else "tokens")
    torch.library.opcheck(ops.cluster_dispatch_backward.default, (of_out, *(t.detach() for t in given)))


@pytest.mark.parametrize("channels_first", [False, True])
def test_compile(channels_first: bool) -> None:
    def function(centres: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
        return fk.dispatch(centres, labels, similarity, channels_first=channels_first).relu()

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in ((2, 4, 6, 35), (3, 5, 6, 40)):
        centres, labels, similarity = inputs(case, torch.float32)
        centres.requires_grad_(), similarity.requires_grad_()
        found, wanted = (f(centres, labels, similarity) for f in (compiled, function))
        assert found.stride() == wanted.stride()
        torch.testing.assert_close(found, wanted)
        grads = [torch.autograd.grad(out.square().sum(), (centres, similarity)) for out in (found, wanted)]
        torch.testing.assert_close(*grads)


def test_autocast_leaves_the_centres_their_dtype(backend: str) -> None:
    for dtype in DTYPES:
        centres, labels, similarity = inputs((2, 4, 6, 35), dtype)
        wanted = fk.dispatch(centres, labels, similarity)
        with torch.autocast(centres.device.type, torch.bfloat16):
            assert torch.equal(fk.dispatch(centres, labels, similarity), wanted)


@pytest.mark.parametrize("channels_first", [False, True])
def test_meta_tensors(channels_first: bool) -> None:
    real = inputs((2, 4, 6, 35), torch.float32)
    wanted = fk.dispatch(*real, channels_first=channels_first)
    found = fk.dispatch(*(t.to("meta") for t in real), channels_first=channels_first)
    assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def test_double_backward_is_refused() -> None:
    centres, labels, similarity = inputs((2, 4, 6, 35), torch.float32)
    centres.requires_grad_()
    (grad,) = torch.autograd.grad(
        fk.dispatch(centres, labels, similarity).square().sum(), centres, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="cluster_dispatch: double backward is not supported"):
        grad.sum().backward()
