"""Each build of the CPU kernels (scalar, AVX2, AVX-512) in a process of its own, against the oracle in float64."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

import frd_kernels
from frd_kernels import _C

ISAS = ["scalar", "avx2", "avx512"]
PROGRAM = pathlib.Path(__file__).with_name("isa_check.py")


@pytest.mark.parametrize("isa", ISAS)
def test_matches_the_oracle(isa: str) -> None:
    if ISAS.index(isa) > ISAS.index(_C.cpu_isa()):
        pytest.skip(f"this CPU has no {isa}, or FRD_CPU_ISA rules it out")
    root = pathlib.Path(frd_kernels.__file__).parents[1]
    environment = os.environ | {"FRD_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == [isa]
