"""One group for each case, in it each side's call on the same tensors, after the correctness gate."""

from __future__ import annotations

from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.clock import synchronize
from benchmarks.harness import Call, Case


def test_speed(benchmark: BenchmarkFixture, case: Case, side: str, call: Call) -> None:
    def finished() -> Any:
        results = call()
        synchronize(case.device)
        return results

    benchmark.group = f"{case.device}: {case.name}"
    benchmark.extra_info.update(side=side, target=case.target, mean=case.mean, device=case.device)
    benchmark(finished)
