"""The CUDA gradients of the clustering against the CPU kernels', from the same `saved`: teams of both sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from frd_kernels import backend
from frd_kernels.cluster.reference import compute_dtype

from .. import backends
from .cases import Grid, laid_out

pytestmark = pytest.mark.slow

cpu = torch.ops.frd
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Of the largest element: the order of the sums, and a rounding of each stored gradient.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LAYOUTS = ["tokens", "image", "every other token"]


@pytest.fixture(params=[8, 1], ids=["team of 8", "team of 1"])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU, which has the team that it has, once."""
    if torch.cuda.is_available():
        if request.param == 1:
            pytest.skip("the card picks the team")
    elif backends.EMULATED not in backend.PROVIDERS:
        pytest.skip(backends.emulated.problem())
    else:
        backends.prepare(backends.EMULATED)
        if request.param == 1:
            monkeypatch.setenv("FRD_EMULATED_GPU", "A100")
    yield


def on_gpu(name: str, *arguments: Any) -> list[torch.Tensor]:
    """The operator by the CUDA kernels, its results on the CPU."""
    if not torch.cuda.is_available():
        return flat(getattr(torch.ops.frd_emulated, name)(*arguments))
    move = lambda a: a.cuda() if isinstance(a, torch.Tensor) else a  # noqa: E731
    moved = [[move(b) for b in a] if isinstance(a, list) else move(a) for a in arguments]
    return [t.cpu() for t in flat(getattr(cpu, name)(*moved))]


def flat(results: Any) -> list[torch.Tensor]:
    parts = [r if isinstance(r, (list, tuple)) else [r] for r in results]
    return list(itertools.chain.from_iterable(parts))


def tokens(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "every other token":
        return torch.randn(shape[0], 2 * shape[1], shape[2] + 3).to(dtype)[:, ::2, 1 : shape[2] + 1]
    return laid_out(shape, dtype, layout)


def projections(kind: str, rounds: int, channels: int, dtype: torch.dtype) -> list[torch.Tensor]:
    made = []
    for t in range(rounds):
        if kind == "none" or (kind == "mixed" and t % 2):
            made += [torch.empty(0, dtype=dtype)] * 4
            continue
        for _ in range(2):
            made += [
                (torch.randn(channels, channels) / channels**0.5).to(dtype),
                torch.randn(channels).to(dtype),
            ]
    return made


def icm_arguments(
    batch: int, hw: Grid, grids: list[Grid], channels: int, kind: str, variant: int, x: torch.Tensor
) -> tuple[list[Any], torch.Tensor]:
    """What icm_backward takes behind the gradient, from a forward pass on the CPU, and a gradient."""
    count = len(grids) if variant else 1
    sums = compute_dtype(x.dtype)
    alpha = torch.tensor([1.5, 0.75, -0.5, 2.0], dtype=sums)[:count] * (1 if variant else 0.1)
    beta = torch.tensor([0.25, -0.125, 0.5, 0.0], dtype=sums)[:count]
    maps = projections(kind, len(grids), channels, x.dtype)
    sizes = [[side for grid in grids for side in grid], list(hw), variant]
    _out, labels, saved = cpu.icm(x, maps, alpha, beta, *sizes)
    return [x, maps, alpha, beta, labels, saved, *sizes], torch.randn(x.shape).to(x.dtype)


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor], dtype: torch.dtype) -> None:
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        largest = max(b.double().abs().max().item(), 1e-2) if b.numel() > 0 else 0.0
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=0,
            atol=TOLERANCE[dtype] * largest,
            msg=lambda m, n=number: f"tensor {n}: {m}",
        )


CASES: list[tuple[Grid, list[Grid], int, str]] = [
    ((6, 5), [(4, 4), (3, 2), (2, 2), (1, 2)], 33, "mixed"),
    ((13, 11), [(3, 5), (2, 2)], 8, "all"),
    ((8, 8), [(4, 4), (2, 1)], 64, "all"),
    ((20, 17), [(2, 1)], 12, "none"),  # sums over the tokens of a label in several parts
    ((2, 3), [(3, 3), (2, 3)], 5, "all"),  # more centres than tokens
]


