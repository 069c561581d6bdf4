"""What one call of a CPU kernel costs, counted instead of timed: `python -m benchmarks.instructions [--only TEXT]`.

Three figures that repeat exactly however busy the machine is, with one thread and once warm: the instructions run
inside libfrd_cpu.so, how often it is entered (which tells of detours through torch), and the function calls of Python.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib
import json
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .cases import Case
from .gate import gate
from .registry import cases

SOURCE = pathlib.Path(__file__).with_name("step_counter.cpp")
LIBRARY = "libfrd_cpu.so"
WARM_UP = 5
# A step takes microseconds, so the data are small, yet large enough that the kernels' loops outweigh their set-up.
# The ICM has more pixels than centres: with one each, gradients are zero and their relative errors anything.
SHAPES = {"pdc_weight": (16, 16, 3, 3), "pdc": (1, 16, 16, 16), "icm": (1, 16, 8, 16)}
OTHER_SHAPE = (1, 16, 8, 8)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of one call."""

    instructions: int
    entries: int
    python_calls: int


class _Steps(ctypes.Structure):
    _fields_ = [("instructions", ctypes.c_uint64), ("entries", ctypes.c_uint64)]


def problem() -> str:
    """Why nothing can be counted here; '' if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the trap flag is x86-64's, used on Linux; this is {platform.machine()} on {sys.platform}"
    if not SOURCE.exists():
        return f"{SOURCE.name} lies in a source checkout only"
    if shutil.which("g++") is None:
        return "needs g++"
    return "" if _code_of(LIBRARY) else f"{LIBRARY} is not loaded"


def _code_of(library: str) -> tuple[int, int] | None:
    """First address and size of a loaded library's code."""
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("/" + library) and line.split()[1] == "r-xp":
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            return begin, end - begin
    return None


@functools.cache
def _counter() -> ctypes.PyDLL:
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "step_counter.so"
        subprocess.run(["g++", "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(out)], check=True)
        library = ctypes.PyDLL(str(out))
    library.frd_count_call.argtypes = [
        *(ctypes.py_object, ctypes.c_uint64, ctypes.c_uint64),
        ctypes.POINTER(_Steps),
    ]
    return library


def count(call: Callable[[], object]) -> Counts:
    """Counts one call; what it does in other threads is not seen.

    Raises:
        RuntimeError: nothing can be counted here, or not with more than one thread.
    """
    if reason := problem():
        raise RuntimeError(f"cannot count instructions: {reason}")
    if torch.get_num_threads() != 1:
        raise RuntimeError(f"instructions are counted with 1 thread, got {torch.get_num_threads()}")
    for _ in range(WARM_UP):
        call()
    code, steps = _code_of(LIBRARY), _Steps()
    assert code is not None
    with _no_collection():
        _counter().frd_count_call(call, *code, ctypes.byref(steps))
        return Counts(steps.instructions, steps.entries, _python_calls(call))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _python_calls(call: Callable[[], object]) -> int:
    calls = 0

    def profile(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls - 1  # that of setprofile itself


def small_cases(only: Sequence[str] = ()) -> list[Case]:
    """One small case for each op, dtype, layout and mode that is registered for CPUs; those whose name holds one of
    the texts in `only`, if there are any."""
    found: dict[str, Case] = {}
    for case in cases("cpu"):
        if case.mean == 0:
            shape = SHAPES.get(case.op.split()[0], OTHER_SHAPE)
            case = dataclasses.replace(case, shape=shape, compiled=())
            found.setdefault(case.name, case)
    return [case for name, case in found.items() if not only or any(text in name for text in only)]


def measure(case: Case) -> Counts:
    """Of our call of the case, once the gate is green."""
    sides = case.build(case)
    gate(case, sides)
    return count(next(iter(sides.ours.values())))


def environment() -> dict[str, str]:
    """What the counts depend on, besides the code."""
    native = importlib.import_module("frd_kernels._C")
    return {
        "isa": native.cpu_isa(),
        "compiler": native.build_info()["compiler"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints JSON: the environment and each case's counts. Exit status 1 where nothing can be counted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="the cases whose name holds this text")
    options = parser.parse_args(argv)
    if reason := problem():
        print(f"cannot count instructions: {reason}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    counted = {case.name: dataclasses.asdict(measure(case)) for case in small_cases(options.only)}
    print(json.dumps({"environment": environment(), "cases": counted}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
