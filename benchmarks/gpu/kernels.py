"""The stage that measures the kernels: its process is started again behind a case that ends it or hangs."""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Iterable
from typing import Any

from .process import run_logged
from .run import Run

START_LIMIT = 60.0  # seconds until the process begins with its first case
STARTS = 6  # of the process: a case that ends it is passed over


def selection(options: argparse.Namespace) -> list[str]:
    return ["--only", options.only, *(["--short"] if options.short else [])]


def measure(run: Run, limit: float) -> str:
    """Starts the measuring process, and again behind a case that ended it or took too long.

    What was measured before goes, or with `--add` stays, and only cases without a time are measured.
    """
    end = time.monotonic() + limit
    if not run.options.add:
        run.records.clear()
    run.problems.clear()
    run.conditions = {"when": run.options.when}
    lines = Lines(run.folder / "logs" / "kernels.jsonl", [name for name, _timing in run.records])
    done = run.folder / "logs" / "done.json"
    problem = ""
    for _ in range(STARTS):
        done.write_text(json.dumps(lines.names))
        command = run.worker(
            "worker", "kernels", "--out", lines.path, "--done", done, *selection(run.options)
        )
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

    def __init__(self, path: pathlib.Path, done: Iterable[str] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.path, self.offset, self.moved = path, 0, time.monotonic()
        self.names = list(dict.fromkeys(done))  # of cases that have been started, or need not be
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
            run.conditions = line["conditions"] | run.conditions  # the state is that before the first start
        elif "end" in line:
            run.conditions["end"] = line["end"]
        else:
            self.running = None
            revision = run.conditions.get("state", {}).get("revision", "unknown")
            for record in line.get("records", []):  # may replace one without the compiler's search
                run.records[record["name"], record["timing"]] = record | {"revision": revision}
            if case := line.get("red") or line.get("failed"):
                run.problems[case] = ("RED GATE: " if "red" in line else "") + line["reason"]
