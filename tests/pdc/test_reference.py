"""The oracle itself: `reference.pdc2d` against the published formulas, written out tap by tap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from frd_kernels import reference

from .cases import KINDS, assert_rounded_once, eager, magnitude

Pair = tuple[int, int]

# (minuend, subtrahend) of weight k, as row-major indices into a 3x3 window.
CLOCKWISE = {0: 1, 1: 2, 2: 5, 5: 8, 8: 7, 7: 6, 6: 3, 3: 0}
# The same for radial, weights 1 to 8, as indices into a 5x5 window: the outer ring and the inner one.
OUTER = [0, 2, 4, 10, 14, 20, 22, 24]
INNER = [6, 7, 8, 11, 13, 16, 17, 18]

GEOMETRIES = [  # in and out channels, groups, stride, padding, dilation
    (1, 1, 1, (1, 1), (0, 0), (1, 1)),
    (2, 3, 1, (1, 1), (1, 1), (1, 1)),
    (4, 4, 4, (1, 1), (2, 2), (2, 2)),
    (3, 6, 3, (2, 2), (1, 1), (1, 1)),  # depthwise with multiplier 2
    (4, 6, 2, (2, 1), (0, 2), (1, 2)),
    (2, 2, 2, (3, 2), (4, 1), (3, 3)),
]


def restated(
    x: torch.Tensor,
    weight: torch.Tensor,
    kind: str,
    theta: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> torch.Tensor:
    """One output at a time, one group at a time, from the formulas of PiDiNet. x [B, C, H, W] float64."""
    side = 5 if kind == "radial" else 3
    reach = side // 2
    top, left = (p + (reach - 1) * d for p, d in zip(padding, dilation, strict=True))
    x = F.pad(x, (left, left, top, top))
    span = [(side - 1) * d for d in dilation]
    rows, columns = (
        (size - s - 1) // step + 1 for size, s, step in zip(x.shape[2:], span, stride, strict=True)
    )
    out = x.new_zeros(x.shape[0], weight.shape[0], rows, columns)
    per_group = weight.shape[0] // groups
    for o in range(weight.shape[0]):
        first = o // per_group * weight.shape[1]
        channels = slice(first, first + weight.shape[1])
        for r in range(rows):
            for c in range(columns):
                y0, x0 = r * stride[0], c * stride[1]
                window = x[
                    :, channels, y0 : y0 + span[0] + 1 : dilation[0], x0 : x0 + span[1] + 1 : dilation[1]
                ]
                out[:, o, r, c] = formula(window.flatten(2), weight[o].flatten(1), kind, theta).sum(-1)
    return out


def formula(p: torch.Tensor, w: torch.Tensor, kind: str, theta: float) -> torch.Tensor:
    """p [B, I, pixels of a window], w [I, 9] -> [B, I]."""
    if kind == "vanilla":
        return sum(w[:, k] * p[..., k] for k in range(9))
    if kind == "central":
        return sum(w[:, k] * p[..., k] for k in range(9)) - theta * p[..., 4] * w.sum(-1)
    if kind == "angular":
        ring = sum(w[:, k] * (p[..., k] - theta * p[..., n]) for k, n in CLOCKWISE.items())
        return ring + (1 - theta) * w[:, 4] * p[..., 4]
    rays = sum(
        w[:, k] * (p[..., o] - theta * p[..., i])
        for k, (o, i) in enumerate(zip(OUTER, INNER, strict=True), start=1)
    )
    return rays + (1 - theta) * w[:, 0] * p[..., 12]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("channels", "filters", "groups", "stride", "padding", "dilation"), GEOMETRIES)
def test_matches_the_formulas(
    kind: str,
    theta: float,
    channels: int,
    filters: int,
    groups: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> None:
    x = torch.randn(2, channels, 7, 8, dtype=torch.float64)
    weight = torch.randn(filters, channels // groups, 3, 3, dtype=torch.float64)
    bias = torch.randn(filters, dtype=torch.float64)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    out = reference.pdc2d(x, weight, bias, kind=kind, theta=theta, **options)
    expected = restated(x, weight, kind, theta, stride, padding, dilation, groups) + bias[:, None, None]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_named_paddings(kind: str) -> None:
    x, weight = torch.randn(1, 2, 7, 8), torch.randn(3, 2, 3, 3)
    same = reference.pdc2d(x, weight, kind=kind, padding="same", dilation=(3, 2))
    assert same.shape == (1, 3, 7, 8)
    assert torch.equal(same, reference.pdc2d(x, weight, kind=kind, padding=(3, 2), dilation=(3, 2)))
    valid = reference.pdc2d(x, weight, kind=kind, padding="valid", stride=2)
    assert torch.equal(valid, reference.pdc2d(x, weight, kind=kind, padding=0, stride=2))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("vanilla", [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("central", [-4, -3, -2, -1, 0, 1, 2, 3, 4]),
        ("angular", [-1, -1, -3, 3, 0, -3, 3, 1, 1]),
    ],
)
def test_each_weight_sees_its_difference(kind: str, expected: list[int]) -> None:
    """The image 1..9 under nine filters of one weight each."""
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    out = reference.pdc2d(x, torch.eye(9).view(9, 1, 3, 3), kind=kind)
    assert out.flatten().tolist() == expected


def test_each_radial_weight_sees_its_ray() -> None:
    """The image 0..24: outer minus inner pixel, in PiDiNet's order of the weights; weight 0 is unused."""
    x = torch.arange(25.0).view(1, 1, 5, 5)
    out = reference.pdc2d(x, torch.eye(9).view(9, 1, 3, 3), kind="radial", padding=0)[:, :, 1, 1]
    assert out.flatten().tolist() == [0, -6, -5, -4, -1, 1, 4, 5, 6]
    half = reference.pdc2d(x, torch.eye(9).view(9, 1, 3, 3), kind="radial", theta=0.5)[:, :, 1, 1]
    assert half.flatten().tolist() == [6, -3, -1.5, 0, 4.5, 7.5, 12, 13.5, 15]


