"""The file that `checks` leaves: what it has found so far, whatever ends it."""

from __future__ import annotations

import argparse
import os
import threading
import time
from typing import Any

from ... import conditions
from ..run import read_json

OK = "ok"
HANGS_S = 20.0  # a call of compiled kernels that takes longer does not come back
Key = tuple[str, str, str]  # backend, dtype, name


class Report:
    """Ends the process when its time is up: neither a compiler nor a kernel that hangs can be interrupted."""

    def __init__(self, options: argparse.Namespace, wanted: list[Key], left_out: dict[str, str]) -> None:
        self.path, self.wanted, self.end = options.out, wanted, time.monotonic() + options.limit
        before = read_json(options.out) if options.go_on else {}
        self.value: dict[str, Any] = conditions.origin(options.device) | {
            "limit_s": options.limit,
            "left_out": left_out,
            "running": None,
            "calls": before.get("calls", []),
        }
        self.done = {(call["backend"], call["dtype"], call["name"]) for call in self.value["calls"]}
        self.began, self.lock = time.monotonic(), threading.Lock()
        self.write()
        self.watchdog = threading.Timer(options.limit, self.cut)
        self.watchdog.daemon = True
        self.watchdog.start()

    def start(self, key: Key) -> None:
        self.value["running"], self.began = list(key), time.monotonic()
        self.write()

    def running(self) -> dict[str, Any]:
        """The record of the call that has been started, as yet without an outcome."""
        return dict(zip(("backend", "dtype", "name"), self.value["running"], strict=True))

    def take(self, record: dict[str, Any]) -> None:
        """The outcome of that call."""
        record["seconds"] = round(time.monotonic() - self.began, 3)
        self.value["calls"].append(record)
        self.done.add(tuple(self.value["running"]))
        for check, outcome in record["checks"].items():
            if outcome != OK:
                print(*self.value["running"], f"{check}: {outcome}", sep=", ", flush=True)
        self.value["running"] = None
        self.write()

    def write(self) -> None:
        missing = [" ".join(key) for key in self.wanted if key not in self.done]
        with self.lock:
            conditions.write(self.path, self.value | {"not_reached": missing})

    def cut(self) -> None:
        status = 1
        try:
            key, seconds = self.value["running"], time.monotonic() - self.began
            if key is not None and key[0] == "cuda" and seconds > HANGS_S:
                self.take(self.running() | {"op": "", "checks": {"call": f"no answer in {seconds:.0f} s"}})
            status = self.finish()
        finally:
            os._exit(status)

    def finish(self) -> int:
        """Prints the summary; returns the exit status."""
        self.watchdog.cancel()
        self.write()
        calls, missing = self.value["calls"], len(self.wanted) - len(self.done)
        wrong = [call for call in calls if any(outcome != OK for outcome in call["checks"].values())]
        counts: dict[str, int] = {}
        for call in calls:
            counts[call["backend"]] = counts.get(call["backend"], 0) + 1
        text = ", ".join(f"{count} calls on {backend}" for backend, count in counts.items()) or "no call"
        first = f" ({wrong[0]['backend']} {wrong[0]['name'][:60]})" if wrong else ""
        print(f"checks: {text}: {len(wrong)} wrong{first}, {missing} not reached", flush=True)
        return int(bool(wrong) or not calls)
