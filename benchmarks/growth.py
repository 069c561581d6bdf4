"""How time grows with resolution and with batch: `python -m benchmarks.growth --help`.

For whole nets and for the kernels, ours and eager, both behind the gate. The exponent is that of the power law that
fits the points best (least squares between logarithms): 1 is proportional, in resolution to the number of pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import model_sides
from .gate import gate
from .harness import Case, keep_memory
from .measure import load_limit, timings_of
from .model import Run, measure_net, report_of
from .model_sides import Subject
from .model_timing import Setting
from .registry import cases
from .timing import compare_samples

SIZES = (256, 384, 512, 768, 1024, 1536, 2048)
BATCHES = (1, 2, 4, 8, 16)
KERNELS = ("pdc angular depthwise", "dpm", "icm paper")
STRIDE = 32  # of the maps that the FRD blocks work on
CPU_LIMIT_S = 180.0
BUDGET_S = 2.0  # of one point; five turns are taken in any case
CALLS_OF_A_POINT = 20


@dataclasses.dataclass(frozen=True)
class Fit:
    """y = factor * x ** exponent, over points from `least` to `most`."""

    exponent: float
    factor: float
    r_squared: float
    least: float
    most: float
    points: int


def fit_power(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least squares between log x and log y.

    Raises:
        ValueError: fewer than two different x, or a number that is not positive.
    """
    if len(x) != len(y) or len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(
            f"x and y must be positive and pair two different x at least, got {list(x)}, {list(y)}"
        )
    logs = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_x, mean_y = (sum(values) / len(values) for values in logs)
    dx, dy = [value - mean_x for value in logs[0]], [value - mean_y for value in logs[1]]
    exponent = sum(a * b for a, b in zip(dx, dy, strict=True)) / sum(a * a for a in dx)
    residual = sum((b - exponent * a) ** 2 for a, b in zip(dx, dy, strict=True))
    spread = sum(b * b for b in dy)
    r_squared = 1 - residual / spread if spread else 1.0
    return Fit(exponent, math.exp(mean_y - exponent * mean_x), r_squared, min(x), max(x), len(x))


