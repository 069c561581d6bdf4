"""The `frd` command. Exit status: 0 done, 1 the work failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

# Each module offers add_arguments(parser) and run(args) -> exit status. It is imported only when its command is
# the one asked for, so that `frd --help` needs neither torch nor OpenCV.
COMMANDS: dict[str, tuple[str, str]] = {
    "predict": ("frd_model.predict_command", "find the edited pixels of photos"),
    "train": ("frd_model.train_command", "train a network from a configuration file"),
    "evaluate": ("frd_model.evaluate", "score a checkpoint on images with known masks"),
    "forge": ("frd_model.data.forge_cli", "make forged images with masks from authentic photos"),
    "data": ("frd_model.data.check_cli", "check a data set before a training run"),
}

# Commands of frd_kernels that parse their own arguments: main(argv) -> exit status.
PASSED_ON: dict[str, tuple[str, str]] = {
    "bench": ("frd_kernels.benchmarks.main", "measure the kernels against plain PyTorch"),
    "info": ("frd_kernels.info", "print versions, backends and build facts"),
}


class _Parser(argparse.ArgumentParser):
    """Says a wrong usage in one line, without the list of all flags; its sub-parsers are of the same class."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Usage errors leave through SystemExit(2), as argparse does."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in PASSED_ON:
        status: int | None = importlib.import_module(PASSED_ON[arguments[0]][0]).main(arguments[1:])
        return status or 0
    parser = _Parser(
        prog="frd",
        description="Find what was edited in a photo: FRD-Net on fused pixel-difference and clustering kernels.",
        epilog="`frd COMMAND --help` explains one command. Exit status: 0 done, 1 the work failed, 2 usage.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen: Any = None
    for name, (path, summary) in (COMMANDS | PASSED_ON).items():
        sub = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if arguments and name == arguments[0]:
            chosen = importlib.import_module(path)
            chosen.add_arguments(sub)
    return _run(chosen, parser.parse_args(arguments))


def _run(module: Any, args: argparse.Namespace) -> int:
    try:
        status: int = module.run(args)
    except KeyboardInterrupt:
        print("frd: interrupted", file=sys.stderr)
        return 130
    # What the work may raise on bad input, as one line; anything else is a defect and keeps its traceback.
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"frd {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
