"""The stages of `python -m benchmarks.gpu` that need the GPU, each in a process of its own: a kernel that hangs or
spoils the GPU's state then ends no more than its case.

    python -m benchmarks.gpu.worker calibrate|compile|kernels|model|plots --out PATH ...
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import os
import pathlib
import sys
import time
from typing import Any

import torch

from frd_kernels.info import collect

from .. import calibrate, conditions, registry
from ..cases import Case
from ..clock import machine_state
from ..cuda import full_float32
from ..gate import GateError, errors_of, one_line
from ..measure import measure

REPEATS = 30
SEARCH, SEARCHED = "max-autotune", ", with the compiler's search"
LIMITS = {False: 90.0, True: 180.0}  # seconds of a case, without and with the search
# Of a net for the CPU, which takes minutes for a whole one in 16 bit.
SMALL_NET = {"stages": (1, 2), "trace_widths": (8, 8), "pyramid_width": 8}
SPOILED = 3  # exit status: the GPU's state is lost to this process


def chosen_cases(device: str, only: str, short: bool) -> dict[str, Case]:
    """The GPU's cases, by what to call them in the log: the essential ones first, all without the compiler's search,
    which takes long. Then, not in the short run, those that have it once more with it.

    On the CPU, to rehearse, on data of a few kilobytes and without compilers.
    """
    cases = sorted(registry.cases("cuda", only, short), key=lambda case: not case.short)
    if device == "cpu":
        return {case.name: case for case in map(rehearsed, cases)}
    chosen = {case.name: without_search(case) for case in cases}
    if not short:
        chosen |= {f"{case.name}{SEARCHED}": case for case in cases if SEARCH in case.compiled}
    return chosen


def without_search(case: Case) -> Case:
    return dataclasses.replace(case, compiled=tuple(mode for mode in case.compiled if mode != SEARCH))


def rehearsed(case: Case) -> Case:
    channels = 128 if case.op.startswith("icm") else 16
    shape = (8, 8, 3, 3) if case.op.startswith("pdc_weight") else (1, channels, 16, 16)
    return dataclasses.replace(case, shape=shape, device="cpu", compiled=())


class Log:
    """One JSON object a line, each written out at once."""

    def __init__(self, path: pathlib.Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def write(self, **value: Any) -> None:
        print(json.dumps(value, allow_nan=False), file=self.file, flush=True)
        os.fsync(self.file.fileno())


def run_kernels(options: argparse.Namespace) -> int:
    """Measures the cases whose names `--done` does not hold, in order; a line for each start and each outcome."""
    log = Log(options.out)
    done = set(json.loads(options.done.read_text())) if options.done else set()
    rates = None
    if options.calibration and options.calibration.exists():
        rates = calibrate.rates(json.loads(options.calibration.read_text()))
    log.write(conditions={"machine": collect(), "state": machine_state(options.device)})
    gc.freeze()  # what importing torch left behind need not be looked at before each comparison
    for name, case in chosen_cases(options.device, options.only, options.short).items():
        if name in done:
            continue
        log.write(start=name, limit=LIMITS[name.endswith(SEARCHED)])
        began = time.monotonic()
        try:
            log.write(records=measure(case, REPEATS, rates))
        except GateError as error:
            log.write(red=name, reason=str(error))
        except Exception as error:  # the next case can still be measured, if the GPU is all right
            log.write(failed=name, reason=one_line(error))
        print(f"{time.monotonic() - began:6.1f} s  {name}", flush=True)
        if not usable(options.device):
            return SPOILED
    log.write(end=machine_state(options.device))
    return 0


def run_compile(options: argparse.Namespace) -> int:
    """Every `--of`-th case from the `--part`-th: fills the compilers' caches on disk, and nothing else."""
    cases = [
        c
        for c in chosen_cases(options.device, options.only, options.short).values()
        if SEARCH not in c.compiled
    ]
    for case in cases[options.part :: options.of]:
        try:
            _errors, wrong = errors_of(case, case.build(case))
            print(f"{case.name}: {wrong or 'green'}", flush=True)
        except Exception as error:  # it is measured, and told of, later
            print(f"{case.name}: {one_line(error)}", flush=True)
        if not usable(options.device):
            return SPOILED
    return 0


def usable(device: str) -> bool:
    """Lets go of a case's memory; False where the GPU's state is lost to this process."""
    if device == "cpu":
        return True
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(one_line(error), file=sys.stderr)
        return False
    return True


def run_calibrate(options: argparse.Namespace) -> int:
    scale = 1.0 if options.device == "cuda" else 1 / 64
    conditions.write(options.out, calibrate.calibrate(options.device, scale))
    return 0


def run_model(options: argparse.Namespace) -> int:
    """`benchmarks.model.gpu_records`, which keeps to its limit itself."""
    model = importlib.import_module("..model", __package__)
    before = machine_state(options.device)

    def save(found: dict[str, Any]) -> None:
        conditions.write(options.out, found | {"before": before, "after": machine_state(options.device)})

    rehearsed = options.device == "cpu"
    chosen = {"size": 64, "variants": ("lite",), **SMALL_NET} if rehearsed else {"size": 512}
    save(model.gpu_records(options.limit, device=options.device, save=save, **chosen))
    return 0


def run_plots(options: argparse.Namespace) -> int:
    importlib.import_module("..plots", __package__).write_all(options.out)
    return 0


STAGES = {
    "calibrate": run_calibrate,
    "compile": run_compile,
    "kernels": run_kernels,
    "model": run_model,
    "plots": run_plots,
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", description=__doc__)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--out", type=pathlib.Path, help="file, or for plots the folder, to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--done", type=pathlib.Path, help="kernels: JSON list of names to pass over")
    parser.add_argument("--calibration", type=pathlib.Path, help="kernels: file of the stage calibrate")
    parser.add_argument("--part", type=int, default=0, help="compile: which of the processes this is")
    parser.add_argument("--of", type=int, default=1, help="compile: number of processes")
    parser.add_argument("--limit", type=float, default=60.0, help="model: seconds")
    options = parser.parse_args(argv)
    with full_float32():
        return STAGES[options.stage](options)


if __name__ == "__main__":
    sys.exit(main())
