"""What only the clustering's Triton forward has: blocks of its own, and no float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import frd_kernels as fk
from frd_kernels import _triton

from .cases import Grid, laid_out
from .test_forward import check

if _triton.problem():
    pytest.skip(_triton.problem(), allow_module_level=True)

pytestmark = pytest.mark.slow

OPS = getattr(torch.ops, _triton.NAMESPACE)


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    """Runs each test on the backend, with new tensors on its device."""
    with fk.use_backend("triton"), torch.device(_triton.DEVICE):
        yield


def gates() -> list[torch.Tensor]:
    return [torch.tensor([1.7]), torch.tensor([-0.4])]


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
    centres, labels, similarity, counts, _ = OPS.cluster(k, v, None, *gates(), [64, 64], [8, 8], 0)
    token = torch.arange(64)
    assert torch.equal(labels[0] // 64 // 8 * 8 + labels[0] % 64 // 8, token.int())
    assert torch.equal(counts[0].nonzero()[:, 0], labels[0].sort().values.long()) and counts.sum() == 64
    torch.testing.assert_close(similarity, torch.ones(1, 64))
    bins = torch.arange(4096)
    torch.testing.assert_close(centres[0], v[0, bins // 64 // 8 * 8 + bins % 64 // 8])


@pytest.mark.parametrize("op", ["cluster", "icm", "cluster_dispatch"])
def test_float64_is_composed(op: str) -> None:
    """The public functions take it; the operators say that they do not."""
    x, sizes = torch.randn(2, 30, 5, dtype=torch.float64), ([5, 6], [2, 3])
    labels, gate = torch.zeros(2, 30, dtype=torch.int32), torch.ones(1, dtype=torch.float64)
    calls = {
        "cluster": lambda: OPS.cluster(x, x, None, gate, gate, sizes[1], sizes[0], 0),
        "icm": lambda: OPS.icm(x, [x.new_empty(0)] * 4, gate, gate, sizes[1], sizes[0], 0),
        "cluster_dispatch": lambda: OPS.cluster_dispatch(x, labels, x[..., 0], False),
    }
    with pytest.raises(NotImplementedError, match="float32, got float64"):
        calls[op]()
