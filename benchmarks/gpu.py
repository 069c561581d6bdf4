"""One command on one GPU, offline: `python -m benchmarks gpu`. Builds the library where it is missing, runs the tests
marked `gpu`, runs those marked `sanitize` under NVIDIA's compute-sanitizer, calibrates, measures kernels and nets, and
writes the page.

Each stage is a process of its own with a time limit and a log, so that a kernel that hangs or spoils the GPU's state
ends no more than its case; every outcome is on disk before the next case starts. Imports nothing of frd_kernels, which
may have to be built first.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .machine import (
    RESULTS,
    REVISION,
    ROOT,
    append_line,
    missing_gpu,
    now,
    read_json,
    read_lines,
    revision,
    write_json,
)
from .report import write_page

# Seconds that a stage may take, and its share of what is left where that is less. In the order in which they run.
LIMITS = {
    "build": (300.0, 0.7),
    "tests": (240.0, 0.45),
    "sanitize": (150.0, 0.3),
    "calibrate": (45.0, 0.3),
    "compile": (75.0, 0.3),
    "kernels": (400.0, 0.65),
    "model": (150.0, 1.0),
}
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Of the measuring process: a case that ends it is passed over.
STARTS = 6
# Seconds without an outcome, from which on the process is ended; the compiler's search takes longer.
CASE_LIMIT = 180.0

PROBE = "import frd_kernels as fk; ok, why = fk.backends()['cuda']; raise SystemExit(0 if ok else why)"
CALIBRATE = (
    "import pathlib, sys; from benchmarks import machine, timing; "
    "machine.write_json(pathlib.Path(sys.argv[1]), timing.calibrate('cuda'))"
)


class Run:
    """One run of the command: its options, its clock, and what the folder has so far."""

    def __init__(self, options: argparse.Namespace, folder: pathlib.Path) -> None:
        self.options, self.folder = options, folder
        self.end = time.monotonic() + options.limit
        self.lines = folder / "logs" / "kernels.jsonl"
        self.report: dict[str, Any] = {"when": now(), "revision": revision()} | read_json(
            folder / "kernels.json"
        )
        self.stages: dict[str, Any] = self.report.setdefault("stages", {})

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def log(self, stage: str) -> pathlib.Path:
        return self.folder / "logs" / f"{stage}.log"

    def write(self) -> None:
        """Takes in the lines of the measuring process and writes the result file."""
        records = {(record["name"], record["timing"]): record for record in self.report.get("cases", [])}
        problems: dict[str, str] = {}
        head: dict[str, Any] = {}
        for line in read_lines(self.lines):
            # Of a process that was started again, the first state counts.
            head = line.get("head", {}) | head
            if "start" in line:
                problems[line["start"]] = "the process ended, or took too long"
            if "end" in line:
                problems.pop(line["end"], None)
            if "problem" in line:
                problems[line["end"]] = line["problem"]
            # A case with the compiler's search replaces the one without.
            for record in line.get("records", []):
                records[record["name"], record["timing"]] = {"revision": revision()} | record
        self.report |= head
        self.report["cases"], self.report["problems"] = list(records.values()), problems
        self.report["quiet"] = all(record["quiet"] for record in records.values())
        write_json(self.folder / "kernels.json", self.report)

    def pack(self) -> None:
        """The whole folder, logs included, as one file."""
        if self.options.archive:
            draft = self.options.archive.with_name(self.options.archive.name + ".part")
            with tarfile.open(draft, "w:gz") as archive:
                archive.add(self.folder, self.folder.name)
            draft.replace(self.options.archive)


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def run_logged(
    command: Sequence[str], log: pathlib.Path, limit: float, watch: Callable[[], bool] = lambda: True
) -> str:
    """Runs a command from the root of the tree into a log. Returns '' or why it failed; ends it, and the processes it
    started, after `limit` seconds or when `watch`, asked twice a second, says no."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # What a process has printed has to be in the log when it is ended.
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        end = time.monotonic() + limit
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    return f"cut after {limit:.0f} s"
                if not watch():
                    return "cut: a case took too long"
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "" if process.returncode == 0 else f"exit status {process.returncode}: {last_line(log)}"


