"""The regression gate for CI: `python -m benchmarks.regression [--only TEXT] [--update]`.

It compares counts (`instructions.py`) with recorded ones, never times, so that a busy machine decides nothing. Counts
depend on the instruction set, which is fixed here, and on the compiler: with another one than recorded nothing is
comparable. With another torch, whose headers are compiled in, instructions get a wider margin, and entries into the
library and Python's calls, part of which are torch's own, are not compared.

Exit status: 0 no count has grown, 1 one has, 77 nothing is comparable or can be counted here.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from . import instructions
from .revision import revision

BASELINES = pathlib.Path(__file__).parent / "results" / "cpu" / "instructions.json"
MARGIN, OTHER_TORCH_MARGIN = 0.05, 0.10
PYTHON_MARGIN = 0.15  # of some thirty calls, two of which may be worth having
NOT_COMPARABLE = 77
FIGURES = ("instructions", "entries", "python_calls")


def count_all(only: Sequence[str], isa: str) -> dict[str, Any]:
    """The report of `instructions.main` from a process of its own, with the CPU kernels capped at `isa`."""
    command = [sys.executable, "-m", instructions.__name__]
    for text in only:
        command += ["--only", text]
    fixed = {"FRD_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    result = subprocess.run(command, env=os.environ | fixed, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def key(environment: dict[str, str]) -> str:
    return f"{environment['isa']}, compiler {environment['compiler']}"


def margins(environment: dict[str, str], recorded: dict[str, str]) -> dict[str, float]:
    """By what share each figure may grow; those that are not comparable are left out."""
    if environment["torch"] != recorded["torch"]:
        return {"instructions": OTHER_TORCH_MARGIN}
    found = {"instructions": MARGIN, "entries": MARGIN}
    same_python = environment["python"].split(".")[:2] == recorded["python"].split(".")[:2]
    return found | {"python_calls": PYTHON_MARGIN} if same_python else found


def grown(counts: dict[str, int], baseline: dict[str, int], allowed: dict[str, float]) -> list[str]:
    """What has grown beyond its margin, in words."""
    return [
        f"{figure} {counts[figure] / baseline[figure] - 1:+.1%}, at most {margin:+.0%} is allowed"
        for figure, margin in allowed.items()
        if counts[figure] > (1 + margin) * baseline[figure]
    ]


def judge(report: dict[str, Any], recorded: dict[str, Any]) -> tuple[list[str], int]:
    """A line for each case, and how many have grown."""
    allowed = margins(report["environment"], recorded["environment"])
    lines, red = [], 0
    for name, counts in report["cases"].items():
        baseline = recorded["cases"].get(name)
        if baseline is None:
            lines.append(f"{name}: no baseline; --update records one")
            continue
        found = grown(counts, baseline, allowed)
        red += bool(found)
        figures = ", ".join(f"{counts[figure]} {figure} ({baseline[figure]})" for figure in FIGURES)
        lines.append(f"{name}: {figures}: " + ("; ".join(f"GROWN {text}" for text in found) or "ok"))
    return lines, red


def update(path: pathlib.Path, report: dict[str, Any], whole: bool) -> None:
    """Records the counts; those of cases that are no longer registered go where `whole` says that all were counted."""
    baselines = json.loads(path.read_text()) if path.exists() else {}
    name = key(report["environment"])
    kept = {} if whole else baselines.get(name, {}).get("cases", {})
    baselines[name] = report | {"revision": revision(), "cases": kept | report["cases"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(baselines, indent=1, sort_keys=True) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.regression",
        description="compare instruction counts with the recorded ones",
    )
    parser.add_argument(
        "--only", action="append", default=[], help="the cases whose name holds this text; repeatable"
    )
    parser.add_argument("--update", action="store_true", help="record what is counted now")
    parser.add_argument(
        "--isa", default="avx2", choices=["scalar", "avx2", "avx512"], help="instruction set (default avx2)"
    )
    parser.add_argument("--baselines", type=pathlib.Path, default=BASELINES, help="default: %(default)s")
    options = parser.parse_args(argv)
    if reason := instructions.problem():
        print(f"not comparable: cannot count instructions: {reason}")
        return NOT_COMPARABLE
    try:
        report = count_all(options.only, options.isa)
    except subprocess.CalledProcessError:
        print("counting failed: a red correctness gate, or the error above")
        return 1
    if not report["cases"]:
        parser.error(f"no case holds {options.only} in its name")
    if options.update:
        update(options.baselines, report, whole=not options.only)
        print(
            f"recorded {len(report['cases'])} cases as {key(report['environment'])!r} in {options.baselines}"
        )
        return 0
    recorded = json.loads(options.baselines.read_text()).get(key(report["environment"]))
    if recorded is None:
        print(f"not comparable: {options.baselines.name} has no counts for {key(report['environment'])!r}")
        return NOT_COMPARABLE
    lines, red = judge(report, recorded)
    print("\n".join(lines))
    print(f"{len(lines)} cases against {recorded['revision'][:12]}, {red} grown")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
