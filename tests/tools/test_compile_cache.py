"""torch.compile's caches on disk, after an upgrade of the package that changed what an operator returns."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest
from torch.compiler import config

import frd_kernels
from frd_kernels import _compile_cache

PACKAGE = pathlib.Path(frd_kernels.__file__).parent
# The other version: its fake makes `saved` longer than the operator does.
OTHER_FAKE = """

_right = saved_size


def saved_size(*sizes):
    return _right(*sizes) + 1
"""
PROGRAM = """
import threading
import torch
import frd_kernels
from torch._dynamo.utils import counters

x, gate = torch.randn(2, 25, 4), torch.ones(1)

@torch.compile(fullgraph=True)
def saved(x):
    return torch.ops.frd.cluster(x, x, None, gate, gate, [2, 2], [5, 5], 0)[-1]

def run():
    torch.compiler.reset()
    counters.clear()
    try:
        saved(x)
        outcome = "right"
    except AssertionError as error:
        outcome = "wrong size" if "incorrect fake" in str(error) else repr(error)
    print(outcome, counters["inductor"]["fxgraph_cache_hit"])

run()
other = threading.Thread(target=run)
other.start()
other.join()
"""


def test_fingerprint_tells_versions_apart(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "one" / "inner" / "ops.py"
    source.parent.mkdir(parents=True)
    source.write_text("size = 2\n")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    prints = [_compile_cache.fingerprint(tmp_path / name) for name in ("one", "two")]
    source.write_text("size = 3\n")
    prints.append(_compile_cache.fingerprint(tmp_path / "one"))
    source.rename(source.with_name("fakes.py"))
    prints.append(_compile_cache.fingerprint(tmp_path / "one"))
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_keeps_the_tag_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    tag = _compile_cache.fingerprint(PACKAGE)
    assert tag in config.cache_key_tag.split()
    monkeypatch.setattr(config, "cache_key_tag", "mine")
    _compile_cache.add_to_keys(tag)
    _compile_cache.add_to_keys(tag)
    assert config.cache_key_tag == f"mine {tag}"
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(config.cache_key_tag))
    thread.start()
    thread.join()
    assert seen[0].split().count(tag) == 1


def outcomes(root: pathlib.Path, cache: pathlib.Path) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(root), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.build
def test_another_version_compiles_anew(tmp_path: pathlib.Path) -> None:
    """And the same version does not, in whatever thread."""
    other, cache = tmp_path / "other", tmp_path / "cache"
    libraries = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, other / PACKAGE.name, ignore=libraries)
    for library in PACKAGE.glob("*.so"):
        (other / PACKAGE.name / library.name).symlink_to(library)
    with (other / PACKAGE.name / "cluster" / "saved.py").open("a") as layout:
        layout.write(OTHER_FAKE)
    assert outcomes(other, cache) == ["wrong size 0", "wrong size 1"]
    assert outcomes(PACKAGE.parent, cache) == ["right 0", "right 1"]


@pytest.mark.parametrize("known", ["", "mine", "mine frd_kernels-0"])
def test_tag_is_appended_once(known: str) -> None:
    assert _compile_cache._joined(known, "frd_kernels-0").split().count("frd_kernels-0") == 1
