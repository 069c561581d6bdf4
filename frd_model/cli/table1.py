"""`frd table1`: the paper's Table 1 with additional rows, from result files of `frd evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from frd_model.output import check_output_file

from .arguments import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Result files and the output."""
    parser.add_argument(
        "results",
        nargs="+",
        metavar="[SET=]FILE",
        help="a JSON file of `frd evaluate --json-out`; SET names its column (Columbia, COVER, CASIAv1, NIST16, "
        "COCOglide, or any other name) if the file does not",
    )
    parser.add_argument("--out", type=path, metavar="FILE", help="write the Markdown there, not to stdout")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE of --out")


def run(args: argparse.Namespace) -> int:
    """Print or write the table."""
    from frd_model.data.images import write_bytes
    from frd_model.evaluate_table import table1

    results = [_named(result) for result in args.results]
    if args.out is not None:
        if args.out.resolve() in (file.resolve() for _, file in results):
            raise ValueError(f"--out must be another file than the results, got {str(args.out)!r}")
        check_output_file("--out", args.out, overwrite=args.overwrite)
    text = table1(results).markdown()
    if args.out is None:
        print(text, end="")
    else:
        write_bytes(args.out, text.encode(errors="surrogateescape"))
    return 0


def _named(text: str) -> tuple[str | None, Path]:
    """SET=FILE as its two parts; a file whose name holds a = is one where it exists."""
    name, sign, file = text.partition("=")
    return (name, path(file)) if sign and name and file and not Path(text).exists() else (None, path(text))
