"""Starts modules of this package as processes of their own. Imports neither torch nor frd_kernels."""

from __future__ import annotations

import pathlib
import sys

PACKAGE = __package__ or "benchmarks"
# The folder that this package is imported from: site-packages once it is installed, else the tree.
HOME = pathlib.Path(__file__).resolve().parents[PACKAGE.count(".") + 1]


def module_command(name: str) -> list[str]:
    """As `python -m PACKAGE.name`, which would look into the current folder first: there may be a source tree that
    holds frd_kernels without this package."""
    call = f"runpy.run_module({f'{PACKAGE}.{name}'!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", f"import runpy, sys; sys.path[0] = {str(HOME)!r}; {call}"]
