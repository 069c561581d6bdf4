"""Builds libfrd_cuda.so's sources for the CPU, over the block emulator, and loads them as torch.ops.frd_emulated.

So the suite that checks the other backends runs on the CUDA kernels too, on a machine without a GPU: kernels,
launch configuration and argument checks alike.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
from typing import NamedTuple

import torch

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
NAMESPACE = "frd_emulated"
# No debug information: it doubles the time to compile, and the report names functions without it.
ASAN = ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment")
# Every operator that libfrd_cuda.so registers.
OPS = (
    *("pdc_weight", "pdc_weight_backward", "pdc2d_depthwise", "pdc2d_depthwise_backward"),
    *("pdc_block", "pdc_block_backward"),
    *("cluster", "cluster_backward", "cluster_dispatch", "cluster_dispatch_backward"),
    *("icm", "icm_backward"),
)
# Those of the chain of launches.
CHAIN = "frd_emulated_chain"

DTYPES = ("f32", "f64", "f16", "bf16")


class Source(NamedTuple):
    """A source of libfrd_cuda.so; a *inst.cu is compiled once per dtype, as CMakeLists.txt does."""

    path: pathlib.Path
    dtype: str = ""

    @property
    def name(self) -> str:
        folders = self.path.relative_to(CSRC).parts[:-1] if self.path.is_relative_to(CSRC) else ()
        return "-".join(part for part in (*folders, self.path.name, self.dtype) if part)

    @property
    def flags(self) -> list[str]:
        return [f"-DFRD_DTYPE={self.dtype}"] if self.dtype else []


def cuda_sources() -> list[Source]:
    """The .cu files of the library, by name."""
    found = []
    for path in sorted(CSRC.glob("*/cuda/**/*.cu")):
        block = "pdc_block" in path.parts
        dtypes = [d for d in DTYPES if not (block and d == "f64")] if path.name.endswith("inst.cu") else [""]
        found += [Source(path, dtype) for dtype in dtypes]
    return found


def cuda_include() -> pathlib.Path | None:
    """Where cuda_runtime.h lies: vector types, and the kernel keywords, empty for a host compiler."""
    nvcc = shutil.which("nvcc")
    roots = [pathlib.Path(nvcc).resolve().parents[1]] if nvcc else []
    roots += sorted(pathlib.Path("/usr/local").glob("cuda*"))
    for include in [root / "include" for root in roots]:
        if (include / "cuda_runtime.h").exists():
            return include
    return None


def problem() -> str:
    """Why the emulated library cannot be built here; '' if it can."""
    if cuda_include() is None or shutil.which("g++") is None:
        return "needs g++ and the CUDA toolkit's headers"
    return ""


def _compile(source: Source, flags: list[str], common: bytes, cache: pathlib.Path) -> pathlib.Path:
    flags = [*flags, *source.flags]
    key = hashlib.sha256(common + source.path.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    out = cache / f"{source.name}-{key}.o"
    if not out.exists():
        partial = out.with_suffix(".partial.o")
        command = ["g++", *flags, "-x", "c++", "-c", str(source.path), "-o", str(partial)]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[-4000:]
        partial.rename(out)
    return out


def _link(objects: list[pathlib.Path], more: tuple[str, ...], cache: pathlib.Path) -> pathlib.Path:
    """Another process may have loaded an older library, which keeps its memory but not its name."""
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    library = cache / f"libfrd_emulated-{key}.so"
    if not library.exists():
        partial = library.with_suffix(".partial")
        libtorch = pathlib.Path(torch.__file__).parent / "lib" / "libtorch.so"
        command = ["g++", "-shared", *more, *map(str, objects), "-o", str(partial)]
        command += ["-Wl,--no-as-needed", str(libtorch), "-Wl,-Bsymbolic"]
        subprocess.run(command, check=True)
        for old in cache.glob("libfrd_emulated*.so"):
            old.unlink()
        partial.rename(library)
    return library


def _build(cache: pathlib.Path, more: tuple[str, ...]) -> pathlib.Path:
    include = cuda_include()
    assert include is not None
    flags = [*more, "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-attributes", "-DFRD_EMULATED"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    flags += [f"-I{CSRC}", f"-I{HERE}"]
    for system in (pathlib.Path(torch.__file__).parent / "include", include):
        flags += ["-isystem", str(system)]
    headers = sorted(p for root in (CSRC, HERE) for p in root.rglob("*") if p.suffix in (".h", ".cuh"))
    common = b"".join(path.read_bytes() for path in headers)
    plain = [*sorted(CSRC.glob("*/cuda/**/*.cpp")), HERE / "emulated_runtime.cc"]
    sources = [*cuda_sources(), *map(Source, plain)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, flags, common, cache), sources))
    return _link(objects, more, cache)


@functools.cache
def load() -> None:
    """Builds (objects of unchanged sources are kept in build/) and loads the library; of several processes one builds.
    Under FRD_EMULATED_ASAN it is the one that AddressSanitizer watches, for processes with `asan_environment`."""
    watched = os.environ.get("FRD_EMULATED_ASAN") == "1"
    cache = ROOT / "build" / ("emulated-asan" if watched else "emulated")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.ops.load_library(str(_build(cache, ASAN if watched else ())))


def asan_environment() -> dict[str, str]:
    """The environment of a process whose interpreter was not built with AddressSanitizer. libstdc++ has to be there
    when the sanitizer starts, or exceptions have no way through it."""
    names = ("libasan.so", "libstdc++.so")
    found = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names
    ]
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options, "FRD_EMULATED_ASAN": "1"}
