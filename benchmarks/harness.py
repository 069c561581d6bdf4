"""How a claim is measured: a correctness gate first, then both sides alternated in one process.

A case builds, on one set of tensors, our call, the rivals' calls and a float64 oracle. A call returns the
tensors that it computed (outputs, and gradients in the forward+backward mode). No time is taken before our
tensors have been compared with the oracle's.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Sequence[torch.Tensor]]
MODES = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Providers:
    """The sides of one case, over the same tensors."""

    ours: Call
    rivals: dict[str, Call]  # name -> call; the first one is what the headline ratio is taken against
    oracle: Call  # float64


@dataclasses.dataclass(frozen=True)
class Case:
    """op x shape x dtype x layout x mode, and how to build its providers."""

    op: str
    shape: tuple[int, ...]
    mode: str
    build: Callable[[], Providers]
    layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    target: float | None = None  # ratio rival / ours that the project has set itself
    short: bool = False  # part of the demo's short run

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.op} [{shape}] {str(self.dtype).removeprefix('torch.')} {self.layout} {self.mode}"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    minimum: float
    median: float
    p10: float
    p90: float


class GateError(AssertionError):
    """Our result is wrong, so no time is shown."""


def relative_error(result: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Largest over the tensors of ||result - exact|| / ||exact||, in float64."""
    worst = 0.0
    for got, want in zip(result, exact, strict=True):
        difference = (got.detach().double() - want.detach()).norm()
        worst = max(worst, float(difference / want.detach().norm().clamp_min(1e-30)))
        if not torch.isfinite(difference):
            return float("inf")
    return worst


def gate(case: Case, providers: Providers) -> dict[str, float]:
    """Relative errors against float64; raises GateError where ours is over twice the best rival's."""
    exact = providers.oracle()
    errors = {"ours": relative_error(providers.ours(), exact)}
    for name, call in providers.rivals.items():
        errors[name] = relative_error(call(), exact)
    floor = 4 * torch.finfo(case.dtype).eps
    allowed = max(2 * min(errors[name] for name in providers.rivals), floor)
    if not errors["ours"] <= allowed:
        raise GateError(f"{case.name}: relative error {errors['ours']:.2e}, at most {allowed:.2e} is allowed")
    return errors


def summarise(seconds: list[float]) -> Timing:
    ordered = sorted(1e3 * s for s in seconds)
    last = len(ordered) - 1
    return Timing(
        ordered[0], statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    )


def alternate(
    calls: dict[str, Call], repeats: int, warmup: int = 3, budget_s: float = 20.0
) -> dict[str, Timing]:
    """Times every call `repeats` times in turns (A B, B A, ...), stopping after `budget_s` seconds."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, end = list(calls), time.perf_counter() + budget_s
    for turn in range(repeats):
        for name in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() > end and turn >= 4:
            break
    return {name: summarise(values) for name, values in seconds.items()}


def run_case(case: Case, repeats: int = 40) -> dict[str, Any]:
    """Gate, then timings: a record that JSON can hold. `ratio` is the rival's median over ours."""
    providers = case.build()
    errors = gate(case, providers)
    timings = alternate({"ours": providers.ours, **providers.rivals}, repeats)
    ours = timings["ours"]
    rivals = {
        name: {
            "ratio": timings[name].median / ours.median,
            "ratio_of_minima": timings[name].minimum / ours.minimum,
        }
        for name in providers.rivals
    }
    headline = next(iter(rivals))
    return {
        "name": case.name,
        "op": case.op,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "mode": case.mode,
        "target": case.target,
        "rival": headline,
        "ratio": rivals[headline]["ratio"],
        "ratio_of_minima": rivals[headline]["ratio_of_minima"],
        "rivals": rivals,
        "relative_errors": errors,
        "milliseconds": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
    }


def with_gradients(
    call: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], grad: torch.Tensor, mode: str
) -> Call:
    """A call of `mode` over leaf tensors: returns the output, in forward+backward the gradients too.

    The forward mode runs without autograd, as at inference.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")

    def forward() -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return (call(*inputs),)

    def forward_backward() -> Sequence[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = call(*leaves)
        return (out, *torch.autograd.grad(out, leaves, grad))

    return forward if mode == "forward" else forward_backward
