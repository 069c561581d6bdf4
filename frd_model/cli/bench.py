"""`frd bench`: the engines of `frd predict`, and `benchmarks/` of a source checkout, which is not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from frd_model.output import one_line, say

from . import bench_predict

NAME = "benchmarks"


def checkout() -> Path | None:
    """The source checkout of the current folder, or else of this package."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / NAME / "__main__.py").is_file() and (folder / "csrc" / "register.cpp").is_file():
            return folder
    return None


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 2 for benchmarks of a checkout outside of one."""
    if argv[:1] == ["predict"]:
        return _predict(argv[1:])
    root = checkout()
    if root is None:
        print(
            "frd bench: works in a source checkout of frd_kernels: cd there, or run `python -m benchmarks`",
            file=sys.stderr,
        )
        return 2
    if NAME not in sys.modules:
        # By its path: on sys.path the checkout would shadow the installed packages.
        spec = importlib.util.spec_from_file_location(
            NAME, root / NAME / "__init__.py", submodule_search_locations=[str(root / NAME)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    status: int = importlib.import_module(f"{NAME}.__main__").main(list(argv))
    return status


def _predict(argv: Sequence[str]) -> int:
    from . import Parser

    parser = Parser(
        prog="frd bench predict",
        description="Check every engine and precision of `frd predict` against PyTorch in float32, and time them.",
    )
    bench_predict.add_arguments(parser)
    try:
        return bench_predict.run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        say(f"frd bench predict: {one_line(error)}", sys.stderr)
        return 1
