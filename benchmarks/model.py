"""FRD-Net as a whole, with our layers against eager PyTorch: `python -m benchmarks.model --help`.

Both nets have the same weights; every side runs in the memory layout that is faster for it, chosen by a pilot run.
Latency by turns (A B B A), images a second, peak memory, a training step, the share of time of each component. On a
CPU whatever no longer fits into `--limit` is listed under `left_out`, the large batches first.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from frd_kernels.info import collect

from . import components, model_memory
from .clock import machine_state
from .cuda import full_float32
from .gate import GateError, one_line
from .harness import keep_memory
from .measure import load_limit
from .model_sides import VARIANTS, Subject
from .model_timing import (
    Setting,
    Side,
    build_sides,
    case_of,
    check_inference,
    check_training,
    compare_sides,
    peak_bytes_on_gpu,
    timings_of,
)
from .revision import revision
from .timing import CannotTime

CPU_LIMIT_S = 300.0
# Of one record, in forward passes: gate, pilot, five turns of each pair and their warm-up.
CALLS_OF_A_RECORD = 60
CALLS_OF_A_BATCH = 32  # likewise, against one rival and in known layouts
CALLS_OF_A_STEP = 180
COMPILE_S = 45


class Run:
    """The records of one run, its time limit, and what was left out for it."""

    def __init__(self, limit_s: float, save: Callable[[Run], None] | None = None) -> None:
        self.end = time.monotonic() + limit_s
        self.limit_s, self.save = limit_s, save
        self.records: list[dict[str, Any]] = []
        self.components: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self.red: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def left(self) -> float:
        return self.end - time.monotonic()

    def attempt(self, name: str, expected_s: float, job: Callable[[], None]) -> bool:
        """Runs a job if its expected time is left; whatever it raises is noted, so that the next ones still run."""
        if self.left() < expected_s:
            self.left_out[name] = f"needs about {expected_s:.0f} s, {max(0.0, self.left()):.0f} s were left"
            return False
        began = time.monotonic()
        try:
            job()
        except GateError as error:
            self.red[name] = str(error)
            print(f"RED GATE, no time shown: {name}: {error}", flush=True)
            return False
        except Exception as error:  # a compiler, a backend, the machine's memory
            self.left_out[name] = one_line(error)
            print(f"left out: {name}: {self.left_out[name]}", flush=True)
            return False
        finally:
            self.seconds[name] = time.monotonic() - began
            if self.save is not None:
                self.save(self)
        return True


def measure_net(
    subject: Subject, setting: Setting, layouts: dict[str, str]
) -> tuple[list[dict[str, Any]], dict[str, Side]]:
    """Gate, then the records of one setting, one for each timing, and the sides that were measured.

    Raises:
        GateError: one of our backends is wrong.
    """
    before = os.getloadavg()[0]
    ours, rivals, pilots, left_out = build_sides(subject, setting, layouts)
    gate = check_inference if setting.mode == "forward" else check_training
    errors, wrong = gate(subject, setting, ours, rivals)
    left_out |= wrong
    case, records = case_of(subject, setting), []
    for kind in timings_of(subject, setting):
        try:
            compared = compare_sides(kind, case, ours, rivals, setting)
        except CannotTime as reason:
            left_out[kind.name] = str(reason)
            continue
        load = max(before, os.getloadavg()[0])
        shape = "x".join(map(str, case.shape))
        name = f"{case.op} {setting.execution} [{shape}] {case.dtype_name} {setting.mode}"
        record = {
            "name": name,
            "op": case.op,
            "variant": subject.variant,
            "batch": setting.batch,
            "size": subject.size,
            "shape": list(case.shape),
            "dtype": case.dtype_name,
            "mode": setting.mode,
            "execution": setting.execution,
            "device": subject.device,
            "target": None,
            **compared,
            "layouts": {name: side.layout for name, side in (ours | rivals).items()},
            "pilot_ms": pilots,
            "relative_errors": errors,
            "load": load,
            "quiet": load <= load_limit(),
        }
        record["layout"] = record["layouts"][record["backend"]]
        record["images_per_s"] = {
            side: 1e3 * setting.batch / record[key]["median"]
            for side, key in (("ours", "ours_ms"), ("rival", "rival_ms"))
        }
        record["left_out"] |= left_out
        records.append(record)
    if not records:
        raise CannotTime(f"{case.op}: {left_out}")
    return records, ours | rivals


def show(record: dict[str, Any]) -> None:
    ours, rival = record["ours_ms"], record["rival_ms"]
    busy = "" if record["quiet"] else f"  busy machine, load {record['load']:.1f}"
    print(
        f"{record['name']:62} {record['timing']:6} {ours['median']:9.2f} {rival['median']:9.2f} ms "
        f"{record['ratio']:6.2f}x  A/A {100 * record['aa_spread']:4.1f}%  "
        f"{record['images_per_s']['ours']:8.2f} images/s{busy}",
        flush=True,
    )


def measure_into(run: Run, subject: Subject, setting: Setting, layouts: dict[str, str]) -> None:
    """Adds the records of a setting, on a GPU with peak memory."""
    records, sides = measure_net(subject, setting, layouts)
    for record in records:
        if subject.device == "cuda":
            chosen = {"ours": record["backend"], "rival": record["rival"]}
            record["peak_bytes"] = {key: peak_bytes_on_gpu(sides[name]) for key, name in chosen.items()}
        show(record)
    run.records += records


def add_memory(run: Run, subject: Subject) -> None:
    """Peak memory on the CPU, by a fresh process, for the forward records of a subject that have none yet."""
    records = [
        record
        for record in run.records
        if record["variant"] == subject.variant
        and (record["mode"], record["execution"]) == ("forward", "eager")
        and "peak_bytes" not in record
    ]
    if not records:
        return
    first = records[0]
    layouts = {"ours": first["layout"], "rival": first["layouts"][first["rival"]]}
    batches = sorted({record["batch"] for record in records})
    found = model_memory.measure(subject.variant, subject.size, batches, layouts, max(1.0, run.left()))
    for record in records:
        record["peak_bytes"] = found[str(record["batch"])]


def add_components(run: Run, subject: Subject, dtype: torch.dtype) -> None:
    shares = components.measure(subject, dtype)
    run.components.append(
        {"variant": subject.variant, "size": subject.size, "device": subject.device, **shares}
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run on the CPU measures."""

    variants: tuple[str, ...] = ("lite", "paper", "released")
    batches: tuple[int, ...] = (1, 8, 16)
    size: int = 512
    modes: tuple[str, ...] = ("eager", "compiled")
    compiled: tuple[str, ...] = ("lite",)  # compiling a large net takes minutes on a CPU
    budget_s: float = 4.0
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the configuration


