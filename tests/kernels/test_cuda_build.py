"""The CUDA library without a GPU: it loads, registers its kernels, and spills no register."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest
import torch

import frd_kernels
from frd_kernels import _library

LIBRARY = pathlib.Path(frd_kernels.__file__).parent / "libfrd_cuda.so"
pytestmark = pytest.mark.skipif(bool(_library.CUDA_PROBLEM), reason=_library.CUDA_PROBLEM or "loaded")


@pytest.mark.parametrize("op", ["pdc_weight", "pdc_weight_backward"])
def test_registered_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"frd::{op}", "CUDA")


def test_no_spills() -> None:
    triton = pytest.importorskip("triton")
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton ships no cuobjdump")
    usage = subprocess.run([tool, "-res-usage", LIBRARY], capture_output=True, text=True, check=True)
    stacks = re.findall(r"Function ([^:]+):\s*\n?.*?STACK:(\d+)", usage.stdout + usage.stderr)
    assert len(stacks) >= 32
    spilled = {name: int(stack) for name, stack in stacks if int(stack) > 0}
    assert not spilled
