"""The CUDA kernels without a GPU: the library registers them, and no architecture spills a register."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import Any

import pytest
import torch

import frd_kernels
from frd_kernels import _library
from frd_kernels.backend import _runs_on

from .. import backends

Source = backends.emulated.Source

CSRC = backends.emulated.CSRC
SOURCES = backends.emulated.cuda_sources()
ARCHITECTURES = (80, 90, 100, 120)  # Ampere, Hopper, data centre and desktop Blackwell
LIBRARY = pathlib.Path(frd_kernels.__file__).parent / "libfrd_cuda.so"


loaded = pytest.mark.skipif(bool(_library.CUDA_PROBLEM), reason=_library.CUDA_PROBLEM or "loaded")


@loaded
@pytest.mark.parametrize(
    "op",
    [
        *(f"frd::{op}" for op in backends.emulated.OPS),
        *(f"{_library.CHAIN}::{op}" for op in _library.CHAIN_OPS),
    ],
)
def test_registered_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")


def in_library() -> set[int]:
    """The architectures whose machine code is in the library that was built."""
    if _library.CUDA_PROBLEM:
        return set()
    return {int(arch.partition("-")[0].rstrip("af")) for arch in _library.cuda_architectures()}


@loaded
@pytest.mark.build
def test_library_spills_nothing() -> None:
    triton = pytest.importorskip("triton")
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "-res-usage", LIBRARY], capture_output=True, text=True, check=True)
    stacks = re.findall(r"Function ([^:]+):\s*\n?.*?STACK:(\d+)", report.stdout + report.stderr)
    assert len(stacks) >= len(SOURCES) * len(in_library())
    assert not {name: int(stack) for name, stack in stacks if int(stack) > 0}


def usage(source: Source, architecture: int, out: pathlib.Path) -> dict[str, tuple[int, int, int]]:
    """Kernel -> (bytes of stack, of spill stores, of spill loads), as ptxas reports them."""
    command = ["nvcc", "-O3", "-std=c++17", f"-I{CSRC}", "-Xptxas=-v", "-cubin", f"-arch=sm_{architecture}"]
    built = subprocess.run(
        [*command, *source.flags, str(source.path), "-o", str(out / f"{source.name}.{architecture}.cubin")],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-4000:]
    found = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)",
        built.stderr,
    )
    return {name: (int(stack), int(stores), int(loads)) for name, stack, stores, loads in found}


def others(source: Source) -> list[int]:
    """The architectures to compile a source for beside the library's: one each, another for another source. The
    kernels of the clustering take minutes: of them only those of bfloat16."""
    missing = [architecture for architecture in ARCHITECTURES if architecture not in in_library()]
    if not missing:
        return []
    if source.name.startswith("cluster-icm_"):
        return [missing[-1 if "grad" in source.name else 0]] if source.dtype == "bf16" else []
    return [missing[SOURCES.index(source) % len(missing)]]


def compile_all() -> dict[tuple[str, int], dict[str, tuple[int, int, int]]]:
    """(source, architecture) -> `usage`, of those not in the library; tests/conftest.py runs it beside the other
    tests."""
    if shutil.which("nvcc") is None:
        return {}
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory)
        return {
            (source.name, arch): usage(source, arch, out) for source in SOURCES for arch in others(source)
        }


COMPILED: Any = None  # the Future of it


@pytest.mark.build
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.timeout(1800)
def test_no_other_architecture_spills() -> None:
    for (source, architecture), report in COMPILED.result().items():
        assert report, f"{source} holds no kernel"
        spilled = {name: bytes_ for name, bytes_ in report.items() if any(bytes_)}
        assert not spilled, f"sm_{architecture}: {spilled}"


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 6), True),
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("80-virtual", (9, 0), True),
        ("80", (12, 0), True),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("90a", (9, 0), True),
        ("100f-real", (10, 3), True),
        ("100f", (12, 0), False),
        ("120-real", (12, 1), True),
    ],
)
def test_architectures_that_a_binary_runs_on(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert _runs_on(built, capability) == runs