def run_on_cpu(plan: Plan, run: Run) -> None:
    """One image of every variant first, then memory and components, then training steps, compiled nets and larger
    batches, what takes least first, as long as time is left."""
    subjects = {variant: Subject(variant, plan.size, **plan.overrides) for variant in plan.variants}
    layouts: dict[str, dict[str, str]] = {variant: {} for variant in plan.variants}
    first = plan.batches[0]

    def net(variant: str, setting: Setting, expected_s: float) -> None:
        name = f"{variant}, batch {setting.batch}, {setting.mode}, {setting.execution}"
        chosen = layouts[variant] if setting.mode == "forward" else {}
        run.attempt(
            name, expected_s, functools.partial(measure_into, run, subjects[variant], setting, chosen)
        )

    def memory(variant: str, images: int) -> None:
        job = functools.partial(add_memory, run, subjects[variant])
        run.attempt(f"{variant}, peak memory", 15 + 4 * known[variant] * images, job)

    for variant in plan.variants:
        net(variant, Setting(first, budget_s=plan.budget_s), 0.0)
    known = {
        record["variant"]: 1e-3 * max(record["ours_ms"]["median"], record["rival_ms"]["median"]) / first
        for record in run.records
    }
    for variant in known:
        memory(variant, first)
    for variant, seconds in known.items():
        job = functools.partial(add_components, run, subjects[variant], torch.float32)
        run.attempt(f"{variant}, components", 25 * seconds, job)
    rest = [
        (CALLS_OF_A_STEP * seconds, variant, Setting(1, "training step", budget_s=plan.budget_s))
        for variant, seconds in known.items()
    ]
    if "compiled" in plan.modes:
        rest += [
            (COMPILE_S + CALLS_OF_A_RECORD * known[variant] * first, variant, setting)
            for setting in [Setting(first, execution="compiled", budget_s=plan.budget_s)]
            for variant in plan.compiled
            if variant in known
        ]
    rest += [
        (CALLS_OF_A_BATCH * seconds * batch, variant, Setting(batch, budget_s=plan.budget_s, rivals=1))
        for variant, seconds in known.items()
        for batch in plan.batches[1:]
    ]
    for expected_s, variant, setting in sorted(rest, key=lambda job: job[0]):
        net(variant, setting, expected_s)
    for variant in known:
        memory(variant, sum(plan.batches[1:]))


