"""What has to be set before anything imports frd_kernels; compilations that run beside the tests; the fixture
`backend`: one suite runs on every backend that can run here."""

from __future__ import annotations

import concurrent.futures
import fcntl
import os
import pathlib
import pickle
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Set by pytest-xdist in its workers, of which there is one for each core.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if _WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The benchmarks are not installed; behind the installed packages, so that those are what is tested.
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import pytest  # noqa: E402  OpenMP reads its variables when torch loads it
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the Triton kernels then compute on the CPU

# A folder of this run: workers find it in the environment; it goes with the process that made it.
if not (_WORKER and "FRD_TEST_RUN" in os.environ):
    _made = tempfile.TemporaryDirectory(prefix="frd_test_")
    os.environ["FRD_TEST_RUN"] = _made.name
_RUN = pathlib.Path(os.environ["FRD_TEST_RUN"])

# Graphs that an earlier run compiled or exported must not answer for the code under test.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_RUN / "inductor")
os.environ["HF_ASSETS_CACHE"] = str(_RUN / "assets")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes in each worker

import frd_kernels  # noqa: E402

from . import backends  # noqa: E402

# One worker: most tests keep one core busy, and machines with two are common.
_BESIDE = concurrent.futures.ThreadPoolExecutor(1)


class Compilation:
    """What `compile_all` of a module gives: the first that asks for it, thread or worker, computes it."""

    def __init__(self, module: Any) -> None:
        self.compile_all = module.compile_all
        self.path = _RUN / f"{module.__name__}.pickle"

    def result(self) -> Any:
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.path.exists():
                self._compute()
        outcome, error, skipped = pickle.loads(self.path.read_bytes())
        if error:
            raise error
        if skipped:
            pytest.skip(skipped)
        return outcome

    def _compute(self) -> None:
        found: tuple[Any, Exception | None, str]
        try:
            found = self.compile_all(), None, ""
        except Exception as error:
            found = None, error, ""
        except pytest.skip.Exception as skip:  # cannot be pickled
            found = None, None, str(skip)
        partial = self.path.with_suffix(".partial")
        partial.write_bytes(pickle.dumps(found))
        partial.rename(self.path)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test once for each backend that has the OP of its module and keeps what the test asks for."""
    if "backend" in metafunc.fixturenames:
        names = backends.running(metafunc.module.OP)
        for marker, others in (("kernels", {"reference"}), ("native", {"reference", "triton"})):
            if metafunc.definition.get_closest_marker(marker):
                names = [name for name in names if name not in others]
        metafunc.parametrize("backend", names, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the cases of a backend into its tier; of a slow one every twelfth case of a test, and its first.

    The tests of modules with a `compile_all` come last: they wait for what it gives."""
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
            if rank[test] % getattr(module, "EVERY", 12) or backends.is_superseded(name, module.OP):
                item.add_marker("exhaustive")
            rank[test] += 1
    items.sort(key=lambda item: hasattr(item.module, "compile_all"))  # type: ignore[attr-defined]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the compilations, and builds what the collected tests need, outside the time limit of a single one."""
    if session.config.option.collectonly:
        return
    modules = {item.module.__name__: item.module for item in session.items}  # type: ignore[attr-defined]
    for module in modules.values():
        if hasattr(module, "compile_all"):
            module.COMPILED = Compilation(module)
            if _WORKER in (None, "gw0"):
                _BESIDE.submit(module.COMPILED.result)
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
