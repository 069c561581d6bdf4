"""`pytest benchmarks --benchmark-only [-k TEXT]`: the cases of `python -m benchmarks.cpu` under pytest-benchmark.

In a folder of its own, which is not a package, so that nothing of it is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from benchmarks import cpu
from benchmarks.harness import Call, Case, Providers, gate

THREADS = 2


@functools.lru_cache(maxsize=1)
def _checked(case: Case) -> Providers:
    """Both sides of the case in turn use it, so the one of the case before is let go."""
    sides = case.build(case)
    gate(case, sides)
    return sides


@pytest.fixture
def call(case: Case, side: str) -> Call:
    """Our call of the case, or that of its headline rival, once the gate is green."""
    sides = _checked(case)
    return sides.ours if side == "ours" else next(iter(sides.rivals.values()))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with cpu.cpu_threads(THREADS):
        yield
