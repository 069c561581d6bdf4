"""The fused block on every backend: its oracle, results in all dtypes and layouts, views, special values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import frd_kernels as fk
from frd_kernels import reference

from ..backends import EMULATED, EMULATED_CHAIN, device_of, prepare, running, subset
from ..pdc.cases import (
    DTYPES,
    KINDS,
    LAYOUTS,
    assert_layout,
    assert_rounded_once,
    block_operands,
    eager,
    eager_block,
    in_double,
    magnitude,
    worst,
)

OP = "pdc_block"

# batch, in and out channels, height, width, options: one pixel, rows and columns that fill no vector, tiles of
# several rows and of a part of one, more channels than a product takes at once (384) or shows at once (48).
CASES: list[tuple[int, int, int, int, int, dict[str, Any]]] = [
    (1, 1, 1, 1, 1, {}),
    (2, 3, 5, 1, 7, {}),
    (1, 8, 49, 2, 3, {"dilation": 2}),
    (2, 17, 8, 17, 31, {}),
    (1, 17, 3, 17, 31, {"stride": 2, "dilation": 2}),
    (1, 64, 64, 5, 6, {"stride": (2, 1)}),
    (3, 16, 97, 9, 8, {"dilation": (1, 3)}),
    (1, 2, 1, 3, 200, {}),
    (1, 5, 7, 4, 131, {"stride": (1, 2), "dilation": 3}),
    (1, 4, 4, 2, 2, {"stride": 3}),
    (1, 400, 6, 3, 3, {}),
]


def block_magnitude(operands: dict[str, torch.Tensor]) -> float:
    """An upper bound of the absolute terms that add up to an output."""
    hidden = magnitude(operands["x"], operands["pdc_weight"], operands.get("pdc_bias"))
    sums = operands["point_weight"].detach().double().abs().flatten(1).sum(1).max().item() * hidden
    ends = [
        operands[n].detach().double().abs().max().item() for n in ("point_bias", "residual") if n in operands
    ]
    return sums + sum(ends)


def products(operands: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """The absolute products that the 1x1 convolution adds up, in float64."""
    ends = ("point_bias", "residual", "point_weight")
    hidden = in_double({name: value for name, value in operands.items() if name not in ends})
    weight = operands["point_weight"].double().abs()
    return reference.pdc_block(**hidden, point_weight=weight, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [6, 2, 1], ids=["depthwise", "grouped", "dense"])
def test_oracle_is_the_chain_of_its_parts(kind: str, theta: float, stride: int, groups: int) -> None:
    operands = block_operands(2, 6, 4, 7, 8, groups=groups, stride=stride, dilation=2, dtype=torch.float64)
    out = reference.pdc_block(**operands, kind=kind, theta=theta, stride=stride, dilation=2)
    expected = eager_block(**operands, kind=kind, theta=theta, stride=stride, dilation=2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    fused = fk.pdc_block(**operands, kind=kind, theta=theta, stride=stride, dilation=2)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-11)


def test_oracle_by_hand() -> None:
    """The image 1..9: the central differences of the middle pixel, their positive part, times 2, plus 100."""
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    for tap, difference in ((0, -4.0), (4, 0.0), (8, 4.0)):
        weight = torch.zeros(1, 1, 3, 3)
        weight.view(9)[tap] = 1.0
        out = reference.pdc_block(
            x, weight, torch.full((1, 1, 1, 1), 2.0), kind="central", residual=torch.full((1, 1, 3, 3), 100.0)
        )
        assert out[0, 0, 1, 1] == 100 + 2 * max(difference, 0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounded_once(backend: str, device: torch.device, kind: str, dtype: torch.dtype, layout: str) -> None:
    """What is between the difference convolution and the output stays in float32, whatever the dtype; only a GPU's
    matrix units take it rounded once, as eager gives it to them."""
    absences = [["pdc_bias"], ["point_bias", "residual"], []]
    cases = [(*case, absences[i % 3], theta) for i, case in enumerate(CASES) for theta in (0.7, 1.0)]
    for batch, channels, filters, height, width, options, absent, theta in subset(backend, cases):
        operands = block_operands(
            batch, channels, filters, height, width, dtype=dtype, layout=layout, device=device, **options
        )
        for name in absent:
            del operands[name]
        out = fk.pdc_block(**operands, kind=kind, theta=theta, **options)
        exact = reference.pdc_block(**in_double(operands), kind=kind, theta=theta, **options)
        assert out.dtype == dtype
        rounded = backend != "cpu" and dtype in (torch.bfloat16, torch.float16)
        terms = products(operands, kind=kind, theta=theta, **options) if rounded else 0.0
        assert_rounded_once(out, exact, block_magnitude(operands), terms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [6, 3, 1], ids=["depthwise", "grouped", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_oracle(device: torch.device, kind: str, groups: int, layout: str) -> None:
    operands = block_operands(2, 6, 4, 7, 8, groups=groups, stride=2, device=device, layout=layout)
    out = fk.pdc_block(**operands, kind=kind, theta=0.7, stride=2)
    exact = reference.pdc_block(**in_double(operands), kind=kind, theta=0.7, stride=2)
    assert_rounded_once(out, exact, block_magnitude(operands))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [16, 4, 1], ids=["depthwise", "grouped", "dense"])
@pytest.mark.parametrize("mean", [0.0, 8.0])
def test_low_precision_errs_at_most_twice_as_much_as_eager(
    device: torch.device, kind: str, dtype: torch.dtype, groups: int, mean: float
) -> None:
    operands = block_operands(2, 16, 24, 14, 14, groups=groups, dtype=dtype, device=device)
    operands["x"] = (torch.rand(2, 16, 14, 14, device=device) + mean).to(dtype)
    exact = reference.pdc_block(**in_double(operands), kind=kind)
    ours, baseline = fk.pdc_block(**operands, kind=kind), eager_block(**operands, kind=kind)
    assert worst(ours, exact) <= 2 * worst(baseline, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["central", "angular"])
def test_large_mean_errs_a_third_of_eager(
    device: torch.device, kind: str, dtype: torch.dtype, layout: str
) -> None:
    """Inside the image, where the difference is small against its operands; the border sees zeros."""
    operands = block_operands(2, 16, 24, 20, 20, dtype=dtype, device=device, layout=layout)
    del operands["residual"], operands["pdc_bias"], operands["point_bias"]
    operands["x"] = (8 + torch.rand_like(operands["x"].float())).to(dtype)
    exact = reference.pdc_block(**in_double(operands), kind=kind)[..., 1:-1, 1:-1]
    ours = fk.pdc_block(**operands, kind=kind)[..., 1:-1, 1:-1]
    baseline = eager_block(**operands, kind=kind)[..., 1:-1, 1:-1]
    assert 3 * worst(ours, exact) <= worst(baseline, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["central", "angular", "radial"])
def test_constant_input_gives_the_residual(
    device: torch.device, kind: str, dtype: torch.dtype, layout: str
) -> None:
    operands = block_operands(1, 9, 9, 12, 13, dtype=dtype, device=device, layout=layout)
    del operands["pdc_bias"], operands["point_bias"]
    operands["x"] = torch.full_like(operands["x"], 0.3)
    inside = (..., slice(2, -2), slice(2, -2))
    assert torch.equal(fk.pdc_block(**operands, kind=kind)[inside], operands["residual"][inside])


def views(device: torch.device) -> dict[str, torch.Tensor]:
    """Views [2, 6, 7, 9] of larger or smaller tensors."""
    big = torch.randn(3, 9, 11, 13, device=device)
    return {
        "slice with offset": big[1:, 2:8, 3:10, 1:10],
        "permuted": torch.randn(2, 7, 6, 9, device=device).transpose(1, 2),
        "expanded batch": torch.randn(1, 6, 7, 9, device=device).expand(2, 6, 7, 9),
        "expanded pixels": torch.randn(2, 6, 1, 1, device=device).expand(2, 6, 7, 9),
        "slice of channels_last": big.to(memory_format=torch.channels_last)[1:, 2:8, 3:10, 1:10],
    }


@pytest.mark.usefixtures("poisoned")
@pytest.mark.kernels
@pytest.mark.parametrize("name", views(torch.device("cpu")))
@pytest.mark.parametrize("where", ["x", "residual", "both"])
def test_views(device: torch.device, name: str, where: str) -> None:
    operands = block_operands(2, 6, 6, 7, 9, device=device)
    for operand in ("x", "residual") if where == "both" else (where,):
        operands[operand] = views(device)[name]
    operands["pdc_weight"] = torch.randn(3, 3, 1, 6, device=device).permute(3, 2, 0, 1)
    operands["point_weight"] = torch.randn(1, 1, 6, 6, device=device).permute(3, 2, 0, 1)
    operands["pdc_bias"] = torch.randn(12, device=device)[::2]
    out = fk.pdc_block(**operands, kind="angular", theta=0.7)
    exact = reference.pdc_block(**in_double(operands), kind="angular", theta=0.7)
    assert_rounded_once(out, exact, block_magnitude(operands))
    assert out.is_contiguous()


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "channels"), [(2, 5), (1, 5), (2, 1), (0, 5)])
def test_output_keeps_the_layout_of_x(
    device: torch.device, layout: str, residual_layout: str, batch: int, channels: int
) -> None:
    operands = block_operands(batch, channels, 4, 6, 7, device=device, layout=layout)
    operands["residual"] = operands["residual"].contiguous(memory_format=LAYOUTS[residual_layout])
    out = fk.pdc_block(**operands, kind="central")
    assert_layout(out, "nchw" if operands["x"].is_contiguous() else layout)
    exact = reference.pdc_block(**in_double(operands), kind="central")
    assert_rounded_once(out, exact, 1.0 if batch == 0 else block_magnitude(operands))


# batch, in and out channels, height, width, kind, theta: ragged tiles and channels; more slabs of channels than shared
# memory holds at once, fully and partly; on an H100 one wave of medium tiles, of more slabs than are in flight.
SMALL_TILES: list[tuple[int, int, int, int, int, str, float]] = [
    (1, 1, 1, 1, 1, "central", 1.0),
    (2, 67, 37, 3, 9, "radial", 1.0),
    (1, 130, 33, 5, 8, "angular", 0.7),
    (1, 1300, 3, 2, 3, "vanilla", 1.0),
    (100, 260, 2, 2, 3, "central", 1.0),
]


@pytest.mark.slow
@pytest.mark.skipif(EMULATED_CHAIN not in running(OP), reason="needs the emulated kernels")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("gpu", ["H100", "A100", "L4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_give_equal_bits(
    gpu: str, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small tiles of "cuda" and of "cuda_chain", on GPUs that choose and fill them differently."""
    prepare(EMULATED_CHAIN)
    cases = SMALL_TILES if gpu == "H100" and dtype != torch.float16 else SMALL_TILES[:4]
    for batch, channels, filters, height, width, kind, theta in cases:
        operands = block_operands(batch, channels, filters, height, width, dtype=dtype, layout=layout)
        with fk.use_backend(EMULATED):
            expected = fk.pdc_block(**operands, kind=kind, theta=theta)
        monkeypatch.setenv("FRD_EMULATED_GPU", gpu)
        with fk.use_backend(EMULATED_CHAIN):
            assert torch.equal(fk.pdc_block(**operands, kind=kind, theta=theta), expected)
        monkeypatch.delenv("FRD_EMULATED_GPU")


