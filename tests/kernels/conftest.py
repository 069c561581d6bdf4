"""Fixtures that every kernel family shares: one suite runs on every backend that can run here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import frd_kernels

from . import backends


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test once for each backend that has the OP of its module and keeps what the test asks for."""
    if "backend" in metafunc.fixturenames:
        names = backends.running(metafunc.module.OP)
        for marker, others in (("kernels", {"reference"}), ("native", {"reference", "triton"})):
            if metafunc.definition.get_closest_marker(marker):
                names = [name for name in names if name not in others]
        metafunc.parametrize("backend", names, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the cases of a backend into its tier; of a slow one every twelfth case of a test, and its first."""
    rank: Counter[str] = Counter()
    for item in items:
        spec = getattr(item, "callspec", None)
        name = spec.params.get("backend", "") if spec else ""
        tier = backends.tier(name)
        if tier:
            item.add_marker(tier)
        module: Any = item.module  # type: ignore[attr-defined]
        if backends.is_slow(name, getattr(module, "OP", "")):
            test = f"{item.nodeid.partition('[')[0]} {name}"
            if rank[test] % getattr(module, "EVERY", 12):
                item.add_marker("exhaustive")
            rank[test] += 1


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds what the collected tests need, outside the time limit of a single one."""
    if session.config.option.collectonly:
        return
    specs = [getattr(item, "callspec", None) for item in session.items]
    for name in {spec.params["backend"] for spec in specs if spec and "backend" in spec.params}:
        backends.prepare(name)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test inside `use_backend(name)`."""
    with frd_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    return backends.device_of(backend)


@pytest.fixture
def ops(backend: str, device: torch.device) -> Iterator[Any]:
    """torch.ops.frd, or the namespace that the backend's operators have; new tensors are made where they
    compute. For tests marked so that the reference, which has no operators, is left out."""
    with device:
        yield getattr(torch.ops, frd_kernels.backend.PROVIDERS[backend].namespace)


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


@pytest.fixture(autouse=True, scope="session")
def float32_is_float32() -> None:
    """Convolutions of cuDNN take TF32 unless told; products of cuBLAS do not."""
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False
