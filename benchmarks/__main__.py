"""`python -m benchmarks COMMAND`, or `frd bench COMMAND` in a checkout. Without a command: `run`."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from .machine import (
    append_line,
    cpu_threads,
    frame,
    keep_memory,
    load_limit,
    machine_state,
    missing_gpu,
    positive,
    read_json,
    read_lines,
    write_json,
)

# Each command's module offers add_arguments(parser) and run(options) -> exit status. Only the chosen one is imported:
# `gpu` has to start before the library is built.
COMMANDS = {
    "run": (__name__, "check and time the registered cases against their baselines"),
    "list": (__name__, "print the names of the cases"),
    "compare": ("benchmarks.compare", "two result files, or this tree against another git revision"),
    "gate": ("benchmarks.regression", "compare instruction counts of the CPU kernels with the recorded ones"),
    "model": ("benchmarks.model", "FRD-Net as a whole: latency, memory, training step, parameters and MACs"),
    "localization": (
        "benchmarks.localization.compare",
        "classical methods, controls and nets on the same forgeries",
    ),
    "gpu": ("benchmarks.gpu", "build, test, check and measure on a GPU, offline, within a time limit"),
    "report": ("benchmarks.report", "write result pages, tables of the documents and plots"),
}
SEARCH, SEARCHED = "max-autotune", ", with the compiler's search"
# Exit status: the GPU's state is lost to this process.
SPOILED = 3


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """The cases by label. On a GPU, where a run may be cut, the essential ones come first and all without the
    compiler's search, which takes long; without `--quick` those that have it follow once more with it."""
    from .registry import cases

    found = cases(options.device, options.only, options.quick)
    if options.device == "cpu":
        return {
            case.name: dataclasses.replace(case, compiled=()) if options.quick else case for case in found
        }
    found.sort(key=lambda case: not case.quick)
    labelled = {}
    for case in found:
        forms = tuple(form for form in case.compiled if form != SEARCH)
        labelled[case.name] = dataclasses.replace(case, compiled=forms)
    if not options.quick:
        labelled |= {case.name + SEARCHED: case for case in found if SEARCH in case.compiled}
    return labelled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="the cases whose name contains this text")
    parser.add_argument("--quick", "--short", action="store_true", help="the essential cases, no compilers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--repeats", type=positive, default=40, help="timed calls of each implementation (default 40)"
    )
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (default 2)")
    parser.add_argument("--out", type=pathlib.Path, help="write a result file")
    parser.add_argument(
        "--lines",
        type=pathlib.Path,
        help="append an outcome after each case to this file of JSON lines, and pass over the cases it has",
    )
    parser.add_argument("--calibration", type=pathlib.Path, help="a file of `calibrate`, for lower bounds")
    parser.add_argument(
        "--check",
        type=part,
        metavar="K/N",
        help="only the correctness gate, of every N-th case from the K-th: fills the compilers' caches",
    )
    parser.add_argument(
        "--profile", action="store_true", help="only call our kernels, within CUDA's profiler range"
    )


def part(text: str) -> tuple[int, int]:
    first, _, step = text.partition("/")
    if not (first.isdigit() and step.isdigit() and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"must be such as 0/4, got {text!r}")
    return int(first), int(step)


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 where a correctness gate was red or a case could not be timed, 2 for wrong usage."""
    labelled = chosen(options)
    if not labelled:
        print(
            f"benchmarks: no case contains {options.only!r} in its name; `list` shows them", file=sys.stderr
        )
        return 2
    if options.command == "list":
        print("\n".join(labelled))
        return 0
    if options.device == "cuda" and missing_gpu():
        return 2
    import torch

    from .timing import full_float32, profile

    threads = options.threads if options.device == "cpu" else torch.get_num_threads()
    with cpu_threads(threads), full_float32():
        if options.check:
            first, step = options.check
            return check_cases(dict(list(labelled.items())[first::step]))
        if options.profile:
            for case in labelled.values():
                profile(case)
            return 0
        return run_cases(labelled, options)


def check_cases(labelled: dict[str, Any]) -> int:
    """The gate alone. A case with the compiler's search is left to the measurement."""
    from .gate import gate, one_line

    failed = 0
    for label, case in labelled.items():
        if label.endswith(SEARCHED):
            continue
        try:
            gate(case, case.build(case))
            print(f"green: {label}", flush=True)
        except Exception as error:
            failed += 1
            print(f"RED: {label}: {one_line(error)}", flush=True)
        if case.device == "cuda" and not usable():
            return SPOILED
    return int(failed > 0)