def test_radial_reaches_over_zeros() -> None:
    """padding=0 as for a 3x3 kernel: on a 3x3 image the outer ring lies outside, and counts as zeros."""
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    out = reference.pdc2d(x, torch.eye(9).view(9, 1, 3, 3), kind="radial")
    assert out.flatten().tolist() == [0, -1, -2, -3, -4, -6, -7, -8, -9]


@pytest.mark.parametrize("kind", ["vanilla", "central", "angular"])
def test_theta_zero_is_the_plain_convolution(kind: str) -> None:
    x, weight = torch.randn(2, 4, 6, 7, dtype=torch.float64), torch.randn(6, 2, 3, 3, dtype=torch.float64)
    options: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    out = reference.pdc2d(x, weight, kind=kind, theta=0.0, **options)
    torch.testing.assert_close(out, F.conv2d(x, weight, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [0.0, 0.7, 1.0])
def test_equals_the_plain_kernel_and_the_eager_form(kind: str, theta: float) -> None:
    x, weight = torch.randn(2, 4, 9, 9, dtype=torch.float64), torch.randn(6, 2, 3, 3, dtype=torch.float64)
    out = reference.pdc2d(x, weight, kind=kind, theta=theta, padding=2, dilation=2, stride=2, groups=2)
    plain = reference.pdc_weight(weight, kind=kind, theta=theta)
    assert plain.shape == (6, 2, 5, 5) if kind == "radial" else (6, 2, 3, 3)
    padding = 4 if kind == "radial" else 2
    torch.testing.assert_close(out, F.conv2d(x, plain, None, 2, padding, 2, 2), rtol=0, atol=1e-12)
    baseline = eager(x, weight, kind=kind, theta=theta, padding=2, dilation=2, stride=2, groups=2)
    torch.testing.assert_close(out, baseline, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "unused"), [("central", 4), ("angular", 4), ("radial", 0)])
def test_unused_weight_has_no_gradient(kind: str, unused: int) -> None:
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    reference.pdc2d(torch.randn(1, 2, 6, 6), weight, kind=kind).square().sum().backward()
    assert weight.grad is not None
    zero = weight.grad.flatten(2) == 0
    assert zero[..., unused].all() and zero.sum() == zero[..., unused].sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bit_is_rounded_once(kind: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, 4, 6, 6).to(dtype), torch.randn(6, 4, 3, 3).to(dtype)
    exact = reference.pdc2d(x.double(), weight.double(), kind=kind, theta=0.7)
    out = reference.pdc2d(x, weight, kind=kind, theta=0.7)
    assert out.dtype == dtype
    assert_rounded_once(out, exact, magnitude(x, weight))


def test_unbatched() -> None:
    x, weight = torch.randn(4, 6, 7), torch.randn(6, 2, 3, 3)
    batched = reference.pdc2d(x[None], weight, kind="radial", groups=2)
    torch.testing.assert_close(reference.pdc2d(x, weight, kind="radial", groups=2), batched[0])
