"""The Triton kernels compiled ahead of time, without a GPU: none spills, memory moves in whole vectors."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import frd_kernels

SCRIPT = pathlib.Path(__file__).with_name("triton_aot.py")
# Bytes that a block of threads can have at most.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]


def _compile(architecture: int) -> list[dict[str, Any]]:
    # An interpreted function cannot be compiled; the variable has to be gone before triton is imported.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(pathlib.Path(frd_kernels.__file__).parents[1])  # the package under test
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--arch", str(architecture)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def compile_all() -> list[dict[str, Any]]:
    """What every launch of `triton_aot.launches` compiles to, on every architecture; tests/conftest.py runs it beside
    the other tests."""
    if importlib.util.find_spec("triton") is None:
        return []
    return [row for architecture in SHARED_MEMORY for row in _compile(architecture)]


COMPILED: Any = None  # the Future of it


@pytest.fixture
def kernels() -> list[dict[str, Any]]:
    return COMPILED.result()


@pytest.mark.timeout(1800)
def test_nothing_spills(kernels: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in kernels} == set(SHARED_MEMORY)
    spilled = [row for row in kernels if row["stack"] or row["local"] or row["ldl"] or row["stl"]]
    assert not spilled


@pytest.mark.timeout(1800)
def test_shared_memory_fits(kernels: list[dict[str, Any]]) -> None:
    assert not [row for row in kernels if row["shared"] > SHARED_MEMORY[row["arch"]]]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_stencils_read_and_write_whole_vectors(kernels: list[dict[str, Any]], layout: str) -> None:
    """16 bytes at a time, in each of the four rows of a loop."""
    walks = [
        row
        for row in kernels
        if row["kernel"] == "rows_forward" and layout in row["launch"] and "ragged" not in row["launch"]
    ]
    assert {row["arch"] for row in walks} == {80, 90}
    assert not [row for row in walks if row["ldg_128"] < 4 or row["stg_128"] < 4]


@pytest.mark.timeout(1800)
def test_products_run_on_tensor_cores(kernels: list[dict[str, Any]]) -> None:
    products: dict[tuple[str, int], int] = {}
    for row in kernels:
        if row["launch"].split()[0] in ("block", "icm", "cluster"):
            key = row["launch"], row["arch"]
            products[key] = products.get(key, 0) + row["hmma"] + row["hgmma"] + row["utcmma"]
    assert {arch for _, arch in products} == set(SHARED_MEMORY)
    assert all(products.values()), products
