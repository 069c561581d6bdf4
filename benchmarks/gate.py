"""The correctness gate: no time is taken before our results have been compared with a float64 oracle's."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .registry import Case, Impls

# A relative error below ROUNDING, about what rounding the result costs, always passes; one above CAP never does, so
# that a baseline which is wrong itself cannot raise the limit.
ROUNDING = {torch.float32: 4.7e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
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
            return math.inf
        difference = (got.detach().double() - want.detach()).norm()
        if not torch.isfinite(difference):
            return math.inf
        worst = max(worst, float(difference / want.detach().norm().clamp_min(1e-30)))
    return worst


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills uninitialised tensors with NaN, so that an element which a kernel forgets to write is noticed."""
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


def allowed_error(best_baseline: float, dtype: torch.dtype, cap: dict[torch.dtype, float] = CAP) -> float:
    """Twice that of the best baseline, within ROUNDING and the cap."""
    return min(max(2 * best_baseline, ROUNDING[dtype]), cap[dtype])


def errors_of(case: Case, impls: Impls) -> tuple[dict[str, float], dict[str, str]]:
    """The relative error of every implementation, and what is wrong with those backends of ours whose error is not
    allowed. The first backend's error is called "ours", another's "ours, NAME".

    A baseline that raises, or whose result is not finite, is dropped with its reason.
    """
    exact = impls.oracle()
    errors: dict[str, float] = {}
    for name, call in list(impls.baselines.items()):
        try:
            with impls.context(name):
                error = relative_error(call(), exact)
        # Whatever a compiler or another library raises.
        except Exception as failure:
            impls.drop(name, one_line(failure))
            continue
        if math.isfinite(error):
            errors[name] = error
        else:
            impls.drop(name, "its result contains NaN or has another shape")
    best = min((e for name, e in errors.items() if name not in impls.converted), default=math.inf)
    cap = CAP_OF_GRADIENTS if case.backward else CAP
    ours, wrong = _errors_of_ours(impls, exact, allowed_error(best, case.dtype, cap))
    return ours | errors, wrong


def _errors_of_ours(
    impls: Impls, exact: Sequence[torch.Tensor], allowed: float
) -> tuple[dict[str, float], dict[str, str]]:
    errors, wrong = {}, {}
    for index, (backend, call) in enumerate(impls.ours.items()):
        try:
            with poisoned(), impls.context(backend):
                error = relative_error(call(), exact)
        except Exception as failure:
            if len(impls.ours) == 1:
                raise
            # The other backends can still be measured.
            wrong[backend] = one_line(failure)
            continue
        if math.isfinite(error):
            errors[f"ours, {backend}" if index else "ours"] = error
        if not error <= allowed:
            wrong[backend] = f"relative error {error:.2e}, at most {allowed:.2e} is allowed"
    return errors, wrong


def gate(case: Case, impls: Impls, drop_red: bool = False) -> dict[str, float]:
    """Relative errors against float64. With `drop_red` a wrong backend is dropped while another one is right.

    Raises:
        GateError: the result of a backend of ours is wrong.
    """
    errors, wrong = errors_of(case, impls)
    if wrong and not (drop_red and len(wrong) < len(impls.ours)):
        one = len(impls.ours) == 1
        text = "; ".join(text if one else f"{backend}: {text}" for backend, text in wrong.items())
        raise GateError(f"{case.name}: {text}")
    for backend, text in wrong.items():
        impls.drop(backend, f"RED GATE: {text}")
    return errors


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
