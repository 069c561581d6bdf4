"""The difference convolution on every backend, against the oracle in float64; its gradients: test_backward.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import frd_kernels as fk
from frd_kernels import reference

from ..backends import subset
from .cases import (
    DEPTHWISE,
    DTYPES,
    KINDS,
    LAYOUTS,
    assert_layout,
    assert_rounded_once,
    doubles,
    eager,
    magnitude,
    worst,
)

OP = "pdc2d"

DENSE: list[tuple[int, int, int, dict[str, Any]]] = [  # in and out channels, groups, options
    (1, 3, 1, {"padding": 1}),
    (3, 8, 1, {"padding": "same", "dilation": 2}),
    (8, 4, 2, {"padding": 1, "stride": 2}),
    (3, 6, 3, {"padding": (0, 2), "stride": (2, 1), "dilation": (1, 3)}),
    (17, 2, 1, {}),
]
THETAS = [0.0, 0.7, 1.0]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_depthwise(backend: str, device: torch.device, kind: str, dtype: torch.dtype, layout: str) -> None:
    blends = [(0.0, True), (0.7, False), (0.7, True), (1.0, False)]
    cases = [(*case, *blend) for case in DEPTHWISE for blend in blends]
    for batch, channels, height, width, options, theta, biased in subset(backend, cases):
        x = torch.randn(batch, channels, height, width, device=device).to(dtype)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        weight = torch.randn(channels, 1, 3, 3, device=device).to(dtype)
        bias = torch.randn(channels, device=device).to(dtype) if biased else None
        keywords = options | {"kind": kind, "theta": theta, "groups": channels}
        out = fk.pdc2d(x, weight, bias, **keywords)
        exact = reference.pdc2d(*doubles(x, weight, bias), **keywords)
        assert out.dtype == dtype
        assert_rounded_once(out, exact, magnitude(x, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "filters", "groups", "options"), DENSE, ids=str)
def test_dense(
    device: torch.device,
    kind: str,
    dtype: torch.dtype,
    layout: str,
    channels: int,
    filters: int,
    groups: int,
    options: dict[str, Any],
) -> None:
    x = torch.randn(2, channels, 9, 11, dtype=dtype, device=device).contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(filters, channels // groups, 3, 3, dtype=dtype, device=device)
    bias = torch.randn(filters, dtype=dtype, device=device)
    for theta in THETAS:
        keywords = options | {"kind": kind, "theta": theta, "groups": groups}
        out = fk.pdc2d(x, weight, bias, **keywords)
        exact = reference.pdc2d(*doubles(x, weight, bias), **keywords)
        assert_rounded_once(out, exact, magnitude(x, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [16, 2, 1], ids=["depthwise", "grouped", "dense"])
@pytest.mark.parametrize("mean", [0.0, 8.0])
def test_low_precision_errs_at_most_twice_as_much_as_eager(
    device: torch.device, kind: str, theta: float, dtype: torch.dtype, groups: int, mean: float
) -> None:
    x = (torch.rand(2, 16, 20, 20, device=device) + mean).to(dtype)
    weight = (torch.randn(16, 16 // groups, 3, 3, device=device) / 3).to(dtype)
    options: dict[str, Any] = {"kind": kind, "theta": theta, "padding": 1, "groups": groups}
    exact = reference.pdc2d(x.double(), weight.double(), **options)
    ours, baseline = fk.pdc2d(x, weight, **options), eager(x, weight, **options)
    assert worst(ours, exact) <= 2 * worst(baseline, exact)


@pytest.mark.parametrize("kind", ["central", "angular"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_mean_errs_a_third_of_eager(
    device: torch.device, kind: str, dtype: torch.dtype, layout: str
) -> None:
    """What a net sees after a ReLU: the difference is small against its operands. Inside the image: at the
    border the zeros are subtracted from them, and the result is as large as they are."""
    x = (8 + torch.rand(2, 32, 24, 24, device=device)).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    weight = (torch.rand(32, 1, 3, 3, device=device) / 3).to(dtype)
    options: dict[str, Any] = {"kind": kind, "groups": 32}
    exact = reference.pdc2d(x.double(), weight.double(), **options)
    ours, baseline = fk.pdc2d(x, weight, **options), eager(x, weight, **options)
    assert 3 * worst(ours, exact) <= worst(baseline, exact)


@pytest.mark.parametrize("kind", ["central", "angular", "radial"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_input_gives_zero(device: torch.device, kind: str, dtype: torch.dtype, layout: str) -> None:
    x = torch.full((1, 9, 12, 13), 0.3, dtype=dtype, device=device).contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(9, 1, 3, 3, device=device).to(dtype)
    out = fk.pdc2d(x, weight, kind=kind, padding=1, groups=9)
    border = 2 if kind == "radial" else 1
    assert (out[..., border:-border, border:-border] == 0).all()


def variants(device: torch.device) -> dict[str, torch.Tensor]:
    """Views [2, 6, 7, 9] of larger or smaller tensors."""
    big = torch.randn(3, 9, 11, 13, device=device)
    return {
        "slice with offset": big[1:, 2:8, 3:10, 1:10],
        "every other column": torch.randn(2, 6, 7, 18, device=device)[..., 1::2],
        "permuted": torch.randn(2, 7, 6, 9, device=device).transpose(1, 2),
        "transposed image": torch.randn(2, 6, 9, 7, device=device).mT,
        "expanded batch": torch.randn(1, 6, 7, 9, device=device).expand(2, 6, 7, 9),
        "expanded channels": torch.randn(2, 1, 7, 9, device=device).expand(2, 6, 7, 9),
        "expanded pixels": torch.randn(2, 6, 1, 1, device=device).expand(2, 6, 7, 9),
        "slice of channels_last": big.to(memory_format=torch.channels_last)[1:, 2:8, 3:10, 1:10],
    }


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", variants(torch.device("cpu")))
def test_views(backend: str, device: torch.device, kind: str, name: str) -> None:
    x = variants(device)[name]
    weight = torch.randn(3, 3, 1, 6, device=device).permute(3, 2, 0, 1)
    bias = torch.randn(12, device=device)[::2]
    out = fk.pdc2d(x, weight, bias, kind=kind, padding=1, groups=6)
    exact = reference.pdc2d(*doubles(x, weight, bias), kind=kind, padding=1, groups=6)
    assert_rounded_once(out, exact, magnitude(x, weight, bias))
    assert out.is_contiguous() or backend == "reference"


def test_operands_are_not_written(device: torch.device) -> None:
    operands = [torch.randn(shape, device=device) for shape in ((1, 4, 6, 6), (4, 1, 3, 3), (4,))]
    before = [t.clone() for t in operands]
    fk.pdc2d(*operands, kind="radial", padding=1, groups=4)
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"padding": 2, "dilation": 2}], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 9), (1, 5, 7, 9), (2, 1, 7, 9), (2, 5, 5, 5), (0, 5, 7, 9)], ids=str
)
def test_depthwise_output_keeps_the_layout(
    device: torch.device, layout: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """channels_last where x is dense in it; a tensor that is both (one channel, no pixel) counts as NCHW."""
    x = torch.randn(shape, device=device).contiguous(memory_format=LAYOUTS[layout])
    out = fk.pdc2d(
        x, torch.randn(shape[1], 1, 3, 3, device=device), kind="angular", groups=shape[1], **options
    )
    assert_layout(out, "nchw" if x.is_contiguous() else layout)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [4, 1])
def test_empty_batch_and_unbatched(device: torch.device, kind: str, groups: int) -> None:
    weight = torch.randn(4, 4 // groups, 3, 3, device=device, requires_grad=True)
    x = torch.randn(0, 4, 6, 7, device=device, requires_grad=True)
    out = fk.pdc2d(x, weight, kind=kind, stride=2, padding=1, groups=groups)
    assert out.shape == (0, 4, 3, 4)
    dx, dw = torch.autograd.grad(out.sum(), (x, weight))
    assert dx.shape == x.shape and dw.shape == weight.shape and (dw == 0).all()
    image = torch.randn(4, 6, 7, device=device)
    unbatched = fk.pdc2d(image, weight, kind=kind, stride=2, padding=1, groups=groups)
    batched = fk.pdc2d(image[None], weight, kind=kind, stride=2, padding=1, groups=groups)
    assert torch.equal(unbatched, batched[0])


def test_image_of_padding_alone(device: torch.device) -> None:
    """An image without pixels has an output where the padding covers a window; nn.Conv2d refuses it."""
    x = torch.randn(2, 3, 0, 4, device=device, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, device=device, requires_grad=True)
    out = fk.pdc2d(x, weight, torch.ones(3, device=device), kind="radial", padding=2, groups=3)
    assert out.shape == (2, 3, 2, 6) and (out == 1).all()
    dx, dw = torch.autograd.grad(out.sum(), (x, weight))
    assert dx.shape == x.shape and (dw == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [0.7, 1.0])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_values_pass(
    device: torch.device, kind: str, theta: float, special: float, layout: str
) -> None:
    x = torch.randn(1, 3, 9, 9, device=device).contiguous(memory_format=LAYOUTS[layout])
    x[0, 1, 4, 4] = special
    weight = torch.rand(3, 1, 3, 3, device=device) + 0.5
    options: dict[str, Any] = {"kind": kind, "theta": theta, "padding": 1, "groups": 3}
    out = fk.pdc2d(x, weight, **options)
    exact = reference.pdc2d(*doubles(x, weight), **options)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    spoilt, baseline = ~out.isfinite(), ~eager(x, weight, **options).isfinite()
    # A plain kernel multiplies the pixels it does not use by 0 and spoils their outputs, too.
    assert (baseline | ~spoilt).all()
    if kind in ("vanilla", "central"):
        assert torch.equal(spoilt, baseline)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_overflow_and_subnormals_round_as_torch_does(device: torch.device, dtype: torch.dtype) -> None:
    """The product is exact in float32; the largest are beyond the range, the smallest below the normal one."""
    exponents = torch.arange(-27.0, 16.0, device=device)
    x = torch.cat([1.17 * 2**exponents, -1.93 * 2**exponents]).view(1, 1, 2, 43).to(dtype)
    weight = torch.zeros(1, 1, 3, 3, dtype=dtype, device=device)
    weight[..., 1, 1] = 1.41
    out = fk.pdc2d(x, weight, kind="vanilla", padding=1)
    assert torch.equal(out, (x.float() * weight[..., 1, 1].float()).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_pidinets_names(device: torch.device, kind: str) -> None:
    x, weight = torch.randn(1, 4, 6, 6, device=device), torch.randn(4, 1, 3, 3, device=device)
    short = {"vanilla": "cv", "central": "cd", "angular": "ad", "radial": "rd"}[kind]
    outputs = [fk.pdc2d(x, weight, kind=name, padding=1, groups=4) for name in (kind, short)]
    assert torch.equal(*outputs)


def test_reference_backend_is_the_reference() -> None:
    x, weight, bias = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 3, 3), torch.randn(4)
    for groups, w in ((4, weight), (1, torch.randn(4, 4, 3, 3))):
        with fk.use_backend("reference"):
            out = fk.pdc2d(x, w, bias, kind="angular", theta=0.7, padding=1, groups=groups)
            plain = fk.pdc_weight(w, kind="angular", theta=0.7)
        assert torch.equal(
            out, reference.pdc2d(x, w, bias, kind="angular", theta=0.7, padding=1, groups=groups)
        )
        assert torch.equal(plain, reference.pdc_weight(w, kind="angular", theta=0.7))
