"""All rounds of the clustering and the dispatch on every backend: against float64, layouts, edges, equal bits."""

from __future__ import annotations

import pytest
import torch

import frd_kernels as fk

from ..backends import EMULATED_CHAIN, is_slow, prepare, running
from .cases import (
    CLEAR,
    VARIANTS,
    VIEWS,
    Case,
    clear_case,
    icm_options,
    laid_out,
    map_projections,
    on_device,  # noqa: F401  an autouse fixture
    projections,
    run_icm,
    smallest_gap,
)

OP = "icm"

DTYPES = [
    (torch.float32, "tokens"),
    (torch.float32, "image"),
    (torch.float64, "image"),
    (torch.float16, "tokens"),
    (torch.bfloat16, "image"),
]
CASES = [
    Case((1, 1), [(1, 1)], 3, "none"),
    Case((2, 2), [(2, 1)], 16, "biases"),
    Case((8, 8), [(4, 4), (2, 1)], 256, "mixed"),
    Case((13, 11), [(3, 5), (2, 2)], 7, "none"),
    Case((13, 11), [(3, 5), (2, 2)], 7, "no biases"),
    Case((3, 3), [(4, 4), (2, 1)], 5, "mixed"),
    Case((16, 16), [(8, 8), (4, 4), (2, 1)], 24, "biases"),
    Case((6, 5), [(4, 4), (3, 2), (2, 2), (1, 2)], 33, "none"),
    Case((6, 5), [(4, 4), (3, 2), (2, 2), (1, 2)], 33, "mixed"),
    Case((38, 39), [(8, 8), (4, 4), (2, 1)], 16, "biases"),
    Case((7, 12), [(7, 12), (3, 2)], 9, "mixed"),
]
# Relative rounding of the output, and absolute error of the sums behind it.
ROUNDING = {
    torch.float32: (1e-5, 5e-6),
    torch.float16: (2.0**-11, 5e-6),
    torch.bfloat16: (2.0**-8, 5e-6),
    torch.float64: (1e-12, 1e-13),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.hw}-{case.channels}-{case.projected}")