@pytest.mark.parametrize("groups", [4, 1])
def test_empty_batch(device: torch.device, groups: int) -> None:
    operands = block_operands(0, 4, 6, 5, 7, groups=groups, device=device)
    for operand in operands.values():
        operand.requires_grad_()
    out = fk.pdc_block(**operands, kind="radial")
    assert out.shape == (0, 6, 5, 7)
    gradients = torch.autograd.grad(out.sum(), list(operands.values()))
    for operand, gradient in zip(operands.values(), gradients, strict=True):
        assert gradient.shape == operand.shape and (gradient == 0).all()


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["vanilla", "central"])
def test_special_values_pass(device: torch.device, kind: str, special: float, layout: str) -> None:
    """The ReLU keeps NaN and inf, and turns -inf into 0, as torch's."""
    operands = block_operands(1, 3, 4, 9, 9, device=device, layout=layout)
    operands["x"][0, 1, 4, 4] = special
    out = fk.pdc_block(**operands, kind=kind)
    exact = reference.pdc_block(**in_double(operands), kind=kind)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True)
    if kind == "vanilla" or special != special:  # eager central has its inf - inf elsewhere
        assert torch.equal(out.isnan(), eager_block(**operands, kind=kind).isnan())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_at_zero_and_beyond(device: torch.device, layout: str) -> None:
    """Its derivative at 0 is 0, and NaN passes; hidden values 0, -1, 1 and NaN come from the bias alone."""
    hidden = [0.0, -0.0, -1.0, 1.0, float("nan")] * 4
    x = torch.zeros(1, 20, 3, 3, device=device).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    bias = torch.tensor(hidden, device=device, requires_grad=True)
    point = torch.ones(1, 20, 1, 1, device=device, requires_grad=True)
    weight = torch.ones(20, 1, 3, 3, device=device)
    out = fk.pdc_block(x, weight, point, kind="vanilla", pdc_bias=bias)
    dx, d_bias, d_point = torch.autograd.grad(out, (x, bias, point), torch.ones_like(out))
    assert out.isnan().all()
    through = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0] * 4, device=device)
    assert torch.equal(d_bias, 9 * through)
    assert torch.equal(dx[0, :, 1, 1], 9 * through)
    kept = F.relu(torch.tensor(hidden, device=device))
    torch.testing.assert_close(d_point.flatten(), 9 * kept, rtol=0, atol=0, equal_nan=True)


