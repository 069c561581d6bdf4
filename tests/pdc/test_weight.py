"""The weight transform: against a table written out by hand, its transpose, rounding that keeps the sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from frd_kernels.pdc.kinds import Kind

from ..backends import is_slow

OP = "pdc_weight"

KINDS = list(Kind)
OUTER = [0, 2, 4, 10, 14, 20, 22, 24]
INNER = [6, 7, 8, 11, 13, 16, 17, 18]


def expected(weight: torch.Tensor, kind: Kind, theta: float) -> torch.Tensor:
    """PiDiNet's formulas, weight [O, I, 3, 3] in float64."""
    w = weight.flatten(2)
    if kind == Kind.VANILLA:
        return weight.clone()
    if kind == Kind.CENTRAL:
        v = w.clone()
        v[..., 4] -= theta * w.sum(-1)
        return v.view_as(weight)
    if kind == Kind.ANGULAR:
        return (w - theta * w[..., [3, 0, 1, 6, 4, 2, 7, 8, 5]]).view_as(weight)
    v = w.new_zeros(*w.shape[:2], 25)
    v[..., OUTER] = w[..., 1:]
    v[..., INNER] = -theta * w[..., 1:]
    v[..., 12] = (1 - theta) * w[..., 0]
    return v.view(*w.shape[:2], 5, 5)


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_the_formulas(ops: Any, kind: Kind, theta: float, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 5, 3, 3, dtype=dtype)
    out = ops.pdc_weight(weight, kind, theta, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(
        out.double(), expected(weight.double(), kind, theta), rtol=0, atol=8 * tolerance
    )


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(backend: str, ops: Any, kind: Kind) -> None:
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def f(w: torch.Tensor) -> torch.Tensor:
        return ops.pdc_weight(w, kind, 0.6, torch.float64)

    assert gradcheck(f, (weight,), fast_mode=is_slow(backend))
    assert gradgradcheck(f, (weight,), fast_mode=is_slow(backend))


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(ops: Any, kind: Kind, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    torch.library.opcheck(ops.pdc_weight.default, (weight, kind, 0.7, dtype))
    grad = torch.randn(ops.pdc_weight(weight, kind, 0.7, dtype).shape, dtype=dtype, requires_grad=True)
    torch.library.opcheck(ops.pdc_weight_backward.default, (grad, kind, 0.7, torch.float32))


@pytest.mark.kernels
@pytest.mark.parametrize("kind", [Kind.CENTRAL, Kind.ANGULAR, Kind.RADIAL])
@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_rounding_keeps_the_sum(ops: Any, kind: Kind, dtype: torch.dtype, ulp: float) -> None:
    weight = torch.randn(64, 64, 3, 3)
    exact = expected(weight.double(), kind, 1.0).flatten(2)
    balanced = ops.pdc_weight(weight, kind, 1.0, dtype).double().flatten(2)
    plain = exact.to(dtype).double()
    if kind == Kind.CENTRAL:  # few taps are small enough to take what is left of the sum
        assert balanced.sum(-1).norm() <= plain.sum(-1).norm() / 50
    else:
        assert not balanced.sum(-1).any()
    # No tap strays further than one and a half ulps of the largest one.
    largest = exact.abs().amax(-1, keepdim=True)
    assert ((balanced - exact).abs() <= 3.01 * ulp * largest).all()


def weights_to_round(pairs: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights [1, pairs, 3, 3] of a trained layer's size, and those that are hard to round to `dtype`."""
    normal, shift = torch.randn(8, pairs, 3, 3), torch.randint(-20, 20, (pairs, 3, 3))
    half = torch.finfo(dtype).eps / 2
    ties = 1 + half * torch.randint(0, 64, (pairs, 3, 3)) + 2.0**-23 * torch.randint(-2, 3, (pairs, 3, 3))
    special = torch.tensor([0.0, -0.0, 1.0, 2.0**-20, torch.inf, torch.nan])
    found = {
        "trained": 0.04 * normal[0],
        "16 bit": (0.04 * normal[1]).to(dtype).float(),
        "few bits": torch.randint(-16, 17, (pairs, 3, 3)) / 16,
        "ties": ties * torch.randn(pairs, 3, 3).sign(),
        "scales": normal[2] * 2.0 ** (shift // 3),
        "far scales": normal[3] * 2.0**shift,
        "small": normal[4] * torch.finfo(dtype).tiny * 2.0**6,
        "smallest": normal[5] * torch.finfo(dtype).tiny,
        "large": normal[6] * torch.finfo(dtype).max / 4,
        "special": torch.where(shift > 5, special[shift % 6], normal[7]),
    }
    return {name: weight[None] for name, weight in found.items()}


@pytest.mark.kernels
@pytest.mark.parametrize("kind", [Kind.CENTRAL, Kind.ANGULAR, Kind.RADIAL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_the_bits_of_the_cpu(backend: str, ops: Any, kind: Kind, dtype: torch.dtype) -> None:
    """On CUDA in float where that is exact; on the CPU in double."""
    for name, weight in weights_to_round(512 if is_slow(backend) else 8192, dtype).items():
        found = ops.pdc_weight(weight, kind, 1.0, dtype).cpu()
        wanted = torch.ops.frd.pdc_weight(weight.cpu(), kind, 1.0, dtype)
        same = (found.view(torch.int16) == wanted.view(torch.int16)) | (found.isnan() & wanted.isnan())
        different = (~same).flatten(2).any(-1).sum()
        assert not different, f"{name}: {different} pairs differ"


@pytest.mark.kernels
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_special_values_pass(ops: Any, special: float) -> None:
    weight = torch.ones(1, 1, 3, 3)
    weight[0, 0, 0, 1] = special
    out = ops.pdc_weight(weight, Kind.VANILLA, 1.0, torch.bfloat16).float()
    torch.testing.assert_close(out, weight, equal_nan=True)
    assert not ops.pdc_weight(weight, Kind.ANGULAR, 1.0, torch.bfloat16).isfinite().all()


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (3, 0, 3, 3)])
def test_empty(ops: Any, shape: tuple[int, ...]) -> None:
    out = ops.pdc_weight(torch.empty(shape), Kind.RADIAL, 1.0, torch.float32)
    assert out.shape == (*shape[:2], 5, 5)


@pytest.mark.native
def test_bad_arguments(ops: Any) -> None:
    with pytest.raises(ValueError, match=r"weight must be \[O, I, 3, 3\]"):
        ops.pdc_weight(torch.ones(2, 2, 5, 5), Kind.ANGULAR, 1.0, torch.float32)
    with pytest.raises(ValueError, match="kind must be"):
        ops.pdc_weight(torch.ones(2, 2, 3, 3), 9, 1.0, torch.float32)
    with pytest.raises(ValueError, match="must be float32"):
        ops.pdc_weight(torch.ones(2, 2, 3, 3, dtype=torch.int32), 1, 1.0, torch.float32)
