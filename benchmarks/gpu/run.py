"""One run of the command: its options, its clock, what has been found so far, and the files it leaves."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import tarfile
import time
from collections.abc import Sequence
from typing import Any

from ..launch import module_command
from . import page


@dataclasses.dataclass
class Run:
    """Begins with what earlier runs left in its folder, so that several short commands make one report."""

    options: argparse.Namespace
    folder: pathlib.Path
    end: float  # of the whole command, on the monotonic clock
    stages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    records: dict[tuple[str, str], dict[str, Any]] = dataclasses.field(
        default_factory=dict
    )  # by case and timing
    problems: dict[str, str] = dataclasses.field(default_factory=dict)  # case -> why there is no time
    conditions: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        report = read_json(self.folder / "kernels.json")
        self.stages = report.get("stages", {})
        self.records = {(record["name"], record["timing"]): record for record in report.get("cases", [])}
        self.problems = report.get("problems", {})
        names = {"when": "when", "machine": "machine", "state_before": "state", "state_after": "end"}
        self.conditions = {ours: report[theirs] for theirs, ours in names.items() if theirs in report}

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def worker(self, module: str, *more: object) -> list[str]:
        """A module of this package as a process, on the device of this run."""
        return [*module_command(f"gpu.{module}"), *map(str, more), "--device", self.options.device]

    def write(self) -> None:
        """Writes what there is; called after every case and every stage."""
        state, end = (self.conditions.get(key, {}) for key in ("state", "end"))
        report = {
            "when": self.conditions.get("when", self.options.when),
            "revision": state.get("revision", "unknown"),
            "threads": state.get("threads"),
            "load_before": state.get("load", []),
            "load_after": end.get("load", []),
            "memory_kept": False,
            "quiet": all(record["quiet"] for record in self.records.values()),
            "machine": self.conditions.get("machine", {}),
            "state_before": state,
            "state_after": end,
            "stages": self.stages,
            "problems": self.problems,
            "cases": list(self.records.values()),
        }
        write_text(self.folder / "kernels.json", json.dumps(report, indent=1) + "\n")
        write_text(self.folder / "README.md", page.page(self.options.name, report, self.found(page.PARTS)))

    def found(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What the other stages wrote: name -> file."""
        return {name: read_json(self.folder / f"{name}.json") for name in names}

    def pack(self) -> None:
        """The whole folder, logs included, as one file."""
        if self.options.archive:
            draft = self.options.archive.with_name(self.options.archive.name + ".part")
            with tarfile.open(draft, "w:gz") as archive:
                archive.add(self.folder, self.folder.name)
            draft.replace(self.options.archive)


def write_text(path: pathlib.Path, text: str) -> None:
    """The old file is there until the new one is whole."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """An empty dictionary where there is no such file."""
    value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return value
