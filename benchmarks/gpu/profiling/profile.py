"""Why a kernel is slow: what Nsight Compute counts of each launch of the cases farthest from their goals, and where
its warps wait; before that, how the ICM's time grows (`waves.py`).

    python -m benchmarks.gpu.profiling.profile --out profile.json --limit 190

Where counters cannot be read, PyTorch's profiler tells the launches' times instead. `--only` chooses other cases.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gzip
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from ... import conditions, registry
from ...gate import one_line
from ...launch import module_command
from ..process import ROOT, last_line, run_logged
from ..run import read_json
from . import ncu
from .target import RED

CASES = (
    "icm paper [1x256x16x16] bfloat16 nchw forward",
    "icm paper [16x256x16x16] bfloat16 nchw forward",
    "icm paper [16x256x16x16] bfloat16 nchw forward+backward",
    "dpm [8x256x64x64] bfloat16 channels_last forward",
    "dpm [8x256x64x64] bfloat16 channels_last forward+backward",
    "pdc_weight angular [256x256x3x3] bfloat16 nchw forward",
    "pdc angular depthwise [8x256x64x64] bfloat16 channels_last forward+backward",
    "cluster [8x64x64x64] bfloat16 nchw forward",
)
WAVES_SHARE, WAVES_LIMIT = 0.3, 60.0
CASE_LIMIT = 45.0  # seconds of one try
PAGE_LIMIT = 40.0
LEAST_S = 12.0  # with less left no further case is begun
DETAILED = 3  # launches of a case whose source is looked at,
DETAILED_SHARE = 0.08  # each of at least this share of the time
REFUSED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize the profiler")


class Profile:
    """The stage: what it has found is in its file after every step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.monotonic()
        self.logs = options.out.parent / "logs"
        self.tool, self.sections = ncu.find() if options.device == "cuda" else "", ""
        self.unpatched: set[str] = set()  # operations whose kernels could not be patched, or not in time
        self.problems: dict[str, str] = {}
        self.report: dict[str, Any] = conditions.origin(options.device) | {
            "tool": "",
            "without_counters": "" if self.tool else "Nsight Compute was not found",
            "waves": {},
            "cases": [],
            "problems": self.problems,
            "left_out": [],
        }

        if self.tool:
            self.ask()

    def ask(self) -> None:
        """Which version of the tool there is, and what it can collect."""
        try:
            version, self.sections = (answer(self.tool, f"--{what}") for what in ("version", "list-sections"))
        except (OSError, subprocess.SubprocessError) as error:
            self.tool, self.report["without_counters"] = "", one_line(error)
        else:
            found = re.search(r"Version (\S+)", version)
            self.report["tool"] = f"Nsight Compute {found[1] if found else '?'}"

    def left(self) -> float:
        return self.options.limit - (time.monotonic() - self.began)

    def write(self) -> None:
        self.report["seconds"] = round(time.monotonic() - self.began, 1)
        conditions.write(self.options.out, self.report)

    def waves(self) -> None:
        limit = min(WAVES_LIMIT, WAVES_SHARE * self.options.limit)
        path, log = self.logs / "waves.json", self.logs / "waves.log"
        path.unlink(missing_ok=True)
        command = self.module("waves", "--out", path, "--only", self.options.only, "--limit", limit)
        if problem := run_logged(command, log, limit + 15):
            self.problems["waves"] = problem
        self.report["waves"] = read_json(path)
        self.write()

    def cases(self) -> None:
        names = self.chosen()
        for index, name in enumerate(names):
            if self.left() < LEAST_S:
                self.report["left_out"] = names[index:]
                break
            began = time.monotonic()
            record = {"name": name} | self.case(name)
            record["seconds"] = round(time.monotonic() - began, 1)
            self.report["cases"].append(record)
            print(f"{record['seconds']:6.1f} s  {name}: {self.problems.get(name, record['how'])}", flush=True)
            self.write()
        self.write()

    def chosen(self) -> list[str]:
        if not self.options.only:
            return list(CASES)
        return [case.name for case in registry.cases("cuda", self.options.only)]

    def case(self, name: str) -> dict[str, Any]:
        """With counters and source; else with fewer counters; else a trace."""
        why: list[str] = []
        op = name.partition(" [")[0]
        self.log_of(name).unlink(missing_ok=True)
        for patched in (True, False):
            if not self.tool or (patched and op in self.unpatched) or self.left() < LEAST_S:
                continue
            found, problem = self.counted(name, patched)
            why += [problem] if problem else []
            if found:
                how = "counters and source" if patched else "counters and samples"
                return {"how": how, "launches": found, "problem": "; ".join(why)}
            self.unpatched |= {op}
            if RED in problem:
                self.problems[name] = problem
                return {"how": "nothing", "launches": [], "problem": problem}
            if any(mark in problem for mark in REFUSED):
                self.tool, self.report["without_counters"] = "", problem
        found, problem = self.traced(name)
        why += [problem] if problem else []
        if problem:
            self.problems[name] = "; ".join(why)
        return {"how": "trace", "launches": found, "problem": "; ".join(why)}

    def counted(self, name: str, patched: bool) -> tuple[list[dict[str, Any]], str]:
        """The launches as Nsight Compute counts them, and what went wrong."""
        log = self.log_of(name)
        with tempfile.TemporaryDirectory(prefix="frd_profile_") as folder:
            report = pathlib.Path(folder) / "case.ncu-rep"
            target = self.module("target", "--case", name)
            sections = ncu.known(self.sections, patched)
            command = ncu.profile_command(self.tool, report, target, sections)
            problem = run_logged(command, log, min(CASE_LIMIT, max(1.0, self.left() - 5)))
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
            told = [line for line in lines if any(mark in line for mark in (RED, *REFUSED))]
            if told or not report.exists():
                return [], (told or [problem or "Nsight Compute wrote no report"])[0]
            try:
                return self.read(report, name), problem
            except Exception as error:  # where a page is not as it was: a trace can still tell something
                return [], f"its report could not be read: {one_line(error)}"

    def read(self, report: pathlib.Path, name: str) -> list[dict[str, Any]]:
        """The launches of a report, those that take long with where they wait."""
        raw = self.page(report, "raw", "", None)
        self.keep(f"{slug(name)}.raw", raw)
        launches = ncu.launches(raw)
        if not launches:
            raise RuntimeError("no launch was profiled")
        total = sum(launch["us"] for launch in launches)
        by_time = sorted(range(len(launches)), key=lambda index: -launches[index]["us"])[:DETAILED]
        chosen = [index for index in by_time if launches[index]["us"] >= DETAILED_SHARE * total]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            found = pool.map(lambda index: self.hot(report, index, launches[index], name), chosen)
        for index, hot in zip(chosen, found, strict=True):
            launches[index]["hot"] = hot
        return launches

    def hot(self, report: pathlib.Path, index: int, launch: dict[str, Any], name: str) -> dict[str, Any]:
        """Where one launch waits; why that is not known in "left_out"."""
        try:
            code = ncu.instructions(self.page(report, "source", "sass", index))
            where = ncu.lines(self.page(report, "source", "cuda,sass", index))
            self.keep(f"{slug(name)}.{index}.instructions", ncu.listing(code, where))
            found = ncu.hot(code, where)
        except Exception as error:  # the counters are there all the same
            return {"left_out": one_line(error)}
        add_text(found.get("lines", []))
        counted, told = launch.get("samples", found["samples"]), found["samples"]
        if counted != told:
            found["problem"] = f"the counters tell of {counted:.0f} samples, the source of {told:.0f}"
        return found

    def page(self, report: pathlib.Path, page: str, source: str, launch: int | None) -> str:
        command = ncu.page_command(self.tool, report, page, source, launch)
        limit = max(5.0, min(PAGE_LIMIT, self.left()))
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit)
        return answer.stdout

    def keep(self, name: str, text: str) -> None:
        """The report holds more than the stage's file, and the GPU is not there for long."""
        path = self.options.out.parent / "profile" / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))

    def traced(self, name: str) -> tuple[list[dict[str, Any]], str]:
        path, log = self.logs / "trace.json", self.log_of(name)
        path.unlink(missing_ok=True)
        command = self.module("target", "--case", name, "--trace", path)
        problem = run_logged(command, log, min(CASE_LIMIT, max(1.0, self.left())))
        launches: Any = read_json(path) or []
        return launches, problem or ("" if launches else f"no launch was seen: {last_line(log)}")

    def log_of(self, name: str) -> pathlib.Path:
        return self.logs / f"profile.{slug(name)}.log"

    def module(self, name: str, *more: object) -> list[str]:
        return [*module_command(f"gpu.profiling.{name}"), *map(str, more), "--device", self.options.device]


