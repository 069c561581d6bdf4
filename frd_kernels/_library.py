"""Loads the native libraries. torch is imported first: it loads the libtorch that they link against."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Iterable

import torch

from ._torch_internals import schema_of

_HERE = pathlib.Path(__file__).parent


def _load(name: str) -> str:
    """Loads a library of operators; returns '' or why that failed."""
    path = _HERE / name
    if not path.exists():
        return f"{name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{name} does not load with torch {torch.__version__}: {error}"
    return ""


CPU_PROBLEM = _load("libfrd_cpu.so")
if CPU_PROBLEM:
    CUDA_PROBLEM = CPU_PROBLEM
elif torch.version.cuda is None:
    CUDA_PROBLEM = "this torch is a build without CUDA"
else:
    CUDA_PROBLEM = _load("libfrd_cuda.so")
    if CUDA_PROBLEM.endswith("was not built"):
        CUDA_PROBLEM += " (nvcc was not found when frd_kernels was installed)"

if CPU_PROBLEM:
    raise ImportError(
        f"frd_kernels: {CPU_PROBLEM}; reinstall with `pip install .`, or run tools/build_inplace.sh to work "
        "in the source tree. `python -m frd_kernels.info` shows more."
    )


def declare(namespace: str, ops: Iterable[str]) -> torch.library.Library:
    """Declares operators in another namespace, with the schemas of `frd`'s (csrc/register.cpp)."""
    library = torch.library.Library(namespace, "DEF")
    for op in ops:
        schema = schema_of(getattr(torch.ops.frd, op).default)
        library.define(schema.removeprefix("frd::"))
    return library


# The newer CUDA kernels, beside those of `frd` until a GPU has run them: the clustering as a chain of launches; the PDC
# block with other small tiles, and with products of the library in its backward.
CHAIN = "frd_chain"
CHAIN_OPS = (
    *("cluster", "cluster_backward", "cluster_dispatch", "cluster_dispatch_backward"),
    *("icm", "icm_backward"),
    *("pdc_block", "pdc_block_backward"),
)
_CHAIN_LIBRARY = declare(CHAIN, CHAIN_OPS)


def cuda_architectures() -> list[str]:
    """What libfrd_cuda.so was compiled for, as CMake writes it: "90a-real", "80", ..."""
    module = importlib.import_module("frd_kernels._C")
    return [arch for arch in str(module.build_info()["cuda_archs"]).split(",") if arch]