@pytest.mark.parametrize(("dtype", "layout"), DTYPES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_float64(backend: str, variant: str, dtype: torch.dtype, layout: str, case: Case) -> None:
    assert_matches_float64(variant, dtype, layout, case)


@pytest.mark.slow
@pytest.mark.skipif(EMULATED_CHAIN not in running(OP), reason="needs the block emulator")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chain_with_less_shared_memory(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100's cannot hold all that the later rounds take, which then comes from global memory."""
    monkeypatch.setenv("FRD_EMULATED_GPU", "A100")
    prepare(EMULATED_CHAIN)
    case = Case((9, 8), [(8, 8), (4, 4), (2, 1)], 256, "biases")
    with fk.use_backend(EMULATED_CHAIN):
        assert_matches_float64(variant, torch.float32, "image", case)


@pytest.mark.slow
@pytest.mark.skipif(EMULATED_CHAIN not in running(OP), reason="needs the block emulator")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chain_makes_its_keys_among_the_cosines(variant: str) -> None:
    """As in FRD-Net: 16 bits, channels in whole slabs. Output and gradients."""
    prepare(EMULATED_CHAIN)
    case = Case((9, 8), [(8, 8), (4, 4), (2, 1)], 128, "biases")
    x, maps, options = clear_case(case, variant, torch.bfloat16, "image")

    def results(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        with fk.use_backend(backend):
            return run_icm(x.to(dtype), map_projections(lambda t: t.to(dtype), maps), options)

    exact = results("reference", torch.float64)
    eager = results("reference", torch.bfloat16)
    for found, peer, wanted in zip(results(EMULATED_CHAIN, torch.bfloat16), eager, exact, strict=True):
        error, allowed = ((t.double() - wanted).norm() for t in (found, peer))
        assert error <= 2 * allowed + 1e-5 * wanted.norm()


def assert_matches_float64(variant: str, dtype: torch.dtype, layout: str, case: Case) -> None:
    x, maps, options = clear_case(case, variant, dtype, layout)
    out = fk.icm(x, maps, **options)
    assert out.shape == x.shape and out.dtype == dtype
    rtol, atol = ROUNDING[dtype]
    exact = fk.reference.icm(x.double(), map_projections(torch.Tensor.double, maps), **options)
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=atol)


SMALL = Case((5, 7), [(3, 3), (2, 2), (2, 1)], 6, "mixed")
# Tokens in several chunks.
LARGER = Case((20, 17), [(8, 8), (4, 4), (2, 1)], 10, "biases")


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_strides(backend: str, variant: str, name: str) -> None:
    options = icm_options(SMALL, variant)
    x, maps = VIEWS[name](), projections("mixed", 3, 6)
    maps[2] = (maps[2][0].t().contiguous().t(), None, maps[2][2], torch.randn(12)[::2])
    assert smallest_gap(x, maps, options) > CLEAR
    dense = [
        m and tuple(p if p is None else p.clone(memory_format=torch.contiguous_format) for p in m)
        for m in maps
    ]
    for found, wanted in zip(
        run_icm(x, maps, options), run_icm(x.contiguous().clone(), dense, options), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_is_laid_out_as_the_input(variant: str, dtype: torch.dtype) -> None:
    options = icm_options(SMALL, variant)
    for x in (torch.randn(2, 35, 6), torch.randn(2, 6, 35).transpose(1, 2), torch.empty(0, 6, 35).mT):
        x = x.to(dtype).requires_grad_()
        out = fk.icm(x, None, **options)
        assert out.stride() == x.stride()
        assert torch.autograd.grad(out, x, torch.ones_like(out))[0].stride() == x.stride()
        meta = fk.icm(x.to("meta"), None, **options)
        assert (meta.shape, meta.stride(), meta.dtype) == (out.shape, out.stride(), out.dtype)


@pytest.mark.parametrize("layout", ["tokens", "image"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_element_is_written(backend: str, poisoned: None, variant: str, layout: str) -> None:
    x, maps = laid_out((2, 35, 6), torch.float32, layout), projections("mixed", 3, 6)
    assert all(t.isfinite().all() for t in run_icm(x, maps, icm_options(SMALL, variant)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_batch(backend: str, variant: str) -> None:
    maps = projections("biases", 3, 6)
    out, grad, *others = run_icm(torch.empty(0, 35, 6), maps, icm_options(SMALL, variant))
    assert out.shape == grad.shape == (0, 35, 6)
    assert all((other == 0).all() for other in others)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forms_of_the_arguments(backend: str, variant: str) -> None:
    """Numbers, 0-d and 1-d tensors; a bias that is None is zero; None for all projections is None for each."""
    x, options = torch.randn(2, 35, 6), icm_options(SMALL, variant)
    maps = projections("no biases", 3, 6)
    zeros = [(wk, torch.zeros(6), wv, torch.zeros(6)) for wk, _, wv, _ in maps]
    forms = [0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64)]
    outs = [fk.icm(x, m, **options | {"alpha": form, "beta": form}) for m in (maps, zeros) for form in forms]
    if variant == "released":
        outs.append(fk.icm(x, maps, **options | {"alpha": torch.full((3,), 0.5), "beta": 0.5}))
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert torch.equal(fk.icm(x, None, **options), fk.icm(x, [None] * 3, **options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_of_zero(backend: str, variant: str) -> None:
    options = icm_options(SMALL, variant)
    x = torch.zeros(1, 35, 6)
    out, grad, *_ = run_icm(x, [None] * 3, options)
    assert (out == 0).all() and grad.isfinite().all()
    # Zeros that fill some bins and share others: they take part, and their direction passes no gradient.
    x[0, 10:] = torch.randn(25, 6)
    maps = [None, *projections("biases", 2, 6)]
    found = run_icm(x, maps, options)
    with fk.use_backend("reference"):
        wanted = run_icm(x.double(), map_projections(torch.Tensor.double, maps), options)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_nan_stays_in_its_sample(backend: str, variant: str) -> None:
    options = icm_options(SMALL, variant)
    x = torch.randn(3, 35, 6)
    clean = fk.icm(x, None, **options)
    x[1, 16, 2] = float("nan")
    out = fk.icm(x, None, **options)
    torch.testing.assert_close(out[[0, 2]], clean[[0, 2]], rtol=1e-6, atol=1e-6)
    assert torch.equal(out.isnan(), fk.reference.icm(x, None, **options).isnan())


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["tokens", "image"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_does_not_depend_on_its_batch(backend: str, variant: str, layout: str) -> None:
    x, maps = laid_out((3, 340, 10), torch.float32, layout), projections("biases", 3, 10)
    options = icm_options(LARGER, variant)
    together = run_icm(x, maps, options)[:2]
    assert all(
        torch.equal(a, b.flip(0))
        for a, b in zip(together, run_icm(x.flip(0), maps, options)[:2], strict=True)
    )
    for b in range(3):
        alone = run_icm(x[b : b + 1], maps, options)[:2]
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(together, alone, strict=True))


@pytest.mark.kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_repeat_for_any_number_of_threads(backend: str, variant: str) -> None:
    x, maps = laid_out((3, 340, 10), torch.float32, "image"), projections("biases", 3, 10)
    options = icm_options(LARGER, variant)
    first = run_icm(x, maps, options)
    before = torch.get_num_threads()
    try:
        for threads in (2,) if is_slow(backend, OP) else (1, 1, 2, 3):
            torch.set_num_threads(threads)
            again = run_icm(x, maps, options)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)
