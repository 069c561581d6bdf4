"""The CPU benchmark: `python -m benchmarks.cpu [--short] [--only TEXT] [--list] [--out FILE.json]`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from . import calibrate, conditions, registry
from .harness import Case, GateError, Rates, keep_memory, run_case


def cases(only: str = "", short: bool = False) -> list[Case]:
    """The registered cases whose name holds `only`; with `short` those of the demo, without compilers."""
    found = registry.cases("cpu", only, short)
    return [dataclasses.replace(case, compiled=()) for case in found] if short else found


def _target(target: float | None) -> str:
    return f"{target:.1f}x" if target else "-"


def _row(record: dict[str, Any], width: int) -> str:
    ours, rival = record["ours_ms"]["median"], record["rival_ms"]["median"]
    busy = "" if record["quiet"] else f"  busy machine, load {record['load']:.1f}"
    return (
        f"{record['name']:{width}} {ours:9.3f} {rival:9.3f} {record['ratio']:7.2f}x "
        f"{100 * record['aa_spread']:5.1f}% {_target(record['target']):>7}{busy}"
    )


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(
    only: str = "", short: bool = False, repeats: int = 40, threads: int = 2, rates: Rates | None = None
) -> tuple[list[dict[str, Any]], int]:
    """Runs and prints the cases; returns the records and how many gates were red. `rates`: of a calibration, for the
    floors."""
    chosen = cases(only, short)
    width = max(len(case.name) for case in chosen) if chosen else 0
    print(
        f"{'case':{width}} {'ours ms':>9} {'eager ms':>9} {'ratio':>8} {'A/A':>6} {'target':>7}", flush=True
    )
    records, red = [], 0
    with cpu_threads(threads):
        for case in chosen:
            try:
                records.append(run_case(case, repeats, rates))
            except GateError as error:
                red += 1
                print(f"RED GATE, no time shown: {error}", flush=True)
                continue
            print(_row(records[-1], width), flush=True)
    return records, red


def write_report(
    path: pathlib.Path,
    records: list[dict[str, Any]],
    threads: int,
    load_before: tuple[float, ...],
    memory_kept: bool,
    calibration: dict[str, Any] | None = None,
) -> None:
    with cpu_threads(threads):
        report = conditions.report(records, threads, load_before, memory_kept, calibration)
    conditions.write(path, report)


def _calibrate(threads: int) -> dict[str, Any]:
    with cpu_threads(threads):
        found = calibrate.calibrate("cpu")
    copy, product = found["copy"]["bytes_per_s"], found["matrix"]["float32"]["flops_per_s"]
    print(
        f"copy {copy / 1e9:.0f} GB/s, float32 matrix product {product / 1e9:.0f} GFLOP/s, {threads} threads"
    )
    return found


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a correctness gate was red."""
    parser = argparse.ArgumentParser(prog="frd bench", description="our CPU kernels against eager PyTorch")
    parser.add_argument("--short", action="store_true", help="the few cases that the demo shows")
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    parser.add_argument("--list", action="store_true", help="print the names and targets of the cases")
    parser.add_argument("--repeats", type=_positive, default=40, help="timed calls of each side (default 40)")
    parser.add_argument("--threads", type=_positive, default=2, help="CPU threads (default 2)")
    parser.add_argument("--out", type=pathlib.Path, help="write the records as JSON")
    options = parser.parse_args(argv)
    chosen = cases(options.only, options.short)
    if not chosen:
        parser.error(f"no case holds {options.only!r} in its name; --list shows them")
    if options.list:
        for case in chosen:
            print(f"{case.name}  target {_target(case.target)}")
        return 0
    load, kept = os.getloadavg(), keep_memory()
    calibration = _calibrate(options.threads) if options.out and not options.short else None
    rates = calibrate.rates(calibration) if calibration else None
    records, red = run(options.only, options.short, options.repeats, options.threads, rates)
    if options.out:
        write_report(options.out, records, options.threads, load, kept, calibration)
    if not all(record["quiet"] for record in records):
        print("Something else ran on this machine (load average): repeat the cases marked busy.")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
