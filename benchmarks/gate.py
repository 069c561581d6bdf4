"""The correctness gate: no time is taken before our tensors have been compared with a float64 oracle's."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .cases import Case, Providers

# Relative error that is never red, about what rounding the result costs, and one that always is: a rival that fails
# altogether must not let us through.
FLOOR = {torch.float32: 4.7e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
CAP = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# In bfloat16 some hidden values are rounded across 0, where a ReLU opens or closes: eager's gradients are off by 3e-2.
CAP_OF_GRADIENTS = CAP | {torch.bfloat16: 4e-2}


class GateError(AssertionError):
    """Our result is wrong, so no time is shown."""


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


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills uninitialised tensors with NaN, so that an element which a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        memory.fill_uninitialized_memory = filled


def errors_of(case: Case, sides: Providers) -> tuple[dict[str, float], dict[str, str]]:
    """Relative errors of every side against float64, and what is wrong with those backends of ours that are over twice
    that of the best rival over the same tensors, or the cap. The headline backend's error stands under "ours",
    another's under "ours, NAME".

    A rival that raises, or computes no numbers, is left out with its reason.
    """
    exact = sides.oracle()
    errors: dict[str, float] = {}
    for name, call in list(sides.rivals.items()):
        try:
            with sides.context(name):
                error = relative_error(call(), exact)
        except Exception as failure:  # whatever a compiler or another library raises
            sides.drop(name, one_line(failure))
            continue
        if math.isfinite(error):
            errors[name] = error
        else:
            sides.drop(name, "its result holds NaN or has another shape")
    best = min((e for name, e in errors.items() if name not in sides.converted), default=math.inf)
    cap = CAP if case.mode == "forward" else CAP_OF_GRADIENTS
    allowed = min(max(2 * best, FLOOR[case.dtype]), cap[case.dtype])
    ours, wrong = _errors_of_ours(sides, exact, allowed)
    return ours | errors, wrong


def _errors_of_ours(
    sides: Providers, exact: Sequence[torch.Tensor], allowed: float
) -> tuple[dict[str, float], dict[str, str]]:
    errors, wrong = {}, {}
    for index, (backend, call) in enumerate(sides.ours.items()):
        try:
            with poisoned(), sides.context(backend):
                error = relative_error(call(), exact)
        except Exception as failure:
            if len(sides.ours) == 1:
                raise
            wrong[backend] = one_line(failure)  # the other backends can still be measured
            continue
        if math.isfinite(error):
            errors[f"ours, {backend}" if index else "ours"] = error
        if not error <= allowed:
            wrong[backend] = f"relative error {error:.2e}, at most {allowed:.2e} is allowed"
    return errors, wrong


def gate(case: Case, sides: Providers) -> dict[str, float]:
    """Relative errors against float64; raises GateError where a backend of ours is over twice the best rival's, or
    the cap."""
    errors, wrong = errors_of(case, sides)
    if wrong:
        raise GateError(f"{case.name}: {describe(sides, wrong)}")
    return errors


def describe(sides: Providers, wrong: dict[str, str]) -> str:
    """What is wrong, with the backends named where there are several."""
    if len(sides.ours) == 1:
        return next(iter(wrong.values()))
    return "; ".join(f"{backend}: {text}" for backend, text in wrong.items())


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
