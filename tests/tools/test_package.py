"""The package as a user meets it: where it is imported from, what it reports, what it links against."""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import types

import pytest
import torch

import frd_kernels
from frd_kernels import _library, backend

PACKAGE = pathlib.Path(frd_kernels.__file__).parent
ROOT = pathlib.Path(__file__).parents[2]
LIBRARIES = sorted(PACKAGE.glob("libfrd_*.so"))


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=PACKAGE.parent,
    )


@pytest.mark.skipif(not os.environ.get("FRD_TEST_INSTALLED"), reason="working on the tree")
def test_the_installed_package_is_tested() -> None:
    assert ROOT not in PACKAGE.parents or ".venv" in PACKAGE.parts


def test_backends_name_reasons() -> None:
    found = frd_kernels.backends()
    assert set(found) >= set(backend.NAMES)  # and those of the suite
    assert found["reference"][0] and found["cpu"][0]
    assert all(isinstance(reason, str) and reason for _available, reason in found.values())


def test_unknown_backend_is_refused() -> None:
    with (
        pytest.raises(
            ValueError, match="backend must be one of reference, cpu, triton, cuda, cuda_chain, got 'gpu'"
        ),
        frd_kernels.use_backend("gpu"),
    ):
        pass


def test_explicit_backend_never_falls_back() -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    with (
        frd_kernels.use_backend("cuda"),
        pytest.raises(
            NotImplementedError,
            match="'cuda' was requested and runs on cuda tensors only",
        ),
    ):
        frd_kernels.pdc2d(x, w, kind="angular", padding=1, groups=4)


def test_a_default_is_verified_and_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    defaults = {"cuda": {"icm", "pdc2d", "pdc_block"}, "cuda_chain": set(), "triton": set()}
    for name, expected in defaults.items():
        provider = backend.PROVIDERS[name]._replace(device="cuda")
        for capability, ops in (((9, 0), expected), ((8, 0), set()), ((10, 0), set())):
            monkeypatch.setattr(backend, "_capability", lambda device, found=capability: found)
            assert {op for op in provider.ops if provider.is_default(op, gpu)} == ops
        assert not provider.is_default("pdc2d", torch.ones(1))
    cpu = backend.PROVIDERS["cpu"]
    assert all(cpu.is_default(op, torch.ones(1)) for op in cpu.ops)


@pytest.mark.parametrize("name", ["cuda", "triton", "cpu"])
def test_the_evidence_of_a_default_is_a_result_file(name: str) -> None:
    """Each preferred op is faster than the first baseline there in the geometric mean of its cases in wall time."""
    names = {
        "pdc2d": "pdc ",
        "pdc_block": "dpm",
        "icm": "icm",
        "pdc_weight": "pdc_weight",
        "cluster": "cluster",
    }
    for op, evidence in backend.PROVIDERS[name].evidence.items():
        assert not evidence.verified.endswith(".json") or (ROOT / evidence.verified).is_file()
        if evidence.preferred and op in names:
            cases = json.loads((ROOT / evidence.preferred).read_text())["cases"]
            ratios = [
                case["ratio"]
                for case in cases
                if case["op"].startswith(names[op]) and case["timing"] == "wall" and case["backend"] == name
            ]
            assert ratios and statistics.geometric_mean(ratios) > 1


def test_a_gpu_the_binary_was_not_built_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "cuda_architectures", lambda: ["90-real", "100-real"])
    refusal = backend._architecture_refusal("frd", (7, 5))
    assert refusal is not None and refusal.startswith("libfrd_cuda.so was built for 90-real, 100-real, ")
    assert refusal.endswith("which this GPU (sm_75) does not run")
    assert backend._architecture_refusal("frd", (9, 0)) is None
    assert backend._architecture_refusal("frd_triton", (7, 5)) is not None
    assert backend._architecture_refusal("frd_triton", (9, 0)) is None


def test_images_beyond_32_bit_indices_are_refused() -> None:
    x = torch.empty(1).expand(1, 2, 2**15, 2**15)
    refusal = backend.PROVIDERS["cuda"]._replace(device="cpu", problem="").refusal("pdc2d", x)
    assert refusal == f"indexes images of at most {2**31 - 1} elements, got {2**31}"
    assert backend.PROVIDERS["cpu"].refusal("pdc2d", x) is None