def gpu_settings() -> Iterator[tuple[str, Setting, float]]:
    """Variant, setting and the seconds it may take, the essential ones first."""
    short = Setting(1, dtype=torch.bfloat16, budget_s=0.25, rivals=1, backends=1)
    for variant in ("paper", "released"):
        yield variant, dataclasses.replace(short, rivals=9), 10
    for batch in (8, 16):
        for variant in ("paper", "released", "lite"):
            yield variant, dataclasses.replace(short, batch=batch), 10
    for variant in ("paper", "released", "lite"):
        yield variant, dataclasses.replace(short, batch=8, mode="training step"), 10
    yield "paper", dataclasses.replace(short, dtype=torch.float32), 8
    yield "lite", dataclasses.replace(short, rivals=9, backends=9), 40
    yield "paper", dataclasses.replace(short, execution="compiled", rivals=9), 60


def gpu_records(
    limit_s: float,
    size: int = 512,
    device: str = "cuda",
    save: Callable[[dict[str, Any]], None] | None = None,
    variants: Sequence[str] = tuple(VARIANTS),
    **overrides: Any,
) -> dict[str, Any]:
    """What `python -m benchmarks.gpu` adds of whole nets, as far as `limit_s` seconds go: bf16 autocast at batches 1, 8
    and 16, training steps at batch 8, float32 (without TF32), all our backends and a compiled net once; ours against
    eager.

    Returns the report of `report_of`; what was left out and why is part of it. `save` gets it after each setting.
    """

    def keep(run: Run) -> None:
        if save is not None:
            save(report_of(run, device, size))

    run = Run(limit_s, keep)
    subjects: dict[str, Subject] = {}

    def job(variant: str, setting: Setting) -> None:
        if variant not in subjects:
            subjects[variant] = Subject(variant, size, device, **overrides)
        measure_into(run, subjects[variant], setting, {})
        if setting.batch == 1 and setting.rivals > 1 and setting.execution == "eager":
            add_components(run, subjects[variant], setting.dtype)

    with full_float32():
        for variant, setting, expected_s in gpu_settings():
            if variant not in variants:
                continue
            name = f"{variant}, batch {setting.batch}, {setting.dtype}, {setting.mode}, {setting.execution}"
            run.attempt(name, expected_s, functools.partial(job, variant, setting))
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return report_of(run, device, size)


def report_of(
    run: Run, device: str, size: int, load_before: tuple[float, ...] = (), kept: bool = False
) -> dict[str, Any]:
    """A report file: the machine, `records` as those of the kernels, `components`, `red` gates, `left_out`."""
    return {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "size": size,
        "threads": torch.get_num_threads(),
        "load_before": list(load_before),
        "load_after": list(os.getloadavg()),
        "load_limit": load_limit(),
        "memory_kept": kept,
        "quiet": all(record["quiet"] for record in run.records),
        "limit_s": run.limit_s,
        "seconds": dict(run.seconds),
        "machine": collect(),
        "state": machine_state(device),
        "revision": revision(),
        "records": list(run.records),
        "components": list(run.components),
        "red": dict(run.red),
        "left_out": dict(run.left_out),
    }


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {unknown[0]!r}")
    return names


def _batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(sorted(int(part) for part in text.split(",")))
    except ValueError:
        batches = ()
    if not batches or batches[0] < 1:
        raise argparse.ArgumentTypeError(f"must be positive numbers such as 1,8,16, got {text!r}")
    return batches


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a correctness gate was red."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.model", description="FRD-Net, our layers against eager PyTorch"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--variants", type=lambda text: _names(text, tuple(VARIANTS)), default=Plan.variants)
    parser.add_argument("--batches", type=_batches, default=Plan.batches, help="CPU; default 1,8,16")
    parser.add_argument("--size", type=int, default=Plan.size, help="pixels of a side (default 512)")
    parser.add_argument("--modes", type=lambda text: _names(text, Plan.modes), default=Plan.modes)
    parser.add_argument("--compile", type=lambda text: _names(text, tuple(VARIANTS)), default=Plan.compiled)
    parser.add_argument("--limit", type=float, default=CPU_LIMIT_S, metavar="SECONDS")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--out", type=pathlib.Path, help="write the report as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    load, kept = os.getloadavg(), keep_memory()

    def save(report: dict[str, Any]) -> None:
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")

    if options.device == "cuda":
        report = gpu_records(options.limit, options.size, save=save)
        return 1 if report["red"] else 0
    run = Run(options.limit, lambda run: save(report_of(run, "cpu", options.size, load, kept)))
    plan = Plan(options.variants, options.batches, options.size, options.modes, options.compile)
    run_on_cpu(plan, run)
    for name, reason in run.left_out.items():
        print(f"left out: {name}: {reason}")
    return 1 if run.red else 0


if __name__ == "__main__":
    sys.exit(main())
