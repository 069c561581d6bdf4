"""One command on one GPU, offline, in less than nine minutes: `python -m benchmarks.gpu [--short] [--only TEXT]`.

Builds the library where it is missing, runs the GPU's tests, calibrates, measures the kernels and the models, draws.
Each stage is a process of its own with a time limit and a log; what there is so far is on disk after every case.
Imports nothing of frd_kernels, which may have to be built first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from . import gpu_table
from .launch import module_command

PACKAGE = __package__ or "benchmarks"
# The tree that holds tests and tools; once installed, the one that the command is called in.
ROOT = pathlib.Path(__file__).resolve().parents[1] if PACKAGE == "benchmarks" else pathlib.Path.cwd()
TESTS = (
    *("tests/kernels", "-k", "cuda or triton"),
    *("--ignore=tests/kernels/test_cuda_build.py", "--ignore=tests/kernels/test_triton_build.py"),
)
# Seconds that a stage may take, and its share of what is left where that is less.
STAGES = {
    "build": (300.0, 0.7),
    "tests": (150.0, 0.4),
    "calibrate": (45.0, 0.3),
    "compile": (75.0, 0.3),
    "kernels": (300.0, 0.65),
    "model": (150.0, 0.85),
    "plots": (30.0, 1.0),
}
START_LIMIT = 60.0  # seconds until the kernels' process begins with its first case
STARTS = 6  # of the kernels' process: a case that ends it is passed over


@dataclasses.dataclass
class Run:
    """The command's options, its clock, and what has been found so far."""

    options: argparse.Namespace
    folder: pathlib.Path
    end: float
    stages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    records: dict[tuple[str, str], dict[str, Any]] = dataclasses.field(
        default_factory=dict
    )  # by case and timing
    problems: dict[str, str] = dataclasses.field(default_factory=dict)  # case -> why there is no time
    conditions: dict[str, Any] = dataclasses.field(default_factory=dict)

    def limit(self, stage: str) -> float:
        most, share = STAGES[stage]
        if stage == self.options.stages[-1]:
            share = 1.0
        return max(0.0, min(most, share * (self.end - time.monotonic())))

    def worker(self, stage: str, out: pathlib.Path, *more: str) -> list[str]:
        command = [*module_command("gpu_worker"), stage, "--out", str(out)]
        return [*command, "--device", self.options.device, *more]

    def write(self) -> None:
        """Writes what there is; called after every case and every stage."""
        report = {
            "when": self.options.when,
            "revision": self.conditions.get("state", {}).get("revision", "unknown"),
            "threads": self.conditions.get("state", {}).get("threads"),
            "load_before": self.conditions.get("state", {}).get("load", []),
            "load_after": self.conditions.get("end", {}).get("load", []),
            "memory_kept": False,
            "quiet": all(record["quiet"] for record in self.records.values()),
            "machine": self.conditions.get("machine", {}),
            "state_before": self.conditions.get("state", {}),
            "state_after": self.conditions.get("end", {}),
            "stages": self.stages,
            "problems": self.problems,
            "cases": list(self.records.values()),
        }
        write_text(self.folder / "kernels.json", json.dumps(report, indent=1) + "\n")
        calibration, nets = (read_json(self.folder / f"{name}.json") for name in ("calibration", "model"))
        write_text(self.folder / "README.md", gpu_table.page(self.options.name, report, calibration, nets))


def write_text(path: pathlib.Path, text: str) -> None:
    """The old file is there until the new one is whole."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """An empty dictionary where there is no such file."""
    value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return value


def run_logged(
    command: Sequence[str], log: pathlib.Path, limit: float, watch: Callable[[], bool] = lambda: True
) -> str:
    """Runs a command from the root of the tree into a log. Returns '' or why it failed; ends it, and the processes it
    started, past `limit` seconds or when `watch`, asked twice a second, says no."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(search_path()))
    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
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


