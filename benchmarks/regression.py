"""The regression gate for CI: what one call of each CPU kernel costs, counted instead of timed.

Three figures repeat exactly however busy the machine is, with one thread and once warm: the instructions run inside
libfrd_cpu.so (`step_counter.cpp`), how often it is entered, which shows detours through torch, and the function calls
of Python. They depend on the instruction set, which is fixed here, and on the compiler: recorded by another one,
nothing is comparable. With another torch, whose headers are compiled in, instructions get a wider margin, and entries
and Python calls, part of which are torch's own, are not compared.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .gate import gate
from .machine import RESULTS, ROOT, read_json, revision
from .registry import Case, cases
from .timing import no_collection

SOURCE = pathlib.Path(__file__).with_name("step_counter.cpp")
LIBRARY = "libfrd_cpu.so"
RECORDED = RESULTS / "cpu" / "instructions.json"
ISA = "avx2"
WARM_UP = 5
# A step takes microseconds, so the data are small, yet large enough that the kernels' loops outweigh their set-up.
# The ICM has more pixels than centres: with one each, gradients are zero and their relative errors meaningless.
SHAPES = {"pdc_weight": (16, 16, 3, 3), "pdc": (1, 16, 16, 16), "icm": (1, 16, 8, 16)}
OTHER_SHAPE = (1, 16, 8, 8)
FIGURES = ("instructions", "entries", "python_calls")
MARGIN, OTHER_TORCH_MARGIN = 0.05, 0.10
# Of some thirty calls, two of which may be worth having.
PYTHON_MARGIN = 0.15
NOT_COMPARABLE = 77


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
        ctypes.py_object,
        ctypes.c_uint64,
        ctypes.c_uint64,
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
    with no_collection():
        _counter().frd_count_call(call, *code, ctypes.byref(steps))
        return Counts(steps.instructions, steps.entries, _python_calls(call))


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
    # Without that of setprofile itself.
    return calls - 1


def small_cases(only: Sequence[str] = ()) -> list[Case]:
    """One small case for each op, dtype, layout and mode that is registered for CPUs; those whose name contains one of
    the texts in `only`, if there are any."""
    found: dict[str, Case] = {}
    for case in cases("cpu"):
        if case.mean == 0:
            shape = SHAPES.get(case.op.split()[0], OTHER_SHAPE)
            case = dataclasses.replace(case, shape=shape, compiled=())
            found.setdefault(case.name, case)
    return [case for name, case in found.items() if not only or any(text in name for text in only)]


def count_case(case: Case) -> Counts:
    """Of our call of the case, after the correctness gate."""
    impls = case.build(case)
    gate(case, impls)
    return count(next(iter(impls.ours.values())))


def environment() -> dict[str, str]:
    """What the counts depend on, besides the code."""
    native = importlib.import_module("frd_kernels._C")
    return {
        "isa": native.cpu_isa(),
        "compiler": native.build_info()["compiler"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def count_all(only: Sequence[str]) -> dict[str, Any]:
    """What `main` prints in a process of its own, with the instruction set fixed."""
    fixed = {"FRD_CPU_ISA": ISA, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", __name__, *only]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | fixed, stdout=subprocess.PIPE, text=True, check=True
    )
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def key(environment: dict[str, str]) -> str:
    return f"{environment['isa']}, compiler {environment['compiler']}"


def margins(environment: dict[str, str], recorded: dict[str, str]) -> dict[str, float]:
    """By what fraction each figure may grow; those that are not comparable are left out."""
    if environment["torch"] != recorded["torch"]:
        return {"instructions": OTHER_TORCH_MARGIN}
    found = {"instructions": MARGIN, "entries": MARGIN}
    same_python = environment["python"].split(".")[:2] == recorded["python"].split(".")[:2]
    return found | {"python_calls": PYTHON_MARGIN} if same_python else found


def grown(counts: dict[str, int], recorded: dict[str, int], allowed: dict[str, float]) -> list[str]:
    """What has grown beyond its margin, in words."""
    return [
        f"{figure} {counts[figure] / recorded[figure] - 1:+.1%}, at most {margin:+.0%} is allowed"
        for figure, margin in allowed.items()
        if counts[figure] > (1 + margin) * recorded[figure]
    ]


def judge(report: dict[str, Any], recorded: dict[str, Any]) -> tuple[list[str], int]:
    """A line for each case, and how many have grown."""
    allowed = margins(report["environment"], recorded["environment"])
    lines, red = [], 0
    for name, counts in report["cases"].items():
        before = recorded["cases"].get(name)
        if before is None:
            lines.append(f"{name}: nothing is recorded; --update records it")
            continue
        found = grown(counts, before, allowed)
        red += bool(found)
        figures = ", ".join(f"{counts[figure]} {figure} ({before[figure]})" for figure in FIGURES)
        lines.append(f"{name}: {figures}: " + ("; ".join(f"GROWN {text}" for text in found) or "ok"))
    return lines, red


def update(path: pathlib.Path, report: dict[str, Any], whole: bool) -> None:
    """Records the counts. `whole` says that all cases were counted: others are then no longer registered and go."""
    recorded, name = read_json(path), key(report["environment"])
    kept = {} if whole else recorded.get(name, {}).get("cases", {})
    recorded[name] = report | {"revision": revision(), "cases": kept | report["cases"]}
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", action="append", default=[], help="the cases whose name contains this text; repeatable"
    )
    parser.add_argument("--update", action="store_true", help="record what is counted now")


def run(options: argparse.Namespace) -> int:
    """Exit status: 0 no count has grown, 1 one has, 77 nothing is comparable or can be counted here."""
    # Loads the library.
    importlib.import_module("frd_kernels")
    if reason := problem():
        print(f"not comparable: cannot count instructions: {reason}")
        return NOT_COMPARABLE
    try:
        report = count_all(options.only)
    except subprocess.CalledProcessError:
        print("counting failed: a red correctness gate, or the error above")
        return 1
    if not report["cases"]:
        print(f"no case contains {options.only} in its name", file=sys.stderr)
        return 2
    name = key(report["environment"])
    if options.update:
        update(RECORDED, report, whole=not options.only)
        print(f"recorded {len(report['cases'])} cases as {name!r} in {RECORDED}")
        return 0
    recorded = read_json(RECORDED).get(name)
    if recorded is None:
        print(f"not comparable: {RECORDED.name} has no counts for {name!r}")
        return NOT_COMPARABLE
    lines, red = judge(report, recorded)
    print("\n".join(lines))
    print(f"{len(lines)} cases against {recorded['revision'][:12]}, {red} grown")
    return 1 if red else 0


def main(only: Sequence[str]) -> None:
    """Prints JSON: the environment and each case's counts."""
    torch.set_num_threads(1)
    counted = {case.name: dataclasses.asdict(count_case(case)) for case in small_cases(only)}
    print(json.dumps({"environment": environment(), "cases": counted}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
