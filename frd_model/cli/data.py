"""The `frd data check` command: what in a data set cannot be used or looks wrong."""

from __future__ import annotations

import argparse
import sys

from frd_model.output import say

from .arguments import UsageError, add_data_arguments, open_data_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of `frd data`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="pairing by name, sizes, empty and inverted masks, duplicates")
    add_data_arguments(check)
    check.add_argument("--allow-authentic", action="store_true", help="photos without a mask are untouched")


def run(args: argparse.Namespace) -> int:
    """`frd data check`: status 0 without a finding, 1 with one, 2 for bad usage."""
    try:
        sets = open_data_arguments(args, allow_authentic=args.allow_authentic)
    except (ValueError, OSError) as error:
        say(f"frd data check: {error}", sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    faults = 0
    for name, data in sets.items():
        report = data.inspect()
        faults += len(report.faults)
        if len(sets) > 1:
            say(f"{name}:")
        for line in (*report.faults, *(f"note: {note}" for note in report.notes)):
            say(line)
        say(f"{len(data)} photos, {report.untouched} of them untouched, {len(report.faults)} findings")
    return 1 if faults else 0
