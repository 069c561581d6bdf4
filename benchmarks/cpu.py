"""The CPU benchmark: `python -m benchmarks.cpu [--short] [--only TEXT] [--out FILE.json]`."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import pathlib
import sys
from typing import Any

import torch

from frd_kernels.info import collect

from .harness import Case, GateError, run_case

FAMILIES = ("pdc", "pdc_block", "icm")


def cases(only: str = "", short: bool = False) -> list[Case]:
    """The registered cases whose name holds `only`; with `short` those of the demo."""
    found = []
    for family in FAMILIES:
        found += importlib.import_module(f".{family}", __package__).CASES
    return [case for case in found if only in case.name and (case.short or not short)]


def _row(record: dict[str, Any]) -> str:
    target = f"{record['target']:.1f}x" if record["target"] else "-"
    ours = record["milliseconds"]["ours"]["median"]
    rival = record["milliseconds"][record["rival"]]["median"]
    return f"{record['name']:66} {ours:9.3f} {rival:9.3f} {record['ratio']:7.2f}x {target:>7}"


def run(only: str = "", short: bool = False, repeats: int = 40, threads: int = 2) -> tuple[list[Any], int]:
    """Runs and prints the cases; returns the records and how many gates were red."""
    torch.set_num_threads(threads)
    records, red = [], 0
    print(f"{'case':66} {'ours ms':>9} {'eager ms':>9} {'ratio':>8} {'target':>7}", flush=True)
    for case in cases(only, short):
        try:
            records.append(run_case(case, repeats))
        except GateError as error:
            red += 1
            print(f"RED GATE, no time shown: {error}", flush=True)
            continue
        print(_row(records[-1]), flush=True)
    return records, red


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a correctness gate was red."""
    parser = argparse.ArgumentParser(prog="frd bench", description="our CPU kernels against eager PyTorch")
    parser.add_argument("--short", action="store_true", help="the few cases that the demo shows")
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    parser.add_argument("--repeats", type=int, default=40, help="timed calls of each side (default 40)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--out", type=pathlib.Path, help="write the records as JSON")
    options = parser.parse_args(argv)
    load = os.getloadavg()
    records, red = run(options.only, options.short, options.repeats, options.threads)
    if options.out:
        report = {
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "threads": options.threads,
            "load_before": load,
            "load_after": os.getloadavg(),
            "machine": collect(),
            "cases": records,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
