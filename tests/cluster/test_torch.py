"""torch.ops.frd.cluster and icm in PyTorch's machinery: opcheck, compile, autocast, memory, instruction sets."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import frd_kernels as fk
import frd_kernels._C as native

from .cases import (
    VARIANTS,
    Case,
    icm_options,
    laid_out,
    map_projections,
    on_device,  # noqa: F401  an autouse fixture
    projections,
    run_icm,
)

OP = "icm"

ops = torch.ops.frd
LAYOUTS = ["tokens", "image", "sliced", "sliced image"]
SMALL = Case((5, 7), [(3, 2), (2, 1)], 6, "mixed")


def tokens(layout: str, dtype: torch.dtype, grad: bool) -> torch.Tensor:
    if layout in ("tokens", "image"):
        x = laid_out((2, 35, 6), dtype, layout)
    elif layout == "sliced":
        x = torch.randn(3, 40, 9).to(dtype)[1:, 2:37, 3:]
    else:
        x = torch.randn(3, 8, 50).to(dtype)[1:, 2:, 3:38].transpose(1, 2)
    return x.detach().requires_grad_(grad)


def gate(count: int, dtype: torch.dtype, grad: bool) -> torch.Tensor:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.linspace(0.5, 1, count, dtype=dtype).requires_grad_(grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("dtype", "aggregate"), [(torch.float32, 0), (torch.float64, 1), (torch.bfloat16, 1)]
)
def test_opcheck_cluster(dtype: torch.dtype, aggregate: int, grad: bool, layout: str) -> None:
    k, v = tokens(layout, dtype, grad), tokens("tokens", dtype, grad)
    gates, sizes = (gate(1, dtype, grad), gate(1, dtype, False)), ([3, 2], [5, 7], aggregate)
    torch.library.opcheck(ops.cluster.default, (k, v, None, *gates, *sizes))
    # The backward operator without gradients: its own are refused.
    k, v, *gates = (t.detach() for t in (k, v, *gates))
    centres, labels, similarity, _counts, saved = ops.cluster(k, v, None, *gates, *sizes)
    grads = torch.randn_like(centres), torch.randn_like(similarity)
    torch.library.opcheck(ops.cluster_backward.default, (*grads, k, v, *gates, labels, saved, *sizes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("dtype", "variant"), [(torch.float32, 0), (torch.float64, 1), (torch.bfloat16, 0)])
def test_opcheck_icm(dtype: torch.dtype, variant: int, grad: bool, layout: str) -> None:
    x, count = tokens(layout, dtype, grad), 2 if variant else 1
    weights = [torch.randn(6, 6).to(dtype), torch.randn(6).to(dtype)] * 2
    maps = [p.clone().requires_grad_(grad) for p in weights] + [torch.empty(0, dtype=dtype) for _ in range(4)]
    gates, sizes = (gate(count, dtype, grad), gate(count, dtype, False)), ([3, 2, 2, 1], [5, 7], variant)
    torch.library.opcheck(ops.icm.default, (x, maps, *gates, *sizes))
    x, maps, gates = x.detach(), [p.detach() for p in maps], [g.detach() for g in gates]
    out, labels, saved = ops.icm(x, maps, *gates, *sizes)
    given = torch.randn_like(out)
    torch.library.opcheck(ops.icm_backward.default, (given, x, maps, *gates, labels, saved, *sizes))


def assert_compiles(function: Callable[..., torch.Tensor], cases: list[list[Any]], **options: Any) -> None:
    """One graph for all sizes, and the results and gradients of plain calls."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, **options)
    for arguments in cases:
        leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        found, wanted = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (found, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_compile_cluster() -> None:
    def function(k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor, height: int) -> torch.Tensor:
        hw = (height, k.size(1) // height)
        found = fk.cluster(k, v, (2, 2), hw, aggregate="similarity", alpha=alpha)
        return found.centres.sum(1) + found.similarity.mean() + found.labels.max() + found.counts[0, 0]

    def case(batch: int, height: int, width: int) -> list[Any]:
        k, v = (torch.randn(batch, height * width, 6).requires_grad_() for _ in range(2))
        return [k, v, torch.tensor(1.5, requires_grad=True), height]

    assert_compiles(function, [case(2, 5, 7), case(3, 4, 9)], backend="aot_eager")


@pytest.mark.parametrize("variant", VARIANTS)
def test_compile_icm(variant: str) -> None:
    options = icm_options(SMALL, variant)
    maps = map_projections(torch.Tensor.requires_grad_, projections("mixed", 2, 6))

    def function(x: torch.Tensor, height: int) -> torch.Tensor:
        return fk.icm(x, maps, **options | {"hw": (height, x.size(1) // height)})

    cases = [[laid_out((2, n, 6), torch.float32, "image").requires_grad_(), 5] for n in (35, 40)]
    assert_compiles(function, cases, backend="aot_eager")


AUTOCAST = {"device_type": "cuda" if torch.cuda.is_available() else "cpu", "dtype": torch.bfloat16}


@pytest.mark.parametrize("aggregate", ["count", "similarity"])
def test_autocast_cluster(backend: str, aggregate: str) -> None:
    """Keys and values are cast, the sums stay in float32, float64 passes."""
    k, v = torch.randn(2, 2, 35, 6)
    k.requires_grad_()
    with torch.autocast(**AUTOCAST):
        found = fk.cluster(k, v.bfloat16(), (2, 3), (5, 7), aggregate=aggregate)
        wide = fk.cluster(k.double(), v.double(), (2, 3), (5, 7), aggregate=aggregate)
    wanted = fk.cluster(k.bfloat16(), v.bfloat16(), (2, 3), (5, 7), aggregate=aggregate)
    assert found.centres.dtype == torch.bfloat16 and found.similarity.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert wide.centres.dtype == torch.float64
    (grad,) = torch.autograd.grad(found.similarity.sum(), k)
    assert grad.dtype == torch.float32 and grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_icm(backend: str, variant: str) -> None:
    options, x, maps = icm_options(SMALL, variant), torch.randn(2, 35, 6), projections("mixed", 2, 6)
    with torch.autocast(**AUTOCAST):
        out, *grads = run_icm(x, maps, options)
    wanted = fk.icm(x.bfloat16(), map_projections(torch.Tensor.bfloat16, maps), **options)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_autocast_operators() -> None:
    """Called by themselves the operators cast as well, but alpha and beta."""
    x, gates = torch.randn(2, 35, 6), [torch.tensor([0.5]), torch.tensor([0.1])]
    with torch.autocast(**AUTOCAST):
        centres = ops.cluster(x, x, None, *gates, [3, 2], [5, 7], 1)[0]
        out = ops.icm(x, [torch.randn(6, 6), torch.randn(6)] * 2, *gates, [3, 2], [5, 7], 0)[0]
    assert centres.dtype == out.dtype == torch.bfloat16


def peak_memory(run: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's allocator holds during a call, beyond those before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    in_use = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(in_use)


@pytest.mark.parametrize("form", ["count", "similarity", *VARIANTS])
def test_no_matrix_of_tokens_by_centres(form: str) -> None:
    """Forward and backward hold less than a quarter of one [N, O] matrix, and the reference more than one."""
    x, matrix = torch.randn(1, 96 * 96, 4, requires_grad=True), 4 * (96 * 96) * (24 * 24)

    def call() -> None:
        if form in VARIANTS:
            options = icm_options(Case((96, 96), [(24, 24), (2, 1)], 4, "none"), form)
            fk.icm(x, None, **options).sum().backward()
        else:
            fk.cluster(x, x, (24, 24), (96, 96), aggregate=form).centres.sum().backward()

    assert peak_memory(call) < matrix / 4
    with fk.use_backend("reference"):
        assert peak_memory(call) > matrix


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_instruction_sets_agree(isa: str) -> None:
    """The comparisons with float64 once more in a process that is held back to these instructions."""
    if native.cpu_isa() == isa:
        pytest.skip("what all other tests run on")
    here = pathlib.Path(__file__).parent
    modules = ("forward", "mask", "dispatch", "icm", "backward")
    files = [str(here / f"test_{module}.py") for module in modules]
    chosen = "cpu and (test_matches_float64 and float32 and not flipped or gradients)"
    package = pathlib.Path(fk.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen],
        capture_output=True,
        text=True,
        env=os.environ | {"FRD_CPU_ISA": isa, "PYTHONPATH": str(package)},
        cwd=package,
    )
    assert result.returncode == 0, result.stdout[-2000:]
