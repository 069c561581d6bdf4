"""Gate, then the times of one case: records that JSON can hold, one for each timing."""

from __future__ import annotations

import os
from typing import Any

import torch

from . import floors
from .calibrate import Rates
from .cases import Call, Case, Providers
from .gate import GateError, describe, errors_of, one_line
from .timing import CannotTime, Sample, Wall


def load_limit() -> float:
    """The load average above which others were at work: our own threads add up to their number."""
    return torch.get_num_threads() + 0.2


def timings_of(device: str) -> tuple[Any, ...]:
    if device == "cpu":
        return (Wall,)
    from . import cuda

    return cuda.TIMINGS


def measure(case: Case, repeats: int = 40, rates: Rates | None = None) -> list[dict[str, Any]]:
    """Builds the case, checks it and times it: a record for each timing of its device.

    `aa_spread` is by how much two series of our own call differ, alternated like a rival's: a ratio closer to 1 than
    that is no result. `quiet` is false where the load average says that something else ran on the machine. With
    `rates` the floors hold what the machine's copy and matrix rates would need.

    Raises:
        GateError: no backend of ours computes the right result.
        CannotTime: none of the timings worked.
    """
    sides = case.build(case)
    errors, wrong = errors_of(case, sides)
    if len(wrong) == len(sides.ours):
        raise GateError(f"{case.name}: {describe(sides, wrong)}")
    for backend, text in wrong.items():
        sides.drop(backend, f"RED GATE: {text}")
    records, failed = [], {}
    for kind in timings_of(case.device):
        try:
            records.append(_time(case, sides, kind, repeats))
        except CannotTime as reason:
            failed[kind.name] = str(reason)
    if not records:
        raise CannotTime(f"{case.name}: {failed}")
    for record in records:
        record |= {"relative_errors": errors, "red": sorted(wrong)}
        record["left_out"] |= failed
        if rates is not None:
            record["floors"] |= floors.numbers(case, rates, record["ours_ms"]["median"])
    return records


def _time(case: Case, sides: Providers, kind: Any, repeats: int) -> dict[str, Any]:
    before = os.getloadavg()[0]
    timing = kind(case, sides)
    try:
        record = _compare_all(sides, timing, repeats)
    finally:
        timing.close()
    load = max(before, os.getloadavg()[0])
    return {
        "name": case.name,
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype_name,
        "layout": case.layout,
        "mode": case.mode,
        "mean": case.mean,
        "device": case.device,
        "timing": timing.name,
        "target": case.target,
        **record,
        "graph_calls": getattr(timing, "calls", None),
        "load": load,
        "quiet": load <= load_limit(),
    }


def _compare_all(sides: Providers, timing: Any, repeats: int) -> dict[str, Any]:
    """Our headline backend against every rival and floor, the other backends against the headline rival, and ours
    against itself. A side that `timing` cannot time is left out of this record."""
    left_out = dict(sides.left_out)
    samples = _samples(sides, timing, left_out)
    own = [name for name in sides.ours if name in samples]
    rivals = [name for name in sides.rivals if name in samples]
    if not own or not rivals:
        raise CannotTime(f"no backend or no rival: {left_out}")
    best, headline = own[0], rivals[0]

    def compare(mine: str, other: str) -> dict[str, Any]:
        pair: dict[str, Any] = timing.compare(samples[mine], samples[other], repeats)
        return pair

    compared = {headline: compare(best, headline)}
    spread = abs(compare(best, best)["ratio"] - 1)
    backends, bounds = {best: compared[headline]}, dict[str, Any]()
    for name in samples:
        pairs = compared if name in sides.rivals else backends if name in sides.ours else bounds
        if name in pairs:
            continue
        try:
            pairs[name] = compare(name, headline) if pairs is backends else compare(best, name)
        except Exception as failure:  # of a compiler's code, say: the other sides can still be timed
            left_out[name] = why(failure)
    return {
        "backend": best,
        "rival": headline,
        **compared[headline],
        "aa_spread": spread,
        "rivals": compared,
        "backends": backends,
        "floors": bounds,
        "left_out": left_out,
    }


def _samples(sides: Providers, timing: Any, left_out: dict[str, str]) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    calls: dict[str, Call] = sides.ours | sides.rivals | sides.floors
    for name, call in calls.items():
        if timing.name not in sides.timings.get(name, (timing.name,)):
            continue
        try:
            samples[name] = timing.sample(name, call)
        except Exception as failure:
            left_out[name] = why(failure)
    return samples


def why(failure: Exception) -> str:
    return str(failure) if isinstance(failure, CannotTime) else one_line(failure)
