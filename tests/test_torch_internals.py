"""The names that torch does not document: used in one module only, and there in the torch that is installed."""

from __future__ import annotations

import ast
import functools
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import frd_kernels as fk
from frd_kernels import _torch_internals

PACKAGE = pathlib.Path(fk.__file__).parent
INTERNALS = pathlib.Path(_torch_internals.__file__)
# Documented, in spite of the underscore: see "Python Custom Operators" in torch's documentation.
DOCUMENTED = {"torch._check"}
# What subclasses of nn.Module override or read of themselves.
MODULE_ATTRIBUTES = ("_modules", "_parameters", "_compiled_call_impl", "_load_from_state_dict")


def private_chains(source: pathlib.Path) -> Iterator[str]:
    """Dotted names such as `torch._C._get_tracing_state` that start at an import from torch, as torch spells them."""
    tree = ast.parse(source.read_text())
    roots: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {
                a.asname or "torch": a.name if a.asname else "torch" for a in node.names if is_torch(a.name)
            }
        elif isinstance(node, ast.ImportFrom) and not node.level and is_torch(node.module or ""):
            roots |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    chains = set(roots.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, dot, rest = ast.unparse(node).partition(".")
            if root in roots and rest.replace(".", "").isidentifier():
                chains.add(f"{roots[root]}{dot}{rest}")
    for chain in sorted(chains):
        if any(part.startswith("_") and not part.startswith("__") for part in chain.split(".")):
            yield chain


def is_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"


def resolve(chain: str) -> object:
    """The object behind `torch.a._b`; its modules are imported by the package already. Raises AttributeError."""
    return functools.reduce(getattr, chain.split(".")[1:], torch)


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != INTERNALS)
CHAINS = list(private_chains(INTERNALS))


@pytest.mark.parametrize("chain", CHAINS)
def test_exists_in_this_torch(chain: str) -> None:
    assert resolve(chain) is not None


def test_the_search_finds_names() -> None:
    expected = {
        "torch._C._AutoDispatchBelowAutograd",
        "torch._subclasses.fake_tensor.FakeTensor",
        "torch.utils._pytree",
    }
    assert expected <= set(CHAINS)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_module_uses_one(source: pathlib.Path) -> None:
    assert set(private_chains(source)) <= DOCUMENTED


def test_a_torch_without_one_is_named() -> None:
    """The import fails at first use of the package, and `frd info` still prints."""
    script = (
        "import torch, sys; del torch._C._len_torch_dispatch_stack; import frd_kernels.info as info; "
        "info.main([]); import frd_kernels; frd_kernels.pdc2d"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    reason = f"torch {torch.__version__} lacks a name that torch 2.11 to 2.14 have"
    assert reason in done.stdout
    assert done.returncode == 1 and reason in done.stderr.splitlines()[-1]


def test_modules_have_the_attributes_that_are_read() -> None:
    module = nn.Conv2d(1, 1, 1)
    for name in (*_torch_internals.HOOK_ATTRIBUTES, *MODULE_ATTRIBUTES, "_conv_forward"):
        assert hasattr(module, name), name


def test_hooks_of_all_modules_are_seen() -> None:
    """torch registers them in the very tables that the package looks at."""
    assert not any(_torch_internals.GLOBAL_HOOKS)
    register = (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    )
    for function, table in zip(register, _torch_internals.GLOBAL_HOOKS, strict=True):
        handle = function(lambda *_: None)
        assert len(table) == 1 and sum(map(len, _torch_internals.GLOBAL_HOOKS)) == 1
        handle.remove()


def test_changes_in_place_are_counted() -> None:
    tensor = torch.zeros(1)
    before = _torch_internals.version_of(tensor)
    tensor.add_(1)
    assert _torch_internals.version_of(tensor) == before + 1
