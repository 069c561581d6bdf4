"""Drives CMakeLists.txt, the one description of the native code; everything else stands in pyproject.toml.

Environment: FRD_CUDA=AUTO|ON|OFF, TORCH_CUDA_ARCH_LIST ("9.0a;10.0+PTX"), FRD_TORCH_DIR, MAX_JOBS, CUDACXX.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from typing import NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
# What CMake prints where something is missing, and the way out.
PROBLEMS = (
    (
        "No CMAKE_CXX_COMPILER could be found|specified in the environment variable CXX",
        "no C++ compiler was found: install one (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
        "conda: conda install cxx-compiler) or name it in CXX",
    ),
    ("unable to find a build program", "neither ninja nor make was found: run `pip install ninja`"),
    ("Could NOT find Python", "Python's headers were not found (Debian and Ubuntu: apt install python3-dev)"),
    ("FRD_CUDA=ON but", "FRD_CUDA=ON, but no nvcc that works was found: set CUDACXX, or FRD_CUDA=OFF"),
    (
        r"The C\+\+ compiler\s+\S+\s+is not able to",
        "the C++ compiler does not work: mend it, or name another in CXX",
    ),
    (
        r"The CUDA compiler\s+\S+\s+is not|FAILED:.*\.cu\b|nvcc (?:fatal|error)",
        "nvcc failed; FRD_CUDA=OFF builds without the CUDA kernels",
    ),
)


def fail(message: str) -> NoReturn:
    """Ends the build with one last line, without a traceback."""
    sys.stdout.flush()  # what is buffered would follow the message
    sys.exit(f"frd_kernels cannot be built: {message}")


def run(command: list[str], env: dict[str, str]) -> None:
    """Runs a step of CMake, whose output goes on to the user."""
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    if process.returncode:
        output = "".join(lines)
        reasons = [reason for pattern, reason in PROBLEMS if re.search(pattern, output)]
        fail("; ".join(reasons[:2]) or f"{os.path.basename(command[0])} failed, its first error stands above")


def find_torch() -> pathlib.Path:
    """The installed torch package, found without importing it (sysconfig sees it in isolated builds too)."""
    spec = importlib.util.find_spec("torch")
    candidates = [os.environ.get("FRD_TORCH_DIR", "")]
    candidates += list((spec and spec.submodule_search_locations) or [])
    candidates += [os.path.join(sysconfig.get_path(key), "torch") for key in ("platlib", "purelib")]
    for candidate in candidates:
        if candidate and os.path.isfile(os.path.join(candidate, "include/torch/csrc/stable/library.h")):
            return pathlib.Path(candidate)
    fail("torch >= 2.11 is not installed: run `pip install torch` first, or set FRD_TORCH_DIR")


def cuda_archs() -> str:
    """TORCH_CUDA_ARCH_LIST in CMake's notation; "" if it is not set, for the default of CMakeLists.txt."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    archs = []
    for entry in filter(None, listed.split(";")):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            fail(f'TORCH_CUDA_ARCH_LIST holds entries such as "9.0", "9.0a" or "10.0+PTX", got {entry!r}')
        major, minor, suffix, ptx = match.groups()
        archs.append(f"{major}{minor}{suffix}" + ("" if ptx else "-real"))
    return ";".join(archs)


def cmake_executable() -> str:
    """The cmake wheel's real binary: its bin/cmake is a Python script, which pip's isolation breaks."""
    spec = importlib.util.find_spec("cmake")
    own = pathlib.Path(spec.origin).parent / "data/bin/cmake" if spec and spec.origin else None
    found = str(own) if own and own.exists() else shutil.which("cmake")
    return found or fail("cmake >= 3.20 was not found: run `pip install cmake` first")


def git_revision() -> str:
    try:
        out = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        )
        return out.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # libfrd_*.so are plain libraries: no Python ABI suffix.
        if "libfrd_" in fullname:
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        out = self.run_cmake()
        for extension in self.extensions:
            target = pathlib.Path(self.get_ext_fullpath(extension.name))
            built = out / target.name
            # In the tree too: `python -m pytest` from the root imports ./frd_kernels.
            for path in (target, ROOT / "frd_kernels" / target.name):
                if built.exists():
                    replace_file(built, path)
                elif extension.optional:
                    path.unlink(missing_ok=True)
                else:
                    fail(f"the build did not make {target.name}")

    def run_cmake(self) -> pathlib.Path:
        torch_dir, env = find_torch(), dict(os.environ)
        version = re.search(r"__version__ = '([^']*)'", (torch_dir / "version.py").read_text()).group(1)
        # One build folder per Python and torch, so that switching between them rebuilds nothing.
        build = ROOT / "build" / "cmake" / f"{sys.implementation.cache_tag}-torch{version}"
        out, mode = build / "out", os.environ.get("FRD_CUDA", "AUTO")
        if mode == "OFF":
            (out / "libfrd_cuda.so").unlink(missing_ok=True)
        if not shutil.which("nvcc") and "CUDACXX" not in env:
            installed = sorted(pathlib.Path("/usr/local").glob("cuda*/bin/nvcc"))
            env |= {"CUDACXX": str(installed[-1])} if installed else {}
        configure = [
            *(cmake_executable(), "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DFRD_TORCH_DIR={torch_dir}", f"-DFRD_OUTPUT_DIR={out}", f"-DFRD_CUDA={mode}"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-DFRD_GIT_REVISION={git_revision()}"),
            # Without a list the cache must not keep that of an earlier build.
            f"-DFRD_CUDA_ARCHS={archs}" if (archs := cuda_archs()) else "-UFRD_CUDA_ARCHS",
        ]
        ninja = shutil.which("ninja")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={os.path.abspath(ninja)}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        try:
            run(configure, env)
        except SystemExit:
            # A compiler that does not work must not stay in CMake's cache when another is there.
            (build / "CMakeCache.txt").unlink(missing_ok=True)
            shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
            raise
        run([configure[0], "--build", str(build), "-j", jobs], env)
        return out


def replace_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Never rewrite in place a library that some process has mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    shutil.copy2(source, temporary)
    os.replace(temporary, target)


setup(
    packages=find_packages(include=["frd_kernels*", "frd_model*"]),
    package_data={"frd_kernels": ["py.typed"], "frd_model": ["py.typed", "assets/*", "configs/*"]},
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
    ext_modules=[
        Extension("frd_kernels._C", []),
        Extension("frd_kernels.libfrd_cpu", []),
        Extension("frd_kernels.libfrd_cuda", [], optional=True),
    ],
)