def test_info_prints_json() -> None:
    result = run_python("-m", "frd_kernels.info", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["build"]["cpu_isa"] in ("scalar", "avx2", "avx512")
    assert facts["backends"]["cpu"][0] is True


def test_info_prints_without_the_native_library(tmp_path: pathlib.Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "frd_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = subprocess.run(
        [sys.executable, "-m", "frd_kernels.info"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "libfrd_cpu.so was not built" in result.stdout


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_instruction_set_can_be_capped(isa: str) -> None:
    result = run_python("-c", "import frd_kernels._C as c; print(c.cpu_isa())", FRD_CPU_ISA=isa)
    assert result.stdout.strip() in ("scalar", isa)


def undefined(library: pathlib.Path) -> set[str]:
    """What the loader has to find, as name or name@VERSION; weak symbols may stay missing."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    return {line.split()[1] for line in listed.stdout.splitlines() if line.split()[0] == "U"}


@pytest.fixture(scope="module")
def stable_functions() -> set[str]:
    """Functions of libtorch's stable C interface as the headers declare it for torch 2.11."""
    target = re.search(r"TORCH_TARGET_VERSION=\w+", (ROOT / "CMakeLists.txt").read_text())
    include = pathlib.Path(torch.__file__).parent / "include"
    headers = "stable/c/shim.h", "inductor/aoti_torch/c/shim.h"
    result = subprocess.run(
        ["g++", "-std=c++17", "-E", "-P", "-x", "c++", "-DUSE_CUDA", f"-D{target[0]}", f"-I{include}", "-"],
        input="".join(f"#include <torch/csrc/{header}>\n" for header in headers),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\s*\()", result.stdout))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_stable_abi_only(library: pathlib.Path, stable_functions: set[str]) -> None:
    """Of torch the libraries call the stable ABI of 2.11 alone, and nothing of Python: one binary serves torch
    2.11 and later, and every Python."""
    if not shutil.which("g++"):
        pytest.skip("needs g++, which reads torch's headers")
    # The C library's and CUDA's symbols carry a version. torch's have none, nor do those of libstdc++ that torch
    # exports too.
    standard = ctypes.CDLL("libstdc++.so.6")
    called = {name for name in undefined(library) if "@" not in name and not hasattr(standard, name)}
    assert called and called <= stable_functions


def last_line_of_a_build(tmp_path: pathlib.Path, before: str = "", **environment: str) -> str:
    """What the backend's hook says last, in a tree of its own and with no programs but CMake, Ninja and sh."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "build_backend", tmp_path / "build_backend")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cmake", "ninja", "sh"):
        found = shutil.which(name, path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
        if found is None:
            pytest.skip(f"{name} is not installed")
        (programs / name).symlink_to(found)
    code = f"import sys; sys.path.insert(0, 'build_backend'); {before}"
    code += "\nimport frd_backend\nfrd_backend.build_wheel('.')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env={"PATH": str(programs), "HOME": str(tmp_path), **environment},
    )
    assert result.returncode == 1 and "Traceback" not in result.stdout, result.stdout
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "no C++ compiler was found: install one (Debian and Ubuntu: apt install g++;"),
        ({"CXX": "nothing-of-that-name"}, "no C++ compiler was found: install one"),
        (
            {"CXX": shutil.which("false") or ""},
            "the C++ compiler does not work: mend it, or name another in CXX",
        ),
        ({"TORCH_CUDA_ARCH_LIST": "90"}, 'TORCH_CUDA_ARCH_LIST holds entries such as "9.0"'),
    ],
)
def test_a_build_says_last_what_is_missing(
    tmp_path: pathlib.Path, environment: dict[str, str], reason: str
) -> None:
    pytest.importorskip("setuptools")
    assert last_line_of_a_build(tmp_path, **environment).startswith(f"frd_kernels cannot be built: {reason}")


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("torch", "torch >= 2.11 is not installed: run `pip install torch` first"),
        ("setuptools", "setuptools >= 77 is not installed: run `pip install setuptools` first"),
    ],
)
def test_a_build_without_isolation_names_the_missing_package(
    tmp_path: pathlib.Path, package: str, reason: str
) -> None:
    pytest.importorskip("setuptools")
    hidden = {
        "torch": "import importlib.util as u, os; find, isfile = u.find_spec, os.path.isfile; "
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a); "
        "os.path.isfile = lambda path: 'torch' not in str(path) and isfile(path)",
        "setuptools": "sys.modules['setuptools'] = None",
    }
    line = last_line_of_a_build(tmp_path, hidden[package])
    assert line.startswith(f"frd_kernels cannot be built: {reason}")


def test_without_a_working_nvcc_the_cuda_library_is_left_out(tmp_path: pathlib.Path) -> None:
    """A compiler of CUDA that fails is as none, and the build says so; asked for by FRD_CUDA=ON it is an error."""
    cmake, compiler, false = shutil.which("cmake"), shutil.which("g++"), shutil.which("false")
    if not (cmake and compiler and false and shutil.which("ninja")):
        pytest.skip("needs cmake, ninja and g++")
    command = [cmake, "-S", str(ROOT), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-DFRD_TORCH_DIR={pathlib.Path(torch.__file__).parent}", f"-DFRD_OUTPUT_DIR={tmp_path}"]
    for mode, line in (
        ("AUTO", "frd_kernels is built without CUDA"),
        ("ON", "FRD_CUDA=ON but no nvcc that works"),
    ):
        result = subprocess.run(
            [*command, "-B", str(tmp_path / mode), f"-DFRD_CUDA={mode}"],
            capture_output=True,
            text=True,
            env=os.environ | {"CUDACXX": false},
        )
        assert (result.returncode == 0) == (mode == "AUTO")
        assert line in result.stdout + result.stderr
