"""Processes that end in time and leave a log."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

PACKAGE = __package__ or "benchmarks.gpu"
# The tree that holds tests and tools; once installed, the one that the command is called in.
IN_TREE = PACKAGE == "benchmarks.gpu"
ROOT = pathlib.Path(__file__).resolve().parents[2] if IN_TREE else pathlib.Path.cwd()


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
    tree = [str(ROOT)] if IN_TREE else []
    return tree + [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def last_line(log: pathlib.Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
