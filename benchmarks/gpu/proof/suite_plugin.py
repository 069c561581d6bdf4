"""A plugin of pytest: runs the kernels' tests that use a GPU, the urgent ones first, each outcome at once on disk.

    python -m pytest -p benchmarks.gpu.proof.suite_plugin --suite-plan FILE tests/kernels

`benchmarks.gpu.proof.suite` writes the plan and reads the outcomes. Imports neither torch nor frd_kernels:
tests/conftest.py sets what these read when they are imported.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

MESSAGE = 2000  # characters of a failure that are kept
SPOILED = 3  # exit status: the GPU's state is lost to this process
CUDA_ERROR = re.compile(r"CUDA (driver )?error|AcceleratorError|Triton Error \[CUDA\]")
COLLECTION = "collection"  # stands for the backend of a file that cannot be imported
COLLECTED = "collected.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite-plan", help="JSON file: which cases, in which order, until when")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--suite-plan")
    if path:
        config.pluginmanager.register(Suite(json.loads(pathlib.Path(path).read_text())))


def chosen(backends: dict[str, str], plan: dict[str, Any]) -> list[str]:
    """Node ids in the order to run: what failed last, then CUDA, then the plan's share of Triton's cases.

    `backends` has the backend of every case, in the order of collection: the share is counted over all of Triton's.
    """
    part, parts = plan["share"]
    triton = [case for case, backend in backends.items() if backend == "triton"]
    others = [case for case, backend in backends.items() if backend != "triton"]
    first = [case for case in plan["first"] if case in backends]
    order = dict.fromkeys([*first, *others, *triton[part - 1 :: parts]])
    done = set(plan["done"])
    return [case for case in order if case not in done and plan["only"] in case]


def backend_and_op(item: pytest.Item, cuda: str) -> tuple[str, str]:
    """('', op) where the case runs on no GPU. `cuda` is what that backend is called here.

    A test without the parameter `backend` has another one that names backends, or has one in its own or its file's
    name. One of both counts as Triton's, which takes longer.
    """
    module: Any = getattr(item, "module", None)
    words = item.path.stem.split("_") + getattr(item, "originalname", "").split("_")
    op = getattr(module, "OP", "") or item.path.stem.split("_")[1]
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if "backend" in parameters:
        named = [parameters["backend"]]
    else:
        named = [value for value in parameters.values() if isinstance(value, str)]
        named += [{"cuda": cuda}.get(word, word) for word in words]
    return next((name for name in ("triton", cuda) if name in named), ""), op


def gpu_fault() -> str:
    """What the GPU answers when the work under way ends; '' where all is well or torch has not used one."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def messages(error: BaseException | None) -> Iterator[str]:
    """Of the error and of those that led to it."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__


def reason(report: pytest.TestReport) -> str:
    """Where a phase of a case failed or was left, and why."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        text = f"{crash.message} ({os.path.basename(crash.path)}:{crash.lineno})"
    elif isinstance(report.longrepr, tuple):
        text = report.longrepr[2]
    else:
        text = str(report.longrepr)
    return text if report.when == "call" else f"{report.when}: {text}"


class Suite:
    """In a worker of pytest-xdist, in its controller, or in pytest's only process."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.folder = pathlib.Path(plan["outcomes"])
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        self.file = (self.folder / f"{worker}-{os.getpid()}.jsonl").open("a", encoding="utf-8")
        self.cases: dict[str, tuple[str, str]] = {}
        self.case: dict[str, Any] | None = None  # the outcome so far of the one that runs
        self.spoiled = False

    def write(self, **line: Any) -> None:
        print(json.dumps(line), file=self.file, flush=True)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Behind the conftest files, which thin out and sort."""
        by_id = {item.nodeid: item for item in items}
        found = {case: backend_and_op(item, self.plan["cuda"]) for case, item in by_id.items()}
        order = chosen({case: backend for case, (backend, _op) in found.items() if backend}, self.plan)
        self.cases = {case: found[case] for case in order}
        draft = self.folder / f"{COLLECTED}.{os.getpid()}"
        draft.write_text(json.dumps(self.cases))
        draft.replace(self.folder / COLLECTED)  # the same from every process
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.cases])
        items[:] = [by_id[case] for case in order]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            message = str(report.longrepr)[-MESSAGE:]
            self._outcome(report.nodeid, COLLECTION, "", {"outcome": "failed", "message": message})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Passes over what is left when the time is up."""
        if time.time() > self.plan["deadline"]:
            return True
        self.case = {"outcome": "passed", "seconds": 0.0, "message": ""}
        self.write(start=item.nodeid)
        return None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        """A case whose kernels went astray fails, though its checks may have seen nothing yet."""
        report: pytest.TestReport = yield
        fault = gpu_fault() if call.when == "call" else ""
        if fault and not report.failed:
            report.outcome, report.longrepr = "failed", fault
        error = call.excinfo.value if call.excinfo and report.failed else None
        self.spoiled |= bool(fault) or any(map(CUDA_ERROR.search, messages(error)))
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Ends this process behind a CUDA error, after xdist has told its controller, which replaces it."""
        case = self.case
        if case is None:  # the controller hears of its workers' cases as well
            return
        case["seconds"] += report.duration
        if report.failed or (report.skipped and case["outcome"] == "passed"):
            case["outcome"] = report.outcome
            case["message"] = "\n".join(filter(None, (case["message"], reason(report))))[:MESSAGE]
        if report.when == "teardown" or self.spoiled:
            self.case = None
            self._outcome(report.nodeid, *self.cases[report.nodeid], case)
        if self.spoiled:
            os._exit(SPOILED)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str) -> None:
        """In the controller: a worker has gone. Only the parent knows whether it had said why."""
        self.write(lost=crashitem)

    def _outcome(self, case: str, backend: str, op: str, outcome: dict[str, Any]) -> None:
        self.write(id=case, backend=backend, op=op, **outcome)