def last_line(log: pathlib.Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def build(run: Run, limit: float) -> str:
    """Compiles for this GPU where the library does not load. Without nvcc the Triton kernels can still run."""
    if not run_logged(python("-c", PROBE), run.log("build"), limit):
        return ""
    import torch

    major, minor = torch.cuda.get_device_capability()
    script = (
        f"TORCH_CUDA_ARCH_LIST={major}.{minor} PYTHON={shlex.quote(sys.executable)} tools/build_inplace.sh"
    )
    return run_logged(["bash", "-c", script], run.log("build"), limit)


def pytest_options(limit: float) -> list[str]:
    """What the installed plugins can do. The verbose log has each outcome at once, so a cut loses none."""
    options = ["-v", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        # Replaces a worker that a test has crashed.
        options += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "120", "--session-timeout", f"{max(10.0, limit - 10):.0f}"]
    return options


def run_tests(run: Run, what: str, log: pathlib.Path, command: Sequence[str], limit: float) -> str:
    """Runs pytest and adds the outcomes that its log has to `suite.json`, also where it was cut."""
    log.unlink(missing_ok=True)
    problem = run_logged(command, log, limit)
    # Lines of the verbose log; the summary at its end has no percentage.
    found = re.findall(
        r"^(?=.*%\]).*\b(PASSED|FAILED|SKIPPED|ERROR)\b", log.read_text(errors="replace"), re.M
    )
    counts = {outcome.lower(): found.count(outcome) for outcome in sorted(set(found))}
    suite = read_json(run.folder / "suite.json")
    entry = {"when": now(), "revision": revision(), "what": what, **counts}
    suite["runs"] = [*suite.get("runs", []), entry | ({"note": problem} if problem else {})]
    write_json(run.folder / "suite.json", suite)
    return f"{what}: {problem}" if problem else ""


def tests(run: Run, limit: float) -> str:
    """Those of Triton last: each of its kernels has to be compiled, so that a cut would leave out the others."""
    problems, end = [], time.monotonic() + limit
    for name, selected in (("cuda", "not triton"), ("triton", "triton")):
        left = max(1.0, end - time.monotonic())
        options = ["-m", "gpu", "-k", selected, *pytest_options(left)]
        command = python("-m", "pytest", "tests", *options)
        problems.append(run_tests(run, f"pytest -m gpu, {selected}", run.log(f"tests.{name}"), command, left))
    return "; ".join(filter(None, problems))


def sanitize(run: Run, limit: float) -> str:
    """Each of compute-sanitizer's tools over the same few tests, in an equal part of the time."""
    installed = sorted(pathlib.Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    program = shutil.which("compute-sanitizer") or (str(installed[-1]) if installed else None)
    if program is None:
        return "left out: compute-sanitizer is not installed"
    problems, end = [], time.monotonic() + limit
    selected = python("-m", "pytest", "tests/test_gpu.py", "-m", "sanitize", "-v", "-p", "no:cacheprovider")
    for index, tool in enumerate(TOOLS):
        part = max(1.0, (end - time.monotonic()) / (len(TOOLS) - index))
        command = [program, "--tool", tool, "--error-exitcode", "9", *selected]
        log = run.log(f"sanitize.{tool}")
        problems.append(run_tests(run, f"compute-sanitizer {tool}, pytest -m sanitize", log, command, part))
    return "; ".join(filter(None, problems))


def calibrate(run: Run, limit: float) -> str:
    return run_logged(python("-c", CALIBRATE, run.folder / "calibration.json"), run.log("calibrate"), limit)


def measuring(run: Run, *more: object) -> list[str]:
    quick = ["--quick"] if run.options.quick else []
    return python("-m", "benchmarks", "run", "--device", "cuda", "--only", run.options.only, *quick, *more)


def compile_all(run: Run, limit: float) -> str:
    """Fills the compilers' caches by some processes at a time, before one process alone measures. What it does not
    reach is compiled when it is measured."""
    parts = max(1, min(8, (os.cpu_count() or 1) // 2))
    commands = [shlex.join(measuring(run, "--check", f"{part}/{parts}")) for part in range(parts)]
    script = "export TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=2\n"
    script += "\n".join(f"{command} &" for command in commands) + "\nwait"
    run.stages["compile"]["summary"] = run_logged(["bash", "-c", script], run.log("compile"), limit)
    return ""


def kernels(run: Run, limit: float) -> str:
    """Starts the measuring process, and again after a case that ended it or took too long. Earlier records go, or stay
    with `--add`, and then only cases without a time are measured."""
    run.lines.unlink(missing_ok=True)
    if run.options.add:
        for name in dict.fromkeys(record["name"] for record in run.report.get("cases", [])):
            append_line(run.lines, start=name, end=name)
    else:
        run.report["cases"] = []
    end, problem = time.monotonic() + limit, ""
    for _ in range(STARTS):
        command = measuring(
            run, "--repeats", 30, "--lines", run.lines, "--calibration", run.folder / "calibration.json"
        )
        before = started(run)
        problem = run_logged(command, run.log("kernels"), max(1.0, end - time.monotonic()), watcher(run))
        run.write()
        last = (read_lines(run.lines) or [{}])[-1]
        if "state_after" in last.get("head", {}):
            # A red gate, which also ends the process with a status, is recorded with its case.
            return ""
        if time.monotonic() > end or started(run) == before:
            break
    return problem


def started(run: Run) -> int:
    return sum("start" in line for line in read_lines(run.lines))


def watcher(run: Run) -> Callable[[], bool]:
    """Writes what there is after every case; false once a case has taken too long."""
    state = {"size": -1, "since": time.monotonic()}

    def watch() -> bool:
        size = run.lines.stat().st_size if run.lines.exists() else 0
        if size != state["size"]:
            state["size"], state["since"] = size, time.monotonic()
            run.write()
        return time.monotonic() - state["since"] < CASE_LIMIT

    return watch


def model(run: Run, limit: float) -> str:
    """The nets' report keeps to its limit itself."""
    command = python("-m", "benchmarks", "model", "--device", "cuda", "--out", run.folder / "model.json")
    return run_logged([*command, "--limit", f"{max(5.0, limit - 15):.0f}"], run.log("model"), limit)


RUNNERS: dict[str, Callable[[Run, float], str]] = {
    "build": build,
    "tests": tests,
    "sanitize": sanitize,
    "calibrate": calibrate,
    "compile": compile_all,
    "kernels": kernels,
    "model": model,
}


def run_stages(run: Run) -> Iterator[str]:
    """Runs the stages of the options in order; the outcome of each, '' where nothing was wrong."""
    for name in run.options.stages:
        seconds, share = LIMITS[name]
        last = name == run.options.stages[-1]
        limit, began = min(seconds, (1.0 if last else share) * run.left()), time.monotonic()
        run.log(name).unlink(missing_ok=True)
        run.stages[name] = {"limit_s": round(limit, 1), "when": now()}
        problem = RUNNERS[name](run, limit) if limit >= 1 else "cut: no time was left"
        took = time.monotonic() - began
        run.stages[name] |= {"seconds": round(took, 1), "problem": problem}
        print(f"{name:10} {took:6.1f} s of {limit:5.1f}  {problem or 'done'}", flush=True)
        run.write()
        write_page(run.folder)
        run.pack()
        yield problem


def stage_names(text: str) -> list[str]:
    """In the order in which they run."""
    names = set(text.split(","))
    if unknown := sorted(names - set(LIMITS)):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(LIMITS)}, got {', '.join(unknown)}")
    return [name for name in LIMITS if name in names]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stages",
        type=stage_names,
        default=list(LIMITS),
        help=f"some of {','.join(LIMITS)} (default: all)",
    )
    parser.add_argument("--limit", type=float, default=530.0, help="seconds for all (default 530)")
    parser.add_argument("--quick", action="store_true", help="the essential cases, no compiler's search")
    parser.add_argument("--only", default="", help="the cases whose name contains this text")
    parser.add_argument("--add", action="store_true", help="only cases without a time in the folder")
    parser.add_argument(
        "--out", type=pathlib.Path, default=RESULTS, help="has a folder for each GPU (default: the results)"
    )
    parser.add_argument("--archive", type=pathlib.Path, help="packs that folder into a .tar.gz as well")
    parser.add_argument("--revision", help="of the project, where the tree is a copy without its history")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 where a stage failed or a case has no time, 2 without a GPU."""
    if missing_gpu():
        return 2
    import torch

    if options.revision:
        os.environ[REVISION] = options.revision
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = options.out.resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    job = Run(options, folder)
    problems = [problem for problem in run_stages(job) if problem and not problem.startswith("left out")]
    red = any(record["red"] for record in job.report["cases"])
    print(f"{len(job.report['cases'])} records, {len(job.report['problems'])} cases without a time: {folder}")
    return int(bool(problems or job.report["problems"] or red))