@pytest.mark.parametrize(("hw", "grids", "channels", "kind"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", [0, 1])
def test_icm(
    team: None,
    variant: int,
    dtype: torch.dtype,
    layout: str,
    hw: Grid,
    grids: list[Grid],
    channels: int,
    kind: str,
) -> None:
    x = tokens((2, hw[0] * hw[1], channels), dtype, layout)
    arguments, grad = icm_arguments(2, hw, grids, channels, kind, variant, x)
    if layout == "image":
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    found = on_gpu("icm_backward", grad, *arguments)
    assert_close(found, flat(cpu.icm_backward(grad, *arguments)), dtype)


def cluster_arguments(
    k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, hw: Grid, grid: Grid, aggregate: int
) -> list[Any]:
    """What cluster_backward takes, of a forward pass on the CPU."""
    sums = compute_dtype(k.dtype)
    gates, sizes = (
        [torch.tensor([value], dtype=sums) for value in (1.7, -0.4)],
        [list(grid), list(hw), aggregate],
    )
    centres, labels, similarity, _counts, saved = cpu.cluster(k, v, mask, *gates, *sizes)
    grads = [torch.randn(centres.shape).to(k.dtype), torch.randn(similarity.shape[::-1]).to(sums).t()]
    return [*grads, k, v, *gates, labels, saved, *sizes]


@pytest.mark.parametrize(
    ("hw", "grid", "channels"), [((13, 11), (5, 4), 7), ((20, 17), (3, 2), 40), ((3, 4), (5, 6), 16)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("aggregate", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cluster(
    team: None, dtype: torch.dtype, aggregate: int, masked: bool, hw: Grid, grid: Grid, channels: int
) -> None:
    shape = (2, hw[0] * hw[1], channels)
    k, v = tokens(shape, dtype, "image"), tokens(shape, dtype, "every other token")
    mask = torch.rand(shape[:2]) > 0.3 if masked else None
    if mask is not None:
        k[~mask], v[~mask] = float("nan"), float("inf")
    arguments = cluster_arguments(k, v, mask, hw, grid, aggregate)
    wanted = list(cpu.cluster_backward(*arguments))
    if aggregate == 0:  # which never reads the values
        arguments[3] = torch.full_like(v, float("nan"))
    found = on_gpu("cluster_backward", *arguments)
    assert_close(found, wanted, dtype)
    if mask is not None:
        assert not found[0][~mask].any() and not found[1][~mask].any()


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e25])
def test_tokens_without_a_direction(team: None, scale: float, variant: int) -> None:
    """Norms that count as zero or overflow."""
    x = torch.randn(2, 30, 6)
    x[:, ::3] *= scale
    arguments, grad = icm_arguments(2, (6, 5), [(3, 2), (2, 1)], 6, "none", variant, x)
    wanted = flat(cpu.icm_backward(grad, *arguments))
    found = on_gpu("icm_backward", grad, *arguments)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits(team: None, dtype: torch.dtype, variant: int) -> None:
    """The same bits again, and for an item whatever its batch."""
    hw, grids = (8, 8), [(4, 4), (2, 1)]
    x = tokens((3, 64, 32), dtype, "image")
    arguments, grad = icm_arguments(3, hw, grids, 32, "all", variant, x)
    found, again = (on_gpu("icm_backward", grad, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    arguments[0], arguments[4], arguments[5] = (arguments[i][1:2] for i in (0, 4, 5))
    alone = on_gpu("icm_backward", grad[1:2], *arguments)
    assert torch.equal(alone[0], found[0][1:2])


@pytest.mark.parametrize(("channels", "kind"), [(4000, "none"), (1100, "all")])
def test_rows_beyond_shared_memory(monkeypatch: pytest.MonkeyPatch, channels: int, kind: str) -> None:
    """More channels in float64 than tiles of rows have room for."""
    if torch.cuda.is_available() or backends.EMULATED not in backend.PROVIDERS:
        pytest.skip("for the emulated A100")
    backends.prepare(backends.EMULATED)
    monkeypatch.setenv("FRD_EMULATED_GPU", "A100")
    x = torch.randn(1, 6, channels, dtype=torch.float64)
    arguments, grad = icm_arguments(1, (2, 3), [(1, 2)], channels, kind, 1, x)
    found = on_gpu("icm_backward", grad, *arguments)
    assert_close(found, flat(cpu.icm_backward(grad, *arguments)), torch.float64)


@pytest.mark.parametrize("variant", [0, 1])
def test_empty_batch(team: None, variant: int) -> None:
    arguments, grad = icm_arguments(0, (6, 5), [(3, 2), (2, 1)], 6, "all", variant, torch.empty(0, 30, 6))
    dx, *others = on_gpu("icm_backward", grad, *arguments)
    assert dx.shape == (0, 30, 6) and not any(t.any() for t in others)


def test_more_rounds_than_a_launch_takes(team: None) -> None:
    arguments, grad = icm_arguments(1, (4, 4), [(2, 2)] * 9, 3, "none", 0, torch.randn(1, 16, 3))
    with pytest.raises(ValueError, match="at most 8 rounds"):
        on_gpu("icm_backward", grad, *arguments)
