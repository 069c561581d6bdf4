"""What a forward pass keeps has one layout: the backward of every backend takes it from every other one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from frd_kernels.backend import PROVIDERS

from .. import backends
from .cases import VARIANTS, Case, clear_case, laid_out

pytestmark = pytest.mark.slow

NAMES = [name for name in backends.running("icm") if name != "reference"]
PAIRS = [(forward, backward) for forward in NAMES for backward in NAMES if forward != backward]
CASE = Case((20, 17), [(4, 5), (2, 2), (2, 1)], 16, "mixed")


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    for name in NAMES:
        backends.prepare(name)


def ops_of(name: str) -> Any:
    return getattr(torch.ops, PROVIDERS[name].namespace)


def assert_same(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        if isinstance(a, torch.Tensor):
            scale = b.abs().max().item() if b.numel() else 0.0
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-5 * max(scale, 1e-3))
        else:
            assert_same(a, b)


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_icm(forward: str, backward: str, variant: str) -> None:
    x, maps, options = clear_case(CASE, variant)
    flat: list[torch.Tensor] = []
    for projection in maps:
        parts = projection or [x.new_empty(0)] * 4
        flat += [x.new_zeros(CASE.channels) if part is None else part for part in parts]
    gates = [options[name].reshape(-1) for name in ("alpha", "beta")]
    sizes = ([side for grid in CASE.grids for side in grid], list(CASE.hw), VARIANTS.index(variant))
    tensors = [[p.to(backends.device_of(name)) for p in (x, *flat, *gates)] for name in (forward, backward)]
    first, second = ((t[0], t[1:13], *t[13:]) for t in tensors)
    out, labels, saved = ops_of(forward).icm(*first, *sizes)
    grad = torch.randn(out.shape)
    wanted = ops_of(forward).icm_backward(grad.to(out.device), *first, labels, saved, *sizes)
    kept = [t.to(backends.device_of(backward)) for t in (grad, labels, saved)]
    found = ops_of(backward).icm_backward(kept[0], *second, *kept[1:], *sizes)
    assert_same(found, wanted)


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("aggregate", [0, 1])
def test_cluster(forward: str, backward: str, aggregate: int, masked: bool) -> None:
    k, v = laid_out((2, 340, 12), torch.float32, "image"), laid_out((2, 340, 12), torch.float32, "tokens")
    mask = torch.rand(2, 340) > 0.3 if masked else None
    gates, sizes = [torch.tensor([1.5]), torch.tensor([-0.25])], ([3, 4], [20, 17], aggregate)
    sides = [
        [None if t is None else t.to(backends.device_of(name)) for t in (k, v, mask, *gates)]
        for name in (forward, backward)
    ]
    centres, labels, similarity, _counts, saved = ops_of(forward).cluster(*sides[0], *sizes)
    grads = torch.randn(centres.shape), torch.randn(similarity.shape)

    def run(name: str, side: list[Any]) -> Any:
        given = [t.to(backends.device_of(name)) for t in (*grads, labels, saved)]
        inputs = [side[0], side[1], *side[3:]]
        return ops_of(name).cluster_backward(*given[:2], *inputs, *given[2:], *sizes)

    assert_same(run(backward, sides[1]), run(forward, sides[0]))
