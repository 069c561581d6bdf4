"""The clustering's operators by Triton and by CUDA against the CPU's: results and gradients. Where `saved` has the
CPU's layout, it is compared too, and each takes its gradients from the other's as well."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from frd_kernels.backend import PROVIDERS
from frd_kernels.cluster.saved import compute_dtype

from .. import backends
from .cases import VARIANTS, Case, Grid, clear_case, laid_out

pytestmark = pytest.mark.slow

# The emulated H100 has teams of eight blocks, the emulated A100 of one.
OTHERS = [(name, "H100") for name in backends.running("icm") if name not in ("reference", "cpu")]
OTHERS += [(name, "A100") for name, _ in OTHERS if name == backends.EMULATED]
LAYOUTS = [
    (torch.float32, "image"),
    (torch.float64, "tokens"),
    (torch.float16, "every other token"),
    (torch.bfloat16, "image"),
]
# Of the largest element: the order of the sums, and a rounding of each stored gradient.
ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAN, INF = float("nan"), float("inf")


def parameters(others: list[tuple[str, str]]) -> list[Any]:
    """Those of the fixture `other`. Emulated teams of eight blocks, 2048 threads, are for the tier exhaustive."""
    return [
        pytest.param(
            other, id=" ".join(other), marks=[pytest.mark.exhaustive] * (other == (backends.EMULATED, "H100"))
        )
        for other in others
    ]


@pytest.fixture(params=parameters(OTHERS))
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend whose operators are compared with the CPU's."""
    name, gpu = request.param
    monkeypatch.setenv("FRD_EMULATED_GPU", gpu)
    backends.prepare(name)
    return str(name)


def keeps_the_same(name: str) -> bool:
    """Whether a backend's `saved` has the CPU's layout."""
    return name in ("cuda", backends.EMULATED)


