"""The clustering's Triton forward by itself: sizes at its edges, masks, what it keeps for any backend's backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from frd_kernels import _triton

from .. import backends
from .cases import Case, clear_case, clear_tokens, laid_out
from .test_forward import check

if _triton.problem():
    pytest.skip(_triton.problem(), allow_module_level=True)

from frd_kernels.cluster.triton import assign

pytestmark = pytest.mark.slow

Grid = tuple[int, int]
OPS = getattr(torch.ops, _triton.NAMESPACE)
GATES = (1.7, -0.4)


@pytest.fixture(autouse=True)
def on_triton() -> Any:
    """Runs each test on the backend, with new tensors on its device."""
    import frd_kernels as fk

    with fk.use_backend("triton"), torch.device(_triton.DEVICE):
        yield


def gates(dtype: torch.dtype, size: int = 1) -> list[torch.Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.full((size,), value, dtype=wide) for value in GATES]


def on_cpu(arguments: Any) -> Any:
    if isinstance(arguments, torch.Tensor):
        return arguments.cpu()
    return [on_cpu(a) if isinstance(a, (torch.Tensor, list)) else a for a in arguments]


def assert_alike(found: Any, wanted: Any, tolerance: float) -> None:
    """Within `tolerance` of the largest element; integers equal."""
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if not b.is_floating_point():
            assert torch.equal(a.cpu(), b), f"tensor {number}"
            continue
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(
            a.cpu().double(),
            b.double(),
            rtol=0,
            atol=tolerance * largest,
            msg=lambda m, n=number: f"{n}: {m}",
        )


TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("aggregate", [0, 1])
def test_the_cpu_backward_takes_what_cluster_keeps(dtype: torch.dtype, aggregate: int) -> None:
    hw, grid = (13, 11), (3, 2)
    k, v = clear_tokens(hw, grid, 20, dtype, 1e-4)
    arguments = [k, v, None, *gates(dtype), grid, hw, aggregate]
    found, wanted = OPS.cluster(*arguments), torch.ops.frd.cluster(*on_cpu(arguments))
    assert_alike(found, wanted, TOLERANCE[dtype])
    # Of the same sums: beyond the centres themselves no result is rounded to 16 bit.
    assert_alike([found[2], found[4]], [wanted[2], wanted[4]], 1e-11 if dtype == torch.float64 else 2e-6)
    given = torch.randn(2, 6, 20).to(dtype), torch.randn(2, hw[0] * hw[1]).to(found[2].dtype)
    rest = [k, v, *gates(dtype)]
    grads = [
        torch.ops.frd.cluster_backward(*on_cpu([*given, *rest, labels, saved]), grid, hw, aggregate)
        for _, labels, _, _, saved in (found, wanted)
    ]
    assert_alike(*grads, TOLERANCE[dtype])


CASES = [
    Case((12, 10), [(4, 2), (2, 2), (2, 1)], 20, "mixed"),
    Case((7, 9), [(3, 3)], 33, "biases"),
    Case((6, 5), [(4, 4), (3, 2), (2, 2)], 16, "none"),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case.grids)}-{case.projected}")
def test_the_cpu_backward_takes_what_icm_keeps(dtype: torch.dtype, variant: str, case: Case) -> None:
    x, maps, options = clear_case(case, variant, dtype, "image", clear=2e-5)
    flat = [x.new_zeros(x.size(2)) if p is None else p for m in maps for p in (m or [x.new_empty(0)] * 4)]
    sides = [side for grid in case.grids for side in grid]
    form = 0 if variant == "paper" else 1
    wide = gates(dtype)[0].dtype
    slopes = [options[name].reshape(-1).to(wide) for name in ("alpha", "beta")]
    arguments = [x, flat, *slopes, sides, list(case.hw), form]
    found, wanted = OPS.icm(*arguments), torch.ops.frd.icm(*on_cpu(arguments))
    assert_alike(found, wanted, TOLERANCE[dtype])
    assert_alike([found[2]], [wanted[2]], 1e-10 if dtype == torch.float64 else 1e-5)
    given = torch.randn(x.shape).to(dtype)
    grads = []
    for _, labels, saved in (found, wanted):
        dx, projections, *rest = torch.ops.frd.icm_backward(
            *on_cpu([given, x, flat, *slopes, labels, saved]), sides, list(case.hw), form
        )
        grads.append([dx, *projections, *rest])
    assert_alike(*grads, 2 * TOLERANCE[dtype])


# image, grid, channels: one centre to as many as tokens, channels that fill no block, many chunks
SIZES: list[tuple[Grid, Grid, int]] = [
    ((2, 2), (1, 1), 24),
    ((2, 2), (2, 2), 320),
    ((16, 16), (1, 1), 320),
    ((16, 16), (16, 16), 320),
    ((64, 64), (3, 3), 24),
]


@pytest.mark.parametrize(("hw", "grid", "channels"), SIZES)
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "image"), (torch.bfloat16, "tokens")])
def test_sizes(dtype: torch.dtype, layout: str, hw: Grid, grid: Grid, channels: int) -> None:
    shape = (1, hw[0] * hw[1], channels)
    k, v = laid_out(shape, dtype, layout), laid_out(shape, dtype, layout)
    check(k, v, hw, grid, {"aggregate": "similarity", "alpha": 2.5, "beta": -0.5})


def test_as_many_centres_as_tokens() -> None:
    k, v = laid_out((1, 4096, 3), torch.float32, "tokens"), laid_out((1, 4096, 3), torch.float32, "image")
    check(k, v, (64, 64), (64, 64), {"aggregate": "count"})


def test_more_centres_than_tokens() -> None:
    """Every token lies in 64 bins of its own: its centre is one of them, and no other bin has a token."""
    k, v = torch.randn(2, 1, 64, 20)
    centres, labels, similarity, counts, _ = OPS.cluster(k, v, None, *gates(k.dtype), [64, 64], [8, 8], 0)
    token = torch.arange(64)
    assert torch.equal(labels[0] // 64 // 8 * 8 + labels[0] % 64 // 8, token.int())
    assert torch.equal(counts[0].nonzero()[:, 0], labels[0].sort().values.long()) and counts.sum() == 64
    torch.testing.assert_close(similarity, torch.ones(1, 64))
    bins = torch.arange(4096)
    torch.testing.assert_close(centres[0], v[0, bins // 64 // 8 * 8 + bins % 64 // 8])


@pytest.mark.parametrize("aggregate", [0, 1])
def test_the_last_chunk_and_a_kernel_of_its_own_finish_alike(
    monkeypatch: pytest.MonkeyPatch, aggregate: int
) -> None:
    k, v = torch.randn(2, 2, 300, 24)
    arguments = (k, v, None, *gates(k.dtype), [5, 4], [15, 20], aggregate)
    together = OPS.cluster(*arguments)
    monkeypatch.setattr(assign, "_MAX_LAST_CHUNK_SUMS", 0)
    assert all(torch.equal(a, b) for a, b in zip(OPS.cluster(*arguments), together, strict=True))
    # As one chunk the sums have another order.
    monkeypatch.setattr(assign, "_MAX_FUSED_SUMS", 0)
    assert_alike([t.cpu() for t in OPS.cluster(*arguments)], [t.cpu() for t in together], 1e-6)


def masked_cluster(
    k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, hw: Grid, grid: Grid, aggregate: int
) -> list[torch.Tensor]:
    """`cluster` with a mask, dense and in float64: centres, labels, similarity, counts, 1 / tokens of each bin."""
    k, v = (t.double().masked_fill(~mask.unsqueeze(2), 0) for t in (k, v))
    member = torch.zeros(grid[0] * grid[1], hw[0] * hw[1], dtype=torch.float64)
    for o in range(grid[0] * grid[1]):
        image = torch.zeros(hw, dtype=torch.float64)
        bounds = [
            (i * n // g, -((-(i + 1) * n) // g))
            for i, n, g in zip((o // grid[1], o % grid[1]), hw, grid, strict=True)
        ]
        image[bounds[0][0] : bounds[0][1], bounds[1][0] : bounds[1][1]] = 1
        member[o] = image.flatten()
    number = mask.double() @ member.t()
    share = torch.where(number > 0, 1 / number.clamp_min(1), 0.0)
    pooled_k, pooled_v = (share.unsqueeze(2) * (member @ t) for t in (k, v))
    cosine = F.normalize(k, dim=2) @ F.normalize(pooled_k, dim=2).transpose(1, 2)
    similarity = cosine if aggregate == 0 else torch.sigmoid(GATES[1] + GATES[0] * cosine)
    own, labels = similarity.max(2)
    hot = F.one_hot(labels, similarity.size(2)).double() * mask.unsqueeze(2)
    weights = hot if aggregate == 0 else hot * own.unsqueeze(2)
    centres = (pooled_v + weights.transpose(1, 2) @ v) / (1 + weights.sum(1)).unsqueeze(2)
    labels = labels.masked_fill(~mask, -1).int()
    return [centres, labels, own.masked_fill(~mask, 0), hot.sum(1).int(), share]


MASKS = {
    "random": lambda: torch.rand(3, 143) < 0.6,
    "few": lambda: torch.rand(3, 143) < 0.05,
    "none of one item": lambda: torch.arange(3)[:, None].expand(3, 143) != 1,
    "other strides": lambda: (torch.rand(286, 3) < 0.5).t()[:, ::2],
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    ("dtype", "aggregate"), [(torch.float32, 0), (torch.bfloat16, 1), (torch.float64, 1)]
)
def test_masks(name: str, dtype: torch.dtype, aggregate: int) -> None:
    hw, grid = (13, 11), (4, 3)
    mask = MASKS[name]()
    k, v = torch.randn(2, 3, 143, 20).to(dtype)
    centres, labels, similarity, counts, share = masked_cluster(k, v, mask, hw, grid, aggregate)
    # What does not take part has no effect, whatever it is.
    k[~mask], v[~mask] = float("nan"), float("inf")
    found = OPS.cluster(k, v, mask, *gates(dtype), grid, hw, aggregate)
    assert torch.equal(found[1], labels) and torch.equal(found[3], counts)
    near = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found[2].double(), similarity, rtol=0, atol=near)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(found[0].double(), centres, rtol=rounding, atol=near)
    kept = found[4][:, -12:].double()
    torch.testing.assert_close(kept, share, rtol=1e-6, atol=0)
    scale = found[4][:, 143 : 2 * 143]
    assert ((scale == 0) == ~mask).all() and (found[4][:, :143][~mask] == 0).all()


def test_a_full_mask_changes_no_bit() -> None:
    k, v = torch.randn(2, 2, 143, 20)
    rest = (*gates(k.dtype), [4, 3], [13, 11], 1)
    full = torch.ones(2, 143, dtype=torch.bool)
    backends.assert_same_bits("triton", OPS.cluster(k, v, full, *rest), OPS.cluster(k, v, None, *rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("aggregate", [0, 1])
def test_what_is_not_finite_stays_in_its_cluster_and_channel(dtype: torch.dtype, aggregate: int) -> None:
    """NaN and both infinities among the values, apart and together, in a chunk with finite ones."""
    k, v = torch.randn(2, 1, 143, 20).to(dtype)
    clean = OPS.cluster(k, v, None, *gates(dtype), [4, 3], [13, 11], aggregate)
    own = clean[1][0]
    nan, inf = float("nan"), float("inf")
    odd = v.clone()
    for token, channel, value in [(3, 1, nan), (50, 2, inf), (90, 2, -inf), (142, 7, -inf)]:
        odd[0, token, channel] = value
    found = OPS.cluster(k, odd, None, *gates(dtype), [4, 3], [13, 11], aggregate)
    assert torch.equal(found[1], clean[1]) and torch.equal(found[2], clean[2])
    weights = F.one_hot(own.long(), 12).t().double() * (clean[2].double() if aggregate else 1)
    sums = torch.zeros(12, 20, dtype=torch.float64)
    for n in range(143):
        sums[own[n]] += weights[own[n], n] * odd[0, n].double()
    image = odd.double().transpose(1, 2).unflatten(2, (13, 11))
    pooled = F.adaptive_avg_pool2d(image, (4, 3)).flatten(2).transpose(1, 2)[0]
    wanted = (pooled + sums) / (1 + weights.sum(1)).unsqueeze(1)
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-10
    torch.testing.assert_close(found[0][0].double(), wanted, rtol=rounding, atol=1e-5, equal_nan=True)