def search_path() -> list[str]:
    """So that a process in another folder finds the tree that this one runs from."""
    tree = [str(ROOT)] if PACKAGE == "benchmarks" else []
    return tree + [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def last_line(log: pathlib.Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def build(run: Run, limit: float) -> str:
    """Compiles for this GPU where the library does not load; without nvcc the Triton kernels can still run."""
    probe = "import frd_kernels as fk; ok, why = fk.backends()['cuda']; raise SystemExit(0 if ok else why)"
    log = run.folder / "logs" / "build.log"
    missing = run_logged([sys.executable, "-c", probe], log, limit)
    if not missing or run.options.device == "cpu":
        return ""
    import torch

    major, minor = torch.cuda.get_device_capability()
    script = f"TORCH_CUDA_ARCH_LIST={major}.{minor} PYTHON={sys.executable} tools/build_inplace.sh"
    return run_logged(["bash", "-c", script], log, limit)


def tests(run: Run, limit: float) -> str:
    """The suite of the kernels on the GPU's backends."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 2)))]
    log = run.folder / "logs" / "tests.log"
    problem = run_logged([*command, *(run.options.tests or TESTS)], log, limit)
    run.stages["tests"]["summary"] = last_line(log)
    return problem


def calibrate(run: Run, limit: float) -> str:
    command = run.worker("calibrate", run.folder / "calibration.json")
    return run_logged(command, run.folder / "logs" / "calibrate.log", limit)


def compile_all(run: Run, limit: float) -> str:
    """Fills the compilers' caches with a process for every other core, before one process alone measures."""
    parts = max(1, min(8, (os.cpu_count() or 1) // 2))
    log = run.folder / "logs" / "compile.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    commands = [
        run.worker("compile", log, "--part", str(part), "--of", str(parts), *selection(run.options))
        for part in range(parts)
    ]
    script = "export TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=2\n"
    script += "\n".join(f"{shlex.join(command)} &" for command in commands) + "\nwait"
    run.stages["compile"]["summary"] = run_logged(["bash", "-c", script], log, limit)
    return ""  # what it does not reach is compiled when it is measured


def selection(options: argparse.Namespace) -> list[str]:
    return ["--only", options.only, *(["--short"] if options.short else [])]


def kernels(run: Run, limit: float) -> str:
    """Starts the measuring process, and again behind a case that ended it or took too long."""
    end = time.monotonic() + limit
    lines = Lines(run.folder / "logs" / "kernels.jsonl")
    done = run.folder / "logs" / "done.json"
    problem = ""
    for _ in range(STARTS):
        done.write_text(json.dumps(lines.names))
        command = run.worker("kernels", lines.path, "--done", str(done), *selection(run.options))
        command += ["--calibration", str(run.folder / "calibration.json")]

        def watch() -> bool:
            if lines.read(run):
                run.write()
            return time.monotonic() - lines.moved < lines.limit

        lines.moved, lines.limit = time.monotonic(), START_LIMIT
        log = run.folder / "logs" / "kernels.log"
        problem = run_logged(command, log, max(1.0, end - time.monotonic()), watch)
        lines.read(run)
        if not problem or time.monotonic() > end:
            break
        if lines.running is None:
            return problem  # it does not even start
        run.problems[lines.running] = problem
        lines.running = None
        run.write()
    return problem


class Lines:
    """The measuring process's file of outcomes, read as it grows."""

    def __init__(self, path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.path, self.offset, self.moved = path, 0, time.monotonic()
        self.names: list[str] = []  # of cases that have been started
        self.running: str | None = None
        self.limit = START_LIMIT  # seconds without a line

    def read(self, run: Run) -> bool:
        """Takes in the lines that are new and whole; True if there were any."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            self._take(json.loads(line), run)
            self.moved = time.monotonic()
        return bool(whole)

    def _take(self, line: dict[str, Any], run: Run) -> None:
        if "start" in line:
            self.running, self.limit = line["start"], line["limit"]
            self.names.append(line["start"])
        elif "conditions" in line:
            run.conditions = line["conditions"] | {k: v for k, v in run.conditions.items() if k == "state"}
        elif "end" in line:
            run.conditions["end"] = line["end"]
        else:
            self.running = None
            for record in line.get(
                "records", []
            ):  # in place of one of the case without the compiler's search
                run.records[record["name"], record["timing"]] = record
            if case := line.get("red") or line.get("failed"):
                run.problems[case] = ("RED GATE: " if "red" in line else "") + line["reason"]


def model(run: Run, limit: float) -> str:
    if importlib.util.find_spec(f"{PACKAGE}.model") is None:
        return "left out: there is no benchmarks/model.py"
    command = run.worker("model", run.folder / "model.json", "--limit", f"{max(5.0, limit - 15):.0f}")
    return run_logged(command, run.folder / "logs" / "model.log", limit)


def plots(run: Run, limit: float) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return "left out: matplotlib is not installed"
    return run_logged(run.worker("plots", run.folder), run.folder / "logs" / "plots.log", limit)


RUNNERS: dict[str, Callable[[Run, float], str]] = {
    "build": build,
    "tests": tests,
    "calibrate": calibrate,
    "compile": compile_all,
    "kernels": kernels,
    "model": model,
    "plots": plots,
}


def run_stages(run: Run) -> int:
    """Returns the exit status: 1 where a stage failed or a case has no time."""
    for name in run.options.stages:
        limit, began = run.limit(name), time.monotonic()
        run.stages[name] = {"limit_s": round(limit, 1)}
        if limit < 1:
            problem = "cut: no time was left"
        else:
            problem = RUNNERS[name](run, limit)
        seconds = time.monotonic() - began
        run.stages[name] |= {"seconds": round(seconds, 1), "problem": problem}
        print(f"{name:10} {seconds:6.1f} s of {limit:5.1f}  {problem or 'done'}", flush=True)
        run.write()
    bad = [s for s in run.stages.values() if s["problem"] and not s["problem"].startswith("left out")]
    return 1 if bad or run.problems or any(record["red"] for record in run.records.values()) else 0


def stage_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(STAGES)}, got {', '.join(unknown)}")
    return names


def device_name(device: str) -> str:
    """The GPU's name; raises SystemExit where torch sees none."""
    if device == "cpu":
        return "rehearsal"
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch sees no GPU (--device cpu rehearses the stages on tiny data)")
    return torch.cuda.get_device_name()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--short", action="store_true", help="the essential cases, without compilers' searches"
    )
    parser.add_argument("--only", default="", help="the cases whose name holds this text")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=ROOT / "benchmarks" / "results",
        help="holds a folder for each GPU",
    )
    parser.add_argument("--stages", type=stage_names, default=list(STAGES), help=f"of {','.join(STAGES)}")
    parser.add_argument("--limit", type=float, default=530.0, help="seconds for all (default 530)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, on tiny data"
    )
    parser.add_argument("--name", help="of the folder (default: the GPU's)")
    parser.add_argument("--tests", type=shlex.split, help="arguments of pytest instead of the GPU's suite")
    options = parser.parse_args(argv)
    options.when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    options.name = options.name or device_name(options.device)
    options.out = options.out.resolve()
    folder = options.out / re.sub(r"[^a-z0-9]+", "-", options.name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "logs", ignore_errors=True)
    run = Run(options, folder, time.monotonic() + options.limit)
    status = run_stages(run)
    print(f"{len(run.records)} records, {len(run.problems)} cases without a time: {folder}")
    return status


if __name__ == "__main__":
    sys.exit(main())