def skip_composed(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and "icm" in PROVIDERS[name].without_float64:
        pytest.skip("float64 is composed of the reference")


def call(name: str, op: str, *arguments: Any) -> list[torch.Tensor]:
    """The operator on a backend's device; its results on the CPU, lists among them unrolled."""

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(part) for part in value]
        return value.to(backends.device_of(name)) if isinstance(value, torch.Tensor) else value

    results = getattr(getattr(torch.ops, PROVIDERS[name].namespace), op)(*map(placed, arguments))
    unrolled = (result if isinstance(result, list) else [result] for result in results)
    return [tensor.cpu() for tensor in itertools.chain.from_iterable(unrolled)]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance` of its largest element, of 0.01 where that is smaller (a token that is its own
    centre leaves its keys roundings for a gradient), and laid out alike; integers are equal."""
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), f"tensor {number}"
        if not b.is_floating_point():
            assert torch.equal(a, b), f"tensor {number}"
            continue
        largest = max(b.double().abs().max().item(), 1e-2) if b.numel() else 0.0
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=0,
            atol=tolerance * largest,
            msg=lambda message, n=number: f"tensor {n}: {message}",
        )


def assert_gradients_agree(
    other: str, op: str, grads: list[torch.Tensor], inputs: list[Any], kept: Any, sizes: list[Any]
) -> None:
    """The other backend's from what it kept, and where both keep the same each from what the other kept, against the
    CPU's own. kept: (labels, saved) of the CPU and of the other."""
    own, theirs = ([*grads, *inputs, *parts, *sizes] for parts in kept)
    wanted, tolerance = call("cpu", op, *own), ROUNDING[grads[0].dtype]
    if keeps_the_same(other):
        assert_close(call(other, op, *own), wanted, tolerance)
        assert_close(call("cpu", op, *theirs), wanted, 2 * tolerance)
    else:
        assert_close(call(other, op, *theirs), wanted, tolerance)


def tokens(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "every other token":
        return torch.randn(shape[0], 2 * shape[1], shape[2] + 3).to(dtype)[:, ::2, 1 : shape[2] + 1]
    return laid_out(shape, dtype, layout)


def like_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another layout."""
    made = tokens((x.size(0), x.size(1), x.size(2)), x.dtype, layout)
    return made.copy_(x)


def icm_inputs(case: Case, variant: str, dtype: torch.dtype, layout: str) -> tuple[list[Any], list[Any]]:
    """(tensors, sizes) of the operator `icm`."""
    x, maps, options = clear_case(case, variant, dtype, noise=0.5)
    flat: list[torch.Tensor] = []
    for projection in maps:
        parts = projection or [x.new_empty(0)] * 4
        flat += [x.new_zeros(case.channels) if part is None else part for part in parts]
    gates = [options[name].reshape(-1).to(compute_dtype(dtype)) for name in ("alpha", "beta")]
    grids = [size for grid in case.grids for size in grid]
    return [like_layout(x, layout), flat, *gates], [grids, list(case.hw), VARIANTS.index(variant)]


ICMS = [
    Case((8, 9), [(4, 4), (3, 2), (2, 1)], 32, "biases"),  # on the tensor cores
    Case((6, 5), [(4, 4), (3, 2), (2, 2), (1, 2)], 33, "mixed"),
    Case((20, 17), [(2, 1)], 12, "none"),  # sums over the tokens of a label in several parts
    Case((2, 3), [(3, 3), (2, 3)], 5, "biases"),  # more centres than tokens
]


def check_icm(other: str, case: Case, variant: str, dtype: torch.dtype, layout: str) -> None:
    skip_composed(other, dtype)
    tensors, sizes = icm_inputs(case, variant, dtype, layout)
    (out, *kept), (wanted, *wanted_kept) = (call(name, "icm", *tensors, *sizes) for name in (other, "cpu"))
    assert_close([out], [wanted], max(torch.finfo(dtype).eps, 1e-5))
    same = 2 if keeps_the_same(other) else 1
    assert_close(kept[:same], wanted_kept[:same], 1e-10 if dtype == torch.float64 else 1e-5)
    grad = like_layout(torch.randn(out.shape).to(dtype), layout)
    assert_gradients_agree(other, "icm_backward", [grad], tensors, (wanted_kept, kept), sizes)


@pytest.mark.parametrize("case", ICMS, ids=lambda case: f"{case.hw}-{case.channels}-{case.projected}")
@pytest.mark.parametrize(("dtype", "layout"), LAYOUTS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("variant", VARIANTS)
def test_icm(other: str, variant: str, dtype: torch.dtype, layout: str, case: Case) -> None:
    check_icm(other, case, variant, dtype, layout)


def cluster_inputs(
    k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, hw: Grid, grid: Grid, aggregate: int
) -> tuple[list[Any], list[Any]]:
    """(tensors, sizes) of the operator `cluster`."""
    gates = [torch.tensor([value], dtype=compute_dtype(k.dtype)) for value in (1.7, -0.4)]
    return [k, v, mask, *gates], [list(grid), list(hw), aggregate]


# image, grid, channels, whether some tokens are masked
CLUSTERS: list[tuple[Grid, Grid, int, bool]] = [
    ((13, 11), (5, 4), 7, True),
    ((20, 17), (3, 2), 40, False),
    ((3, 4), (5, 6), 16, False),
]


@pytest.mark.parametrize(("hw", "grid", "channels", "masked"), CLUSTERS)
@pytest.mark.parametrize(("dtype", "layout"), LAYOUTS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("aggregate", [0, 1])
def test_cluster(
    other: str,
    aggregate: int,
    dtype: torch.dtype,
    layout: str,
    hw: Grid,
    grid: Grid,
    channels: int,
    masked: bool,
) -> None:
    """Masked tokens are as if their keys, values and gradients did not exist, whatever those hold."""
    skip_composed(other, dtype)
    shape = (2, hw[0] * hw[1], channels)
    k, v = tokens(shape, dtype, layout), tokens(shape, dtype, "every other token")
    mask = None
    if masked:
        mask = torch.rand(shape[:2]) > 0.3
        mask[1, : 3 * hw[1]] = False  # a row of bins without tokens
        k[~mask], v[~mask] = NAN, INF
    inputs, sizes = cluster_inputs(k, v, mask, hw, grid, aggregate)
    found, wanted = (call(name, "cluster", *inputs, *sizes) for name in (other, "cpu"))
    rounding = max(torch.finfo(dtype).eps, 1e-12 if dtype == torch.float64 else 2e-6)
    assert_close(found[:1], wanted[:1], rounding)
    same = 5 if keeps_the_same(other) else 4
    assert_close(found[1:same], wanted[1:same], 1e-11 if dtype == torch.float64 else 2e-6)

    grads = [torch.randn(wanted[0].shape).to(dtype), torch.randn(shape[1::-1]).to(wanted[2].dtype).t()]
    if mask is not None:
        grads[1][~mask] = NAN
    kept = [[result[1], result[4]] for result in (wanted, found)]
    assert_gradients_agree(other, "cluster_backward", grads, [k, v, *inputs[3:]], kept, sizes)
    if mask is not None:
        grad_k, grad_v, *_ = call(other, "cluster_backward", *grads, k, v, *inputs[3:], *kept[1], *sizes)
        assert not grad_k[~mask].any() and not grad_v[~mask].any()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("aggregate", [0, 1])
def test_a_key_that_is_not_finite_spoils_only_its_cluster(other: str, aggregate: int, value: float) -> None:
    k, v = torch.randn(2, 2, 300, 6)
    inputs, sizes = cluster_inputs(k, v, None, (20, 15), (3, 2), aggregate)
    changed = k.clone()
    changed[1, 150, 3] = value  # after the forward pass: the labels are those of finite keys
    grads = torch.randn(2, 6, 6), torch.randn(2, 300)

    def grad_of_keys(name: str) -> torch.Tensor:
        _centres, labels, _similarity, _counts, saved = call(name, "cluster", *inputs, *sizes)
        arguments = [*grads, changed, v, *inputs[3:], labels, saved, *sizes]
        return call(name, "cluster_backward", *arguments)[0]

    found, wanted = map(grad_of_keys, (other, "cpu"))
    if keeps_the_same(other):
        assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
    # From other sums of the forward pass less may be spoiled, nothing more.
    assert (found.isfinite() | ~wanted.isfinite()).all()
    assert not found[1, 150].isfinite().all() and found[1].isfinite().any() and found[0].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e25])
def test_gradients_of_tokens_without_a_direction(other: str, scale: float, variant: str) -> None:
    """Norms that count as zero or overflow."""
    (x, *others), sizes = icm_inputs(
        Case((6, 5), [(3, 2), (2, 1)], 6, "none"), variant, torch.float32, "tokens"
    )
    x[:, ::3] *= scale
    grad = torch.randn(x.shape)

    def grads(name: str) -> list[torch.Tensor]:
        _out, *kept = call(name, "icm", x, *others, *sizes)
        return call(name, "icm_backward", grad, x, *others, *kept, *sizes)

    for a, b in zip(grads(other), grads("cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_repeat_bit_for_bit_in_any_batch(other: str, dtype: torch.dtype, variant: str) -> None:
    case = Case((8, 8), [(4, 4), (2, 1)], 32, "biases")
    tensors, sizes = icm_inputs(case, variant, dtype, "image")
    out, *kept = call(other, "icm", *tensors, *sizes)
    grad = torch.randn(out.shape).to(dtype)
    first, again = (call(other, "icm_backward", grad, *tensors, *kept, *sizes) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = [t[1:] for t in (grad, tensors[0])], [t[1:] for t in kept]
    assert torch.equal(
        call(other, "icm_backward", *alone[0], *tensors[1:], *alone[1], *sizes)[0], first[0][1:]
    )


CUDA = [param for param in OTHERS if "cuda" in param[0]]


@pytest.mark.parametrize("other", parameters(CUDA), indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "case",
    [
        Case((4, 3), [(2, 2), (2, 1)], 1200, "none"),  # tiles of tokens
        Case((26, 25), [(25, 25), (3, 2)], 100, "none"),  # sums over clusters
    ],
    ids=lambda case: str(case.channels),
)
def test_what_does_not_fit_into_shared_memory(other: str, case: Case, variant: str) -> None:
    check_icm(other, case, variant, torch.float32, "tokens")


@pytest.mark.parametrize("other", parameters([p for p in CUDA if p[1] == "A100"]), indirect=True)
@pytest.mark.parametrize(("channels", "projected"), [(4000, "none"), (1100, "biases")])
def test_rows_beyond_shared_memory(other: str, channels: int, projected: str) -> None:
    """More channels in float64 than tiles of rows have room for."""
    case = Case((2, 3), [(1, 2)], channels, projected)
    tensors, sizes = icm_inputs(case, "released", torch.float64, "tokens")
    out, *kept = call("cpu", "icm", *tensors, *sizes)
    arguments = [torch.randn_like(out), *tensors, *kept, *sizes]
    wanted = call("cpu", "icm_backward", *arguments)
    assert_close(call(other, "icm_backward", *arguments), wanted, ROUNDING[torch.float64])


@pytest.mark.parametrize("other", parameters(CUDA), indirect=True)
def test_more_rounds_than_a_launch_takes_are_refused(other: str) -> None:
    x, gates = torch.randn(1, 4, 3), [torch.ones(1), torch.zeros(1)]

    def inputs(rounds: int) -> tuple[list[Any], list[Any]]:
        return [x, [x.new_empty(0)] * 4 * rounds, *gates], [[2, 2] * rounds, [2, 2], 0]

    tensors, sizes = inputs(8)
    call(other, "icm", *tensors, *sizes)
    tensors, sizes = inputs(9)
    with pytest.raises(ValueError, match="at most 8 rounds"):
        call(other, "icm", *tensors, *sizes)
    out, *kept = call("cpu", "icm", *tensors, *sizes)
    with pytest.raises(ValueError, match="at most 8 rounds"):
        call(other, "icm_backward", out, *tensors, *kept, *sizes)
