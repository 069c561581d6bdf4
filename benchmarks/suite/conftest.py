"""`pytest benchmarks --benchmark-only [-k "pdc and angular"]`: every side of every registered case.

In a folder of its own, which is not a package, so that nothing of it is installed. The sides of a case are known once
it is built, so it is built on little data to name them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import cpu
from benchmarks.clock import machine_state
from benchmarks.harness import Call, Case, Providers, gate
from benchmarks.registry import cases

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
THREADS = 2
COMPILED = "compiled"  # how the names of torch.compile's forms begin
REGISTERED = [case for device in DEVICES for case in cases(device)]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """What `--benchmark-json` tells of the machine besides pytest-benchmark's own facts."""
    machine_info["frd"] = machine_state(DEVICES[-1])


def sides_of(case: Case) -> list[str]:
    """The names of our backends, rivals and floors."""
    shape = (16, 16, 3, 3) if case.op.startswith("pdc_weight") else (1, 32, 16, 16)
    small = dataclasses.replace(case, shape=shape)
    sides = small.build(small)
    return [*(f"ours, {backend}" for backend in sides.ours), *sides.rivals, *sides.floors]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "side" in metafunc.fixturenames:
        pairs = [(case, side) for case in REGISTERED for side in sides_of(case)]
        metafunc.parametrize(("case", "side"), pairs, ids=[f"{case.name}, {side}" for case, side in pairs])


@functools.lru_cache(maxsize=1)
def _checked(case: Case) -> Providers:
    """All sides of the case in turn use it, so the one of the case before is let go."""
    sides = case.build(case)
    gate(case, sides)
    return sides


@pytest.fixture
def call(case: Case, side: str) -> Iterator[Call]:
    """A side of the case, once the gate is green, within the side's settings. Its rivals are compiled for the
    compiled side alone."""
    sides = _checked(case if side.startswith(COMPILED) else dataclasses.replace(case, compiled=()))
    name = side.removeprefix("ours, ")
    if name in sides.left_out:
        pytest.skip(sides.left_out[name])
    found = (sides.ours | sides.rivals | sides.floors)[name]
    with sides.context(name):
        yield found


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with cpu.cpu_threads(THREADS):
        yield
