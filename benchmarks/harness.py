"""How a claim is measured: a correctness gate first, then both sides alternated in one process.

The parts: `cases` (a case, its data, its sides), `gate`, `timing` and `cuda` (how times are taken), `measure`.
"""

from __future__ import annotations

import ctypes
from typing import Any

from .calibrate import Rates
from .cases import LAYOUTS, MODES, Call, Case, Context, Providers, normal, with_gradients
from .gate import CAP, FLOOR, GateError, gate, relative_error
from .measure import load_limit, measure
from .providers import providers
from .timing import CannotTime, Timing, alternate, compare, summarise, warm_up

__all__ = [
    "CAP",
    "FLOOR",
    "LAYOUTS",
    "MODES",
    "Call",
    "CannotTime",
    "Case",
    "Context",
    "GateError",
    "Providers",
    "Rates",
    "Timing",
    "alternate",
    "compare",
    "gate",
    "keep_memory",
    "load_limit",
    "measure",
    "normal",
    "providers",
    "relative_error",
    "run_case",
    "summarise",
    "warm_up",
    "with_gradients",
]


def run_case(case: Case, repeats: int = 40, rates: Rates | None = None) -> dict[str, Any]:
    """Gate, then timings: the first record of `measure`, on the CPU the only one."""
    return measure(case, repeats, rates)[0]


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
