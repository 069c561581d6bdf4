"""What has to be set before anything imports frd_kernels; compilations that run beside the tests."""

from __future__ import annotations

import concurrent.futures
import fcntl
import os
import pathlib
import pickle
import sys
import tempfile
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

# Graphs that an earlier run compiled must not answer for the code under test.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_RUN / "inductor")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes in each worker

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of modules with a `compile_all` last: they wait for what it gives."""
    items.sort(key=lambda item: hasattr(item.module, "compile_all"))  # type: ignore[attr-defined]


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    modules = {item.module.__name__: item.module for item in session.items}  # type: ignore[attr-defined]
    for module in modules.values():
        if hasattr(module, "compile_all"):
            module.COMPILED = Compilation(module)
            if _WORKER in (None, "gw0"):
                _BESIDE.submit(module.COMPILED.result)