def add_text(lines: Sequence[dict[str, Any]]) -> None:
    """The source line itself, where this tree has the file."""
    for entry in lines:
        file, _, line = entry["name"].rpartition(":")
        path = ROOT / file
        if file.startswith("csrc/") and path.exists():
            text = path.read_text().split("\n")
            entry["text"] = text[int(line) - 1].strip()[:120] if int(line) <= len(text) else ""


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def answer(tool: str, question: str) -> str:
    return subprocess.run([tool, question], capture_output=True, text=True, timeout=30).stdout


def summary(report: dict[str, Any]) -> str:
    cases = report["cases"]
    counted = sum("counters" in case["how"] for case in cases)
    waves = report["waves"].get("points", [])
    text = f"profile: {len(cases)} cases, {counted} with counters, {len(waves)} points of the waves"
    if report["left_out"]:
        text += f", {len(report['left_out'])} cases left out"
    for name, problem in report["problems"].items():
        return f"{text}, {len(report['problems'])} problems, first: {name}: {problem}"[:190]
    return text


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a case could not be looked at, or a point of the waves has no time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profiling.profile", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--only", default="", help="the cases whose name holds this text (default: the worst)"
    )
    parser.add_argument("--limit", type=float, default=190.0, help="seconds for all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    profile = Profile(parser.parse_args(argv))
    profile.waves()
    profile.cases()
    print(summary(profile.report))
    return int(bool(profile.problems))


if __name__ == "__main__":
    sys.exit(main())
