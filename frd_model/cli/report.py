"""`frd report`: one HTML page of the results of `frd predict`."""

from __future__ import annotations

import argparse
import sys

from frd_model.output import check_output_file, say

from .arguments import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="DIR", help="results of `frd predict`")
    parser.add_argument(
        "--out", type=path, required=True, metavar="FILE", help="the page, such as report.html"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def run(args: argparse.Namespace) -> int:
    """Write the page. A photo whose results cannot be read is named and left out; the status is then 1."""
    from frd_model.report import write_report

    check_output_file("--out", args.out, overwrite=args.overwrite)
    shown, failed = write_report(args.folder, args.out)
    for name, reason in failed:
        say(f"frd report: {name}: {reason}", sys.stderr)
    say(f"{shown} photos in {args.out}")
    return 1 if failed else 0
