"""The `frd` command. Exit status: 0 done, 1 the work failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from frd_model.output import one_line, say

from .arguments import UsageError, path

# Each module offers add_arguments(parser) and run(args) -> exit status. It is imported only when its command is
# the one asked for, so that `frd --help` needs neither torch nor OpenCV.
COMMANDS: dict[str, tuple[str, str]] = {
    "predict": ("frd_model.cli.predict", "find the edited pixels of photos"),
    "inspect": ("frd_model.cli.inspect", "print what the files of photos say of their origin"),
    "web": ("frd_model.cli.web", "open a page that finds the edited pixels of photos, for the browser"),
    "report": ("frd_model.cli.report", "make one HTML page of the results of `frd predict`"),
    "train": ("frd_model.cli.train", "train a network from a configuration file"),
    "evaluate": (
        "frd_model.cli.evaluate",
        "score a checkpoint, or saved maps of any method, on images with known masks",
    ),
    "calibrate": (
        "frd_model.cli.calibrate",
        "choose a checkpoint's score and thresholds on photos with known masks",
    ),
    "table1": ("frd_model.cli.table1", "put results of `frd evaluate` into the paper's Table 1"),
    "robustness": (
        "frd_model.cli.robustness",
        "score a checkpoint on distorted photos, as in the paper's Figure 3",
    ),
    "ablate": ("frd_model.cli.ablate", "train and evaluate the six rows of the paper's Table 3"),
    "complexity": (
        "frd_model.cli.complexity",
        "parameters, multiply-accumulates, memory and time of a net, as in the paper's Table 2",
    ),
    "export": (
        "frd_model.cli.export",
        "write a checkpoint as ONNX, OpenVINO or a program of torch, run it and compare",
    ),
    "forge": ("frd_model.cli.forge", "make forged images with masks from authentic photos"),
    "data": ("frd_model.cli.data", "check data sets before a training run, and convert them"),
}

# Shown by `frd COMMAND --help`.
EXAMPLES = {
    "predict": "frd predict photo.jpg --out results",
    "inspect": "frd inspect photo.jpg",
    "web": "frd web",
    "report": "frd report results --out report.html",
    "train": "frd train --images data/images --masks data/masks --output runs/mine",
    "evaluate": "frd evaluate --images test/images --masks test/masks --checkpoint best.safetensors",
    "calibrate": "frd calibrate --images photos --masks masks --checkpoint best.safetensors --out mine.safetensors",
    "table1": "frd table1 casia.json nist16.json --out table1.md",
    "robustness": "frd robustness --sample heldout --out robustness",
    "ablate": "frd ablate --sample heldout --out ablation",
    "complexity": "frd complexity --model frdnet_mit_b2",
    "export": "frd export demo --out demo.onnx",
    "forge": "frd forge photos --out forged --count 100",
    "data": "frd data check --images data/images --masks data/masks",
}

# Commands of frd_kernels that parse their own arguments: main(argv) -> exit status.
PASSED_ON: dict[str, tuple[str, str]] = {
    "bench": (
        "frd_model.cli.bench",
        "measure the engines of `frd predict` (frd bench predict), and in a source checkout the kernels",
    ),
    "info": ("frd_kernels.info", "print versions, backends and build facts"),
}

# Errors of these types are defects of the code rather than of its input, and keep their traceback.
DEFECTS = (AssertionError, AttributeError, LookupError, NameError)


class Parser(argparse.ArgumentParser):
    """Reports usage errors in one line and expands `~` in arguments of type Path, as do its sub-parsers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, path)

    def error(self, message: str) -> NoReturn:
        # argparse shows the name of a type's function, which may be private.
        text = re.sub(r"\binvalid _+(\w+) value", r"invalid \1 value", " ".join(message.split()))
        self.exit(2, f"{self.prog}: {text} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Usage errors leave through SystemExit(2), as argparse does."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in PASSED_ON:
        passed_on = importlib.import_module(PASSED_ON[arguments[0]][0])
        return _until_stopped(lambda: passed_on.main(arguments[1:]) or 0)
    parser = Parser(
        prog="frd",
        description="Find what was edited in a photo: FRD-Net on fused pixel-difference and clustering kernels.",
        epilog="`frd COMMAND --help` explains one command. Exit status: 0 done, 1 the work failed, 2 usage.",
    )
    parser.add_argument("--version", action="version", version=f"frd {_version()}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen: Any = None
    for name, (module, summary) in (COMMANDS | PASSED_ON).items():
        about = f"{summary[0].upper()}{summary[1:]}."
        example = f" Example: {EXAMPLES[name]}" if name in EXAMPLES else ""
        sub = subparsers.add_parser(name, help=summary, description=about + example)
        if name in arguments[:1]:
            chosen = importlib.import_module(module)
            chosen.add_arguments(sub)
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    return _run(chosen, parser.parse_args(arguments))


def _version() -> str:
    try:
        return importlib.metadata.version("frd-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "(a source tree that is not installed)"


def _run(module: Any, args: argparse.Namespace) -> int:
    # Pillow warns about unusual files; those that cannot be used raise an error.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return _until_stopped(lambda: _work(module, args))


def _work(module: Any, args: argparse.Namespace) -> int:
    """Run a command; an error other than DEFECTS becomes one line on stderr and status 1, or 2 for wrong usage."""
    try:
        status: int = module.run(args)
        _flush()
    except (BrokenPipeError, *DEFECTS):
        raise
    except Exception as error:
        say(f"frd {args.command}: {one_line(error)}", sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return status


def _until_stopped(work: Callable[[], int]) -> int:
    """The status of `work`, also if Ctrl+C or the reader of its output ends it."""
    try:
        status = work()
        _flush()
    except KeyboardInterrupt:
        print("frd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (such as `| head`) is gone: nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _flush() -> None:
    # None if the caller has closed it (`>&-`).
    if sys.stdout is not None:
        sys.stdout.flush()