def series_of(name: str, over: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """`points` with, for each side, the exponent over `x`: pixels of the image for "size", images for "batch"."""
    ordered = sorted(points, key=lambda point: float(point["x"]))
    series: dict[str, Any] = {"name": name, "over": over, "points": ordered, "fits": {}}
    if len(ordered) < 2:
        return series
    x = [point["x"] for point in ordered]
    for side in ("ours", "rival"):
        fit = fit_power(x, [point[f"{side}_ms"]["median"] for point in ordered])
        series["fits"][side] = dataclasses.asdict(fit)
    return series


def point_of(record: dict[str, Any], x: float, **facts: Any) -> dict[str, Any]:
    kept = ("ours_ms", "rival_ms", "ratio", "ratio_of_minima", "turns", "load", "quiet")
    return {"x": x, **facts, **{key: record[key] for key in kept if key in record}}


def _append(points: list[dict[str, Any]], measure: Callable[[int], dict[str, Any]], value: int) -> None:
    points.append(measure(value))


def grow(
    run: Run, name: str, over: str, values: Sequence[int], measure: Callable[[int], dict[str, Any]]
) -> dict[str, Any]:
    """One series: a point for each value, rising, as far as the limit goes; a point's expected time follows from the
    one before it."""
    points: list[dict[str, Any]] = []
    for value in sorted(values):
        expected_s = 0.0
        if points:
            last = points[-1]
            slower = max(last["ours_ms"]["median"], last["rival_ms"]["median"])
            x = value**2 if over == "size" else value
            expected_s = 1e-3 * CALLS_OF_A_POINT * slower * x / last["x"]
        job = functools.partial(_append, points, measure, value)
        done = run.attempt(f"{name}, {over} {value}", expected_s, job)
        if done:
            shown = points[-1]
            print(
                f"{name:28} {over} {value:5} {shown['ours_ms']['median']:10.3f} {shown['rival_ms']['median']:10.3f} ms "
                f"{shown['ratio']:6.2f}x",
                flush=True,
            )
    return series_of(name, over, points)


def model_series(
    run: Run,
    variant: str,
    sizes: Sequence[int],
    batches: Sequence[int],
    size: int,
    device: str,
    dtype: torch.dtype,
) -> Iterator[dict[str, Any]]:
    """A net over resolution, one image, and over batch, at `size`."""

    def measure(subject: Subject, batch: int) -> dict[str, Any]:
        setting = Setting(batch, dtype=dtype, budget_s=BUDGET_S, rivals=1, spread=False)
        record = measure_net(subject, setting, layouts)[0][0]
        return point_of(record, batch, size=subject.size, batch=batch)

    def at_size(side: int) -> dict[str, Any]:
        return measure(Subject(variant, side, device), 1) | {"x": side**2}

    layouts: dict[str, str] = {}
    if sizes:
        yield grow(run, f"model {variant}", "size", sizes, at_size)
    if batches:
        subject = Subject(variant, size, device)
        yield grow(run, f"model {variant}", "batch", batches, lambda batch: measure(subject, batch))


def kernel_series(
    run: Run, op: str, sizes: Sequence[int], batches: Sequence[int], size: int, device: str
) -> Iterator[dict[str, Any]]:
    """A kernel, forward, on the maps that an FRD block of `paper` has at these resolutions and batches."""
    found = [case for case in cases(device) if case.op == op and case.mode == "forward" and not case.mean]
    case = next((case for case in found if case.dtype == torch.float32), found[0] if found else None)
    if case is None:
        run.left_out[op] = f"no such case on {device}"
        return
    channels = case.shape[1]

    def measure(batch: int, side: int) -> dict[str, Any]:
        resized = dataclasses.replace(
            case, shape=(batch, channels, side // STRIDE, side // STRIDE), compiled=()
        )
        return point_of(measure_case(resized), batch, size=side, batch=batch, shape=list(resized.shape))

    if sizes:
        yield grow(run, op, "size", sizes, lambda side: measure(1, side) | {"x": side**2})
    if batches:
        yield grow(run, op, "batch", batches, lambda batch: measure(batch, size))


def measure_case(case: Case) -> dict[str, Any]:
    """Our headline backend against the headline rival, after the gate."""
    sides = case.build(case)
    gate(case, sides)
    before = os.getloadavg()[0]
    timing = timings_of(case.device)[0](case, sides)
    try:
        own, other = next(iter(sides.ours)), next(iter(sides.rivals))
        pair = compare_samples(
            timing.sample(own, sides.ours[own]), timing.sample(other, sides.rivals[other]), 40, BUDGET_S / 4
        )
    finally:
        timing.close()
    load = max(before, os.getloadavg()[0])
    return pair | {"load": load, "quiet": load <= load_limit()}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a correctness gate was red."""
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description="time over resolution and batch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--variants", default="lite", help="nets (default lite; empty for none)")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="pixels of a side")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--kernels", default=",".join(KERNELS), help="ops of the registry (empty for none)")
    parser.add_argument("--limit", type=float, default=CPU_LIMIT_S, metavar="SECONDS")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--out", type=pathlib.Path, help="write the report as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    load, kept = os.getloadavg(), keep_memory()
    sizes, batches = ([int(t) for t in text.split(",") if t] for text in (options.sizes, options.batches))
    run = Run(options.limit)
    report = grow_all(run, options.variants, options.kernels, sizes, batches, options.device)
    if options.out:
        full = report_of(run, options.device, 0, load, kept) | report
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(full, indent=1) + "\n")
    for name, reason in run.left_out.items():
        print(f"left out: {name}: {reason}")
    return 1 if run.red else 0


def grow_all(
    run: Run,
    variants: str,
    kernels: str,
    sizes: Sequence[int],
    batches: Sequence[int],
    device: str,
    size: int = 512,
) -> dict[str, Any]:
    """The series of all nets and kernels, under "series"; kernels first, they take little time."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    series: list[dict[str, Any]] = []
    for op in kernels.split(",") if kernels else ():
        series += kernel_series(run, op, sizes, batches, size, device)
    for variant in variants.split(",") if variants else ():
        if variant not in model_sides.VARIANTS:
            raise ValueError(f"variants must be of {', '.join(model_sides.VARIANTS)}, got {variant!r}")
        series += model_series(run, variant, sizes, batches, size, device, dtype)
    return {"series": series}


if __name__ == "__main__":
    sys.exit(main())