def test_operands_are_not_written(device: torch.device) -> None:
    operands = block_operands(1, 4, 4, 6, 6, device=device)
    before = {name: operand.clone() for name, operand in operands.items()}
    fk.pdc_block(**operands, kind="radial")
    assert all(torch.equal(before[name], operands[name]) for name in operands)


def test_reference_backend_is_the_reference() -> None:
    for groups in (4, 1):
        operands = block_operands(2, 4, 5, 6, 7, groups=groups)
        with fk.use_backend("reference"):
            out = fk.pdc_block(**operands, kind="ad", theta=0.7)
        assert torch.equal(out, reference.pdc_block(**operands, kind="angular", theta=0.7))


def test_dense_block_is_composed_of_public_parts(device: torch.device) -> None:
    operands = block_operands(2, 4, 5, 6, 7, groups=1, device=device)
    hidden = fk.pdc2d(operands["x"], operands["pdc_weight"], operands["pdc_bias"], kind="central", padding=1)
    expected = (
        F.conv2d(F.relu(hidden), operands["point_weight"], operands["point_bias"]) + operands["residual"]
    )
    torch.testing.assert_close(fk.pdc_block(**operands, kind="central"), expected)
    baseline = eager(operands["x"], operands["pdc_weight"], operands["pdc_bias"], kind="central", padding=1)
    torch.testing.assert_close(hidden, baseline, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("triton" not in running(OP), reason="needs Triton, in its interpreter or on a GPU")
@pytest.mark.parametrize(("kind", "theta"), [("angular", 1.0), ("central", 0.7), ("radial", 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("layout", "options"), [("nchw", {"stride": 2}), ("channels_last", {"dilation": 2})], ids=str
)
def test_dense_triton_kernel(
    kind: str, theta: float, dtype: torch.dtype, layout: str, options: dict[str, Any]
) -> None:
    device = device_of("triton")
    operands = block_operands(
        2, 64, 128, 7, 9, groups=1, dtype=dtype, layout=layout, device=device, **options
    )
    baseline = eager_block(**operands, kind=kind, theta=theta, **{"stride": 1} | options)
    exact = reference.pdc_block(**in_double(operands), kind=kind, theta=theta, **options)
    with fk.use_backend("triton"):
        out = fk.pdc_block(**operands, kind=kind, theta=theta, **options)
    assert out.dtype == dtype
    assert_layout(out, layout)
    assert worst(out, exact) <= 2 * worst(baseline, exact)
