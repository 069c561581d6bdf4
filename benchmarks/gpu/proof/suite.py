"""The stage "tests": the kernels' tests on a GPU, every outcome on disk at once, a run more in suite.json.

    python -m benchmarks.gpu.proof.suite --out FOLDER/suite.json --logs FOLDER/logs --limit SECONDS [--triton-share K/N]

A CUDA error spoils the process that it happens in: that one ends (`suite_plugin`), and pytest-xdist replaces it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

from ...launch import HOME
from ..process import ROOT, last_line, run_logged
from ..run import read_json, write_text
from . import suite_plugin
from .suite_page import OUTCOMES, summary, totals

CASE_LIMIT = 120  # seconds of a case; Triton compiles for up to forty
GRACE = 15.0  # seconds that cases under way have when no other begins any more, or a tenth of the limit
WRITE_EVERY = 3.0  # seconds between two versions of suite.json
KEPT = 500  # characters of a failure in suite.json; `logs` has more
SPARE_CORES = 3


class Outcomes:
    """The workers' files of outcomes, read as they grow."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("*.jsonl"), *folder.glob(suite_plugin.COLLECTED)]:
            old.unlink()
        self.folder = folder
        self.offsets: dict[pathlib.Path, int] = {}
        self.cases: dict[str, tuple[str, str]] = {}  # backend and op of all that were collected
        self.found: dict[str, dict[str, Any]] = {}
        self.running: dict[str, None] = {}

    def read(self) -> bool:
        """Takes in the lines that are new and whole; True if there were any."""
        changed = not self.cases and self._collected()
        for path in sorted(self.folder.glob("*.jsonl")):
            offset = self.offsets.get(path, 0)
            with path.open("rb") as file:
                file.seek(offset)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self.offsets[path] = offset + len(whole)
            for line in whole.splitlines():
                self._take(json.loads(line))
            changed |= bool(whole)
        return changed

    def _collected(self) -> bool:
        """Of the first start; a later one has fewer to run."""
        found = read_json(self.folder / suite_plugin.COLLECTED)
        self.cases = {case: (backend, op) for case, (backend, op) in found.items()}
        return bool(found)

    def _take(self, line: dict[str, Any]) -> None:
        if "start" in line:
            self.running[line["start"]] = None
        elif "lost" in line:
            self.lose(line["lost"])
        else:
            self.running.pop(line["id"], None)
            self.found[line["id"]] = line

    def lose(self, *cases: str) -> None:
        """Their process ended. If one has said why, that stays, and takes the place of this if it is read later."""
        for case in cases:
            self.running.pop(case, None)
            backend, op = self.cases[case]
            message = f"its process ended: a crash, or more than {CASE_LIMIT} s"
            lost = {"id": case, "backend": backend, "op": op, "outcome": "failed", "seconds": 0.0}
            self.found.setdefault(case, lost | {"message": message})

    def left(self) -> int:
        return len(self.cases.keys() - self.found.keys())

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Backend -> op -> outcome -> cases."""
        counts: dict[str, dict[str, dict[str, int]]] = {}
        places = {case: (line["backend"], line["op"], line["outcome"]) for case, line in self.found.items()}
        waiting = {case: (*place, "not_reached") for case, place in self.cases.items()}
        for backend, op, outcome in sorted((waiting | places).values()):
            ops = counts.setdefault(backend, {})
            ops.setdefault(op, dict.fromkeys(OUTCOMES, 0))[outcome] += 1
        return counts

    def report(self) -> dict[str, Any]:
        lines = self.found.values()
        slowest = sorted(((line.get("seconds", 0.0), line["id"]) for line in lines), reverse=True)[:20]
        return {
            "counts": self.counts(),
            "failures": {line["id"]: line["message"][:KEPT] for line in lines if line["outcome"] == "failed"},
            "running": list(self.running),
            "slowest": [[round(seconds, 2), case] for seconds, case in slowest],
        }


def last_failures(runs: list[dict[str, Any]]) -> list[str]:
    """Of the last run in which a case ran."""
    for run in reversed(runs):
        if run.get("failures") or any(
            found.get("passed") for ops in run.get("counts", {}).values() for found in ops.values()
        ):
            return list(run.get("failures", {}))
    return []


def command(options: argparse.Namespace, plan: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """pytest as a process that finds what this one does, and the plugin in `folder`, by itself: once installed, its
    package imports torch, too early and for nothing."""
    shutil.copy(suite_plugin.__file__, folder)
    python = f"import runpy, sys; sys.path[0] = {str(HOME)!r}; sys.path.append({str(folder)!r}); "
    python += "runpy.run_module('pytest', run_name='__main__', alter_sys=True)"
    words = ["env", *(["CUDA_VISIBLE_DEVICES=", "TRITON_INTERPRET=1"] if options.device == "cpu" else [])]
    words += [sys.executable, "-c", python, "-p", "suite_plugin", "--suite-plan", str(plan)]
    # Not those of pyproject.toml, which ask for a plugin that the GPU's machine may lack.
    words += ["-o", "addopts=-p no:logging --import-mode=importlib", "-p", "no:cacheprovider"]
    words += ["-q", "--tb=short", "--continue-on-collection-errors"]
    if importlib.util.find_spec("pytest_timeout"):
        # A kernel that hangs lets no Python code run in its thread.
        words += [f"--timeout={CASE_LIMIT}", "--timeout-method=thread"]
    if options.workers and importlib.util.find_spec("xdist"):
        # Chunks that small keep the order of the plan over all workers.
        words += ["-n", str(options.workers), "--dist=load", "--maxschedchunk=2", "--max-worker-restart=1000"]
    return [*words, f"--ignore-glob={options.tests}/*_build.py", str(options.tests)]


class Record:
    """The run that suite.json holds last, written again as it grows."""

    def __init__(self, path: pathlib.Path, here: dict[str, Any], chosen: dict[str, Any]) -> None:
        report = read_json(path)
        runs = report.get("runs", [])
        self.path, self.first, self.run = path, last_failures(runs), here | chosen
        self.report = report | here | {"runs": [*runs, self.run]}
        self.written = 0.0

    def save(self, outcomes: Outcomes, seconds: float) -> None:
        self.run |= {"seconds": round(seconds, 1)} | outcomes.report()
        write_text(self.path, json.dumps(self.report, indent=1) + "\n")
        self.written = time.monotonic()


def run_suite(options: argparse.Namespace, began: float, record: Record) -> str:
    """Starts pytest, and again behind a case that ended it. Returns '' or why the last start ended."""
    deadline = began + options.limit - min(GRACE, 0.1 * options.limit)
    to_epoch = time.time() - time.monotonic()
    outcomes = Outcomes(options.logs / "suite")
    plan, log = options.logs / "suite-plan.json", options.logs / "suite.log"
    log.write_text("")

    def watch() -> bool:
        if outcomes.read() and time.monotonic() - record.written > WRITE_EVERY:
            record.save(outcomes, time.monotonic() - began)
        return True

    while True:
        done = list(outcomes.found)
        parts = {
            "deadline": deadline + to_epoch,
            "cuda": "cuda" if options.device == "cuda" else "cuda (emulated)",
            "share": options.triton_share,
            "only": options.only,
            "first": record.first,
            "done": done,
            "outcomes": str(outcomes.folder),
        }
        plan.write_text(json.dumps(parts))
        limit = max(1.0, began + options.limit - time.monotonic())
        problem = run_logged(command(options, plan, outcomes.folder), log, limit, watch)
        outcomes.read()
        over = time.monotonic() > deadline
        if not over:
            outcomes.lose(*outcomes.running)
        record.save(outcomes, time.monotonic() - began)
        if over or not outcomes.left() or len(outcomes.found) == len(done):
            return problem


def share(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"must be K/N with 1 <= K <= N, got {text!r}")
    return int(part), int(parts)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.proof.suite", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="suite.json; a run is added to it")
    parser.add_argument("--logs", type=pathlib.Path, help="folder (default: logs beside --out)")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for all (default 240)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: emulated, interpreted"
    )
    parser.add_argument("--triton-share", type=share, default=(1, 1), help="K/N: every N-th from the K-th")
    parser.add_argument("--only", default="", help="the cases whose node id holds this text")
    parser.add_argument(
        "--tests", type=pathlib.Path, default=ROOT / "tests" / "kernels", help="(default tests/kernels)"
    )
    workers = max(1, len(os.sched_getaffinity(0)) - SPARE_CORES)
    parser.add_argument(
        "--workers", type=int, default=workers, help=f"0: none of pytest-xdist (default {workers})"
    )
    options = parser.parse_args(argv)
    options.out, options.tests = options.out.resolve(), options.tests.resolve()
    options.logs = (options.logs or options.out.parent / "logs").resolve()
    return options


def where(device: str) -> dict[str, Any]:
    """Raises SystemExit where the tests would take the emulator for a GPU."""
    import torch  # for seconds that count

    from ...conditions import origin

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("suite: torch must see a GPU for --device cuda, got none")
    return origin(device)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a case failed or none ran."""
    began = time.monotonic()
    options = arguments(argv)
    here = where(options.device)
    chosen = {"triton_share": "/".join(map(str, options.triton_share)), "only": options.only}
    record = Record(options.out, here, chosen)
    problem = run_suite(options, began, record)
    if not any(found["passed"] or found["failed"] for found in totals(record.run["counts"]).values()):
        print(f"nothing ran: {problem or last_line(options.logs / 'suite.log')}"[:190])
        return 1
    print(summary(record.run))
    return int(bool(record.run["failures"]))


if __name__ == "__main__":
    sys.exit(main())
