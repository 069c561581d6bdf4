"""Fixtures that every kernel family shares: one suite runs on every backend that can run here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import frd_kernels

RUNNABLE = [name for name, (available, _reason) in frd_kernels.backends().items() if available]


@pytest.fixture(params=RUNNABLE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test inside `use_backend(name)` for each available backend."""
    with frd_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every uninitialised tensor with NaN, so that an element a kernel forgets to write is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
