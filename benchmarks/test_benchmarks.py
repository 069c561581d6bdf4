"""`pytest benchmarks --benchmark-only [-k "pdc and angular"]`: each implementation of each registered case, one group a
case, after the correctness gate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .gate import gate
from .machine import cpu_threads
from .registry import Call, Case, Impls, cases

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
THREADS = 2
COMPILED = "compiled"


def names_of(case: Case) -> list[str]:
    """The implementations are known once the case is built, so it is built on little data."""
    shape = (16, 16, 3, 3) if case.op.startswith("pdc_weight") else (1, 32, 16, 16)
    small = dataclasses.replace(case, shape=shape)
    impls = small.build(small)
    return [*(f"ours, {backend}" for backend in impls.ours), *impls.baselines, *impls.lower_bounds]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(case, name) for device in DEVICES for case in cases(device) for name in names_of(case)]
    ids = [f"{case.name}, {name}" for case, name in pairs]
    metafunc.parametrize(("case", "name"), pairs, ids=ids)


@functools.lru_cache(maxsize=1)
def checked(case: Case) -> Impls:
    """Consecutive tests share a case; the one before is freed."""
    impls = case.build(case)
    gate(case, impls)
    return impls


@pytest.fixture
def call(case: Case, name: str) -> Iterator[Call]:
    """An implementation within its settings, once the gate is green. Only the compiled ones wait for a compiler."""
    with cpu_threads(THREADS):
        impls = checked(case if name.startswith(COMPILED) else dataclasses.replace(case, compiled=()))
        name = name.removeprefix("ours, ")
        if name in impls.left_out:
            pytest.skip(impls.left_out[name])
        with impls.context(name):
            yield impls.calls()[name]


def test_speed(benchmark: Any, case: Case, name: str, call: Call) -> None:
    def finished() -> Any:
        results = call()
        if case.device == "cuda":
            torch.cuda.synchronize()
        return results

    benchmark.group = f"{case.device}: {case.name}"
    benchmark.extra_info.update(implementation=name, device=case.device, torch=torch.__version__)
    benchmark(finished)
