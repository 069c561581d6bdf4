"""What has to be set before anything imports frd_kernels; compilations that run beside the tests."""

from __future__ import annotations

import concurrent.futures
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the Triton kernels then compute on the CPU

# One worker: most tests keep one core busy, and machines with two are common.
_BESIDE = concurrent.futures.ThreadPoolExecutor(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of modules with a `compile_all` last: they wait for what it gives."""
    items.sort(key=lambda item: hasattr(item.module, "compile_all"))  # type: ignore[attr-defined]


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    modules = {item.module.__name__: item.module for item in session.items}  # type: ignore[attr-defined]
    for module in modules.values():
        if hasattr(module, "compile_all"):
            module.COMPILED = _BESIDE.submit(module.compile_all)
