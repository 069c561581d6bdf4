"""The emulator sees faults, and AddressSanitizer finds none in the emulated CUDA kernels."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest

import frd_kernels

from . import emulated

pytestmark = pytest.mark.build

HERE = pathlib.Path(__file__).parent


def build(source: pathlib.Path, out: pathlib.Path, *flags: str) -> None:
    """A program, or a library, of one source under AddressSanitizer."""
    include = emulated.cuda_include()
    if include is None or shutil.which("g++") is None:
        pytest.skip(emulated.problem())
    command = ["g++", "-std=c++17", "-O1", "-Wno-attributes", *emulated.ASAN, *flags]
    command += [f"-I{emulated.CSRC}", f"-I{HERE}", "-isystem", str(include), str(source), "-o", str(out)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]


def execute(*command: str | pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=1500, env=emulated.asan_environment() | environment
    )


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("broken_row_energy", "FORGET_BARRIER"),
        ("broken_cluster_sum", "FORGET_FIRST_BARRIER"),
        ("broken_cluster_sum", "FORGET_LAST_BARRIER"),
    ],
)
def test_emulator_sees_faults(program: str, fault: str, tmp_path: pathlib.Path) -> None:
    """The check itself can fail: a missing barrier of a block or of a cluster is caught."""
    build(HERE / f"{program}.cpp", tmp_path / "right")
    assert execute(tmp_path / "right").returncode == 0
    build(HERE / f"{program}.cpp", tmp_path / "broken", f"-D{fault}")
    assert execute(tmp_path / "broken").returncode != 0


ON_TENSORS = """
import ctypes, sys, torch
x, out = torch.randn(5, 203), torch.empty(5)
pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, out))
ctypes.CDLL(sys.argv[1]).row_energies(*pointers, 5, 203, 0)
assert out.isfinite().all()
"""


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("", ""),
        ("OUT_OF_BOUNDS_READ", "heap-buffer-overflow|READ of size 4|alloc_cpu"),
        ("OUT_OF_BOUNDS_WRITE", "heap-buffer-overflow|WRITE of size 4|row_energy"),
    ],
)
def test_address_sanitizer_sees_faults(fault: str, report: str, tmp_path: pathlib.Path) -> None:
    """One element beyond a tensor of torch's is read, one beyond a block's shared memory written."""
    build(HERE / "broken_row_energy.cpp", tmp_path / "rows.so", "-shared", "-fPIC", f"-D{fault or 'RIGHT'}")
    result = execute(sys.executable, "-c", ON_TENSORS, tmp_path / "rows.so")
    assert (result.returncode == 0) == (not fault), result.stderr[-4000:]
    assert all(part in result.stderr for part in report.split("|"))


# Every operator, forward and backward; masks, slices, sizes that fill no tile, teams of one and of eight blocks.
CASES = [
    "pdc/test_weight.py::test_gradients",
    "pdc/test_weight.py::test_matches_the_formulas",
    "pdc/test_forward.py::test_depthwise",
    "pdc/test_forward.py::test_views",
    "pdc/test_backward.py::test_depthwise",
    "pdc_block/test_forward.py::test_rounded_once",
    "pdc_block/test_backward.py::test_matches_the_oracle",
    "cluster/test_forward.py::test_strides",
    "cluster/test_mask.py::test_matches_float64",
    "cluster/test_dispatch.py::test_strides",
    "cluster/test_icm.py::test_strides",
    "cluster/test_icm.py::test_the_chain_makes_its_keys_among_the_cosines",
    "cluster/test_across_backends.py::test_icm",
    "cluster/test_across_backends.py::test_cluster",
]


def compile_all() -> subprocess.CompletedProcess[str]:
    """Some tests of the other files once more, in a process that AddressSanitizer watches; tests/conftest.py runs it
    beside the other tests."""
    if emulated.problem():
        pytest.skip(emulated.problem())
    package = str(pathlib.Path(frd_kernels.__file__).parents[1])
    files = [str(HERE.parent / case) for case in CASES]
    # Of the kinds radial, whose taps reach furthest.
    chosen = "(cuda or the_chain) and not (H100 or vanilla or central or angular or float64 or bfloat16)"
    options = ["-q", "-s", "-p", "no:cacheprovider", "-m", "slow and not exhaustive", "-k", chosen]
    return execute(sys.executable, "-m", "pytest", *options, *files, PYTHONPATH=package)


COMPILED: Any = None  # the Compilation of it


@pytest.mark.timeout(1800)
def test_kernels_keep_to_their_memory() -> None:
    result = COMPILED.result()
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[:4000]
    assert " passed" in result.stdout and " skipped" not in result.stdout
