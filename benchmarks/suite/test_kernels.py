"""One group for each case: our call and the headline rival's, on the same tensors, after the correctness gate."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import cpu
from benchmarks.harness import Call, Case

ROUNDS, WARMUP = 30, 3


@pytest.mark.parametrize("side", ["ours", "rival"])
@pytest.mark.parametrize("case", cpu.cases(), ids=lambda case: case.name)
def test_speed(benchmark: BenchmarkFixture, case: Case, side: str, call: Call) -> None:
    benchmark.group = case.name
    benchmark.extra_info.update(side=side, target=case.target)
    benchmark.pedantic(call, rounds=ROUNDS, iterations=1, warmup_rounds=WARMUP)
