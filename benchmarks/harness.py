"""How a claim is measured: a correctness gate first, then both sides alternated in one process.

A case builds, on one set of tensors, our call, the rivals' calls and a float64 oracle. A call returns the
tensors that it computed (outputs, and gradients in the forward+backward mode). No time is taken before our
tensors have been compared with the oracle's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Sequence[torch.Tensor]]
MODES = ("forward", "forward+backward")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

# Relative error that is never red, about what rounding the result costs, and one that always is: a rival that fails
# altogether must not let us through.
FLOOR = {torch.float32: 4.7e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
CAP = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclasses.dataclass(frozen=True)
class Providers:
    """The sides of one case, over the same tensors."""

    ours: Call
    rivals: dict[str, Call]  # name -> call; the first one is what the headline ratio is taken against
    oracle: Call  # float64
    # name -> a part of the work that nobody can leave out, timed beside ours and not checked: it bounds the ratio
    floors: dict[str, Call] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """op x shape x dtype x layout x mode, and how to build its providers."""

    op: str
    shape: tuple[int, ...]
    mode: str
    build: Callable[
        [Case], Providers
    ]  # called with the case itself, so that another shape is a `replace` away
    layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    target: float | None = None  # ratio rival / ours that the project has set itself
    short: bool = False  # part of the demo's short run

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.op} [{shape}] {self.dtype_name} {self.layout} {self.mode}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    minimum: float
    median: float
    p10: float
    p90: float


class GateError(AssertionError):
    """Our result is wrong, so no time is shown."""


def normal(
    shape: Sequence[int], case: Case, seed: int, scale: float = 1.0, step: float = 0.0
) -> torch.Tensor:
    """Random normal numbers, rounded to multiples of `step`, in the dtype of the case; 4-D ones in its layout."""
    tensor = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if step:
        tensor = (tensor / step).round() * step
    tensor = tensor.to(case.dtype)
    return tensor.contiguous(memory_format=LAYOUTS[case.layout]) if tensor.dim() == 4 else tensor


def with_gradients(
    call: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], grad: torch.Tensor | None, mode: str
) -> Call:
    """A call of `mode` over leaf tensors: returns the output, in forward+backward the gradients too.

    The forward mode runs without autograd, as at inference, and needs no `grad`.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")

    def forward() -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return (call(*inputs),)

    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward_backward() -> Sequence[torch.Tensor]:
        out = call(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    return forward if mode == "forward" else forward_backward


def providers(
    case: Case,
    inputs: Sequence[torch.Tensor],
    ours: Callable[..., torch.Tensor],
    rivals: dict[str, Callable[..., torch.Tensor]],
    reference: Callable[..., torch.Tensor],
    squared: bool = False,
) -> Providers:
    """Every side over the same `inputs`, `reference` over their float64 copies; all inputs get gradients.

    The loss is <y, g> with a random g; `squared` adds |y|^2 / 2, for ops with scalar parameters: their gradients are
    sums over all pixels, which g alone lets cancel to rounding noise.
    """
    exact_inputs, grad, exact_grad = [x.double() for x in inputs], None, None
    if case.mode != "forward":
        with torch.no_grad():
            out = reference(*exact_inputs)
        grad = normal(out.shape, case, seed=0)
        if squared:
            grad = (grad + out).to(case.dtype)
        exact_grad = grad.double()
    return Providers(
        ours=with_gradients(ours, inputs, grad, case.mode),
        rivals={name: with_gradients(call, inputs, grad, case.mode) for name, call in rivals.items()},
        oracle=with_gradients(reference, exact_inputs, exact_grad, case.mode),
    )


def relative_error(result: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Largest over the tensors of ||result - exact|| / ||exact||, in float64; infinite for another shape or NaN."""
    worst = 0.0
    for got, want in zip(result, exact, strict=True):
        if got.shape != want.shape:
            return float("inf")
        difference = (got.detach().double() - want.detach()).norm()
        if not torch.isfinite(difference):
            return float("inf")
        worst = max(worst, float(difference / want.detach().norm().clamp_min(1e-30)))
    return worst


def gate(case: Case, providers: Providers) -> dict[str, float]:
    """Relative errors against float64; raises GateError where ours is over twice the best rival's, or the cap."""
    exact = providers.oracle()
    errors = {"ours": relative_error(providers.ours(), exact)}
    for name, call in providers.rivals.items():
        errors[name] = relative_error(call(), exact)
    best_rival = min(errors[name] for name in providers.rivals)
    allowed = min(max(2 * best_rival, FLOOR[case.dtype]), CAP[case.dtype])
    if not errors["ours"] <= allowed:
        raise GateError(f"{case.name}: relative error {errors['ours']:.2e}, at most {allowed:.2e} is allowed")
    return errors


def summarise(seconds: Sequence[float]) -> Timing:
    ordered = sorted(1e3 * s for s in seconds)
    last = len(ordered) - 1
    return Timing(
        ordered[0], statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    )


def warm_up(call: Call, calls: int, budget_s: float = 1.0) -> None:
    """At least one call, then up to `calls` while the budget lasts."""
    end = time.perf_counter() + budget_s
    for _ in range(calls):
        call()
        if time.perf_counter() > end:
            break


def alternate(
    calls: dict[str, Call], repeats: int, warmup: int = 3, budget_s: float = 10.0
) -> dict[str, list[float]]:
    """Seconds of each of two calls, `repeats` times in the order A B B A A B B A ..., so that both follow themselves
    (their data in the cache) and the other one equally often. Past `budget_s`, 5 times have to do."""
    for call in calls.values():
        warm_up(call, warmup)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, end = list(calls), time.perf_counter() + budget_s
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            for name in order if turn % 2 == 0 else reversed(order):
                start = time.perf_counter()
                calls[name]()
                seconds[name].append(time.perf_counter() - start)
            if time.perf_counter() > end and turn >= 4:
                break
    finally:
        if collecting:
            gc.enable()
    return seconds


def compare(ours: Call, other: Call, repeats: int) -> dict[str, Any]:
    """`ratio` is the other's median over ours, in the pair's own series."""
    seconds = alternate({"ours": ours, "other": other}, repeats)
    mine, others = summarise(seconds["ours"]), summarise(seconds["other"])
    return {
        "ratio": others.median / mine.median,
        "ratio_of_minima": others.minimum / mine.minimum,
        "turns": len(seconds["ours"]),
        "ours_ms": dataclasses.asdict(mine),
        "rival_ms": dataclasses.asdict(others),
    }


def keep_memory() -> bool:
    """Lets glibc keep freed memory instead of giving it back to the kernel; False where the allocator is another.

    Otherwise a result of some megabytes is paged in anew at each call, which takes longer than many a kernel, ours or
    the rival's, and says nothing about either. jemalloc and tcmalloc, which PyTorch's tuning guide asks for, keep it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    never, limit = -1, (1 << 31) - 1
    return bool(mallopt(trim_threshold, never) and mallopt(mmap_threshold, limit))


def load_limit() -> float:
    """The load average above which others were at work: our own threads add up to their number."""
    return torch.get_num_threads() + 0.2


def run_case(case: Case, repeats: int = 40) -> dict[str, Any]:
    """Gate, then timings: a record that JSON can hold.

    `aa_spread` is by how much two series of our own call differ, alternated like a rival's: a ratio closer to 1 than
    that is no result. `quiet` is false where the load average says that something else ran on the machine.
    """
    sides = case.build(case)
    errors = gate(case, sides)
    before = os.getloadavg()[0]
    rivals = {name: compare(sides.ours, call, repeats) for name, call in sides.rivals.items()}
    floors = {name: compare(sides.ours, call, repeats) for name, call in sides.floors.items()}
    again = compare(sides.ours, sides.ours, repeats)
    load = max(before, os.getloadavg()[0])
    headline = next(iter(rivals))
    return {
        "name": case.name,
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype_name,
        "layout": case.layout,
        "mode": case.mode,
        "target": case.target,
        "rival": headline,
        **rivals[headline],
        "aa_spread": abs(again["ratio"] - 1),
        "rivals": rivals,
        "floors": floors,
        "relative_errors": errors,
        "load": load,
        "quiet": load <= load_limit(),
    }
