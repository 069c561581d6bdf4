"""Runs the bodies of the CUDA kernels on the CPU under AddressSanitizer (see block_emulator.h).

Each *.cpp beside this file is a program that exits with 0 where its kernel is right.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any

import pytest

from .emulated import cuda_include

pytestmark = pytest.mark.build

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
PROGRAMS = sorted(path for path in HERE.glob("*.cpp") if not path.stem.startswith("broken_"))


def build(source: pathlib.Path, out: pathlib.Path, *flags: str) -> None:
    include = cuda_include()
    if include is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and the CUDA toolkit's headers")
    sanitizers = ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"]
    command = ["g++", "-std=c++17", "-O1", "-g", *sanitizers, "-Wno-attributes", *flags]
    command += [f"-I{CSRC}", f"-I{HERE}", "-isystem", str(include), str(source), "-o", str(out)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]


def execute(program: pathlib.Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0")
    return subprocess.run([program], capture_output=True, text=True, timeout=600, env=environment)


def compile_all() -> dict[str, subprocess.CompletedProcess[str]]:
    """What every program gave; tests/conftest.py runs it beside the other tests."""
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for source in PROGRAMS:
            program = pathlib.Path(directory, source.stem)
            build(source, program)
            results[source.stem] = execute(program)
    return results


COMPILED: Any = None  # the Future of it


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("program", [source.stem for source in PROGRAMS])
def test_kernel_is_right(program: str) -> None:
    result = COMPILED.result()[program]
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("broken_row_energy", "FORGET_BARRIER"),
        ("broken_row_energy", "OUT_OF_BOUNDS"),
        ("broken_cluster_sum", "FORGET_FIRST_BARRIER"),
        ("broken_cluster_sum", "FORGET_LAST_BARRIER"),
    ],
)
def test_emulator_sees_faults(program: str, fault: str, tmp_path: pathlib.Path) -> None:
    """The check itself can fail: a missing barrier of a block or of a cluster, and an access outside an array, are
    all caught."""
    build(HERE / f"{program}.cpp", tmp_path / "right")
    assert execute(tmp_path / "right").returncode == 0
    build(HERE / f"{program}.cpp", tmp_path / "broken", f"-D{fault}")
    result = execute(tmp_path / "broken")
    assert result.returncode != 0
    if fault == "OUT_OF_BOUNDS":
        assert "AddressSanitizer" in result.stderr