def run_cases(labelled: dict[str, Any], options: argparse.Namespace) -> int:
    from .timing import calibrate

    kept = keep_memory() if options.device == "cpu" else False
    head = frame(options.device) | {"memory_kept": kept}
    if options.calibration:
        head["calibration"] = read_json(options.calibration)
    elif options.out and not options.quick:
        head["calibration"] = calibrate(options.device)
    note(options.lines, head=head)
    records, problems, status = measure_cases(labelled, options, head.get("calibration") or None)
    if status != SPOILED:
        head["state_after"] = machine_state(options.device)
        note(options.lines, head={"state_after": head["state_after"]})
    quiet = all(record["quiet"] for record in records)
    if options.out:
        write_json(options.out, head | {"quiet": quiet, "problems": problems, "cases": records})
    if not quiet:
        limit = load_limit()
        print(f"Something else was running (load average above {limit:.1f}): repeat the cases marked busy.")
    return status or int(bool(problems))


def note(lines: pathlib.Path | None, **value: Any) -> None:
    if lines:
        append_line(lines, **value)


def measure_cases(
    labelled: dict[str, Any], options: argparse.Namespace, calibration: dict[str, Any] | None
) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    """Measures and prints; the records, why cases have none, and SPOILED or 0."""
    from .gate import GateError, one_line
    from .timing import measure

    width = max(map(len, labelled))
    done = {line["start"] for line in read_lines(options.lines) if "start" in line}
    records: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    print(f"{'case':{width}} {'timing':14} {'ours ms':>9} {'base ms':>9} {'ratio':>8} {'A/A':>6}", flush=True)
    # What importing torch left behind need not be looked at before each comparison.
    gc.freeze()
    for label, case in labelled.items():
        if label in done:
            continue
        note(options.lines, start=label)
        try:
            found = measure(case, options.repeats, calibration)
            outcome: dict[str, Any] = {"records": found}
            records += found
            for record in found:
                print(row(record, width), flush=True)
        # The next case can still be measured, unless the GPU's state is lost.
        except Exception as error:
            red = isinstance(error, GateError)
            problems[label] = f"RED GATE: {error}" if red else one_line(error)
            outcome = {"problem": problems[label]}
            print(f"no time shown for {label}: {problems[label]}", flush=True)
        note(options.lines, end=label, **outcome)
        if options.device == "cuda" and not usable():
            return records, problems, SPOILED
    return records, problems, 0


def usable() -> bool:
    """Frees a case's memory; False where the GPU's state is lost to this process."""
    import torch

    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return False
    return True


def row(record: dict[str, Any], width: int) -> str:
    ours, baseline = record["ours_ms"]["median"], record["baseline_ms"]["median"]
    busy = "" if record["quiet"] else f"  busy machine, load {record['load']:.1f}"
    return (
        f"{record['name']:{width}} {record['timing']:14} {ours:9.3f} {baseline:9.3f} {record['ratio']:7.2f}x "
        f"{100 * record['aa_spread']:5.1f}%{busy}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments.insert(0, "run")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module: Any = None
    for name, (path, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == arguments[0]:
            module = sys.modules[__name__] if path == __name__ else importlib.import_module(path)
            module.add_arguments(sub)
    # Of `--help` this does not return.
    options = parser.parse_args(arguments)
    status: int = module.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
