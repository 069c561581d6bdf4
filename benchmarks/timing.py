"""Both sides alternated in one process, and what is told of the times."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from .cases import Call, Case, Providers

Sample = Callable[[], float]  # -> seconds of one call


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    minimum: float
    median: float
    p10: float
    p90: float


def summarise(seconds: Sequence[float]) -> Timing:
    ordered = sorted(1e3 * s for s in seconds)
    last = len(ordered) - 1
    return Timing(
        ordered[0], statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    )


def warm_up(call: Callable[[], object], calls: int, budget_s: float = 1.0) -> None:
    """At least one call, then up to `calls` while the budget lasts."""
    end = time.perf_counter() + budget_s
    for _ in range(calls):
        call()
        if time.perf_counter() > end:
            break


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call that is done when it returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(
    calls: dict[str, Any],
    repeats: int,
    warmup: int = 3,
    budget_s: float = 10.0,
    sample: Callable[[Any], float] = timed,
) -> dict[str, list[float]]:
    """Seconds of each of two calls, `repeats` times in the order A B B A A B B A ..., so that both follow themselves
    (their data in the cache) and the other one equally often. Past `budget_s`, 5 times have to do.

    `sample` takes one of `calls` and gives its seconds.
    """
    for call in calls.values():
        warm_up(functools.partial(sample, call), warmup)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, end = list(calls), time.perf_counter() + budget_s
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            for name in order if turn % 2 == 0 else reversed(order):
                seconds[name].append(sample(calls[name]))
            if time.perf_counter() > end and turn >= 4:
                break
    finally:
        if collecting:
            gc.enable()
    return seconds


def pair(mine: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """The record of two series; `ratio` is the other's median over ours."""
    ours, other = summarise(mine), summarise(others)
    return {
        "ratio": other.median / ours.median,
        "ratio_of_minima": other.minimum / ours.minimum,
        "turns": len(mine),
        "ours_ms": dataclasses.asdict(ours),
        "rival_ms": dataclasses.asdict(other),
    }


def compare(ours: Call, other: Call, repeats: int) -> dict[str, Any]:
    """Two calls in turns."""
    seconds = alternate({"ours": ours, "other": other}, repeats)
    return pair(seconds["ours"], seconds["other"])


class Wall:
    """Seconds from before one call on the CPU to after it."""

    name = "wall"

    def __init__(self, case: Case, sides: Providers) -> None:
        self.sides = sides

    def sample(self, side: str, call: Call) -> Sample:
        """What takes the time of one call, within the settings of its side.

        Raises:
            CannotTime: this side cannot be timed in this way.
        """

        def run() -> float:
            with self.sides.context(side):
                return timed(call)

        return run

    def compare(self, ours: Sample, other: Sample, repeats: int) -> dict[str, Any]:
        return compare_samples(ours, other, repeats)

    def close(self) -> None:
        """Lets go of what the samples hold."""


class CannotTime(RuntimeError):
    """A side cannot be timed in this way, and why."""


def compare_samples(ours: Sample, other: Sample, repeats: int, budget_s: float = 10.0) -> dict[str, Any]:
    series = {"ours": ours, "other": other}
    seconds = alternate(series, repeats, budget_s=budget_s, sample=lambda take: take())
    return pair(seconds["ours"], seconds["other"])
