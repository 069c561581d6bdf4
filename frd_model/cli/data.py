"""The `frd data check` command: what in a data set cannot be used or looks wrong."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from frd_model import data
from frd_model.output import say

if TYPE_CHECKING:
    from frd_model.data import PairDataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of `frd data`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="pairing by name, sizes, empty and inverted masks, duplicates")
    which = check.add_mutually_exclusive_group(required=True)
    which.add_argument("--images", metavar="DIR", help="folder of photos; needs --masks")
    which.add_argument("--json", metavar="FILE", help='list of [image, mask or "Negative"]')
    which.add_argument("--mani", metavar="DIR", help="folder with Tp (photos) and Gt (masks)")
    check.add_argument("--masks", metavar="DIR", help="folder of masks, paired with the photos by name")
    check.add_argument("--recursive", action="store_true", help="read the folders inside the two as well")
    check.add_argument("--allow-authentic", action="store_true", help="photos without a mask are untouched")
    check.add_argument("--invert-masks", action="store_true", help="the masks are black where edited")


def run(args: argparse.Namespace) -> int:
    """`frd data check`: status 0 without a finding, 1 with one, 2 for bad usage."""
    if (args.images is None) != (args.masks is None):
        say("frd data check: --images and --masks go together", sys.stderr)
        return 2
    if args.recursive and args.json is not None:
        say("frd data check: --recursive goes with folders, got --json", sys.stderr)
        return 2
    try:
        dataset = _open(args)
    except (ValueError, OSError) as error:
        say(f"frd data check: {error}", sys.stderr)
        return 1
    report = dataset.inspect()
    for line in (*report.faults, *(f"note: {note}" for note in report.notes)):
        say(line)
    say(f"{len(dataset)} photos, {report.untouched} of them untouched, {len(report.faults)} findings")
    return 1 if report.faults else 0


def _open(args: argparse.Namespace) -> PairDataset:
    invert, recursive = args.invert_masks, args.recursive
    if args.json is not None:
        return data.JsonDataset(args.json, invert_masks=invert)
    if args.mani is not None:
        return data.ManiDataset(args.mani, invert_masks=invert, recursive=recursive)
    return data.FolderDataset(
        args.images,
        args.masks,
        allow_authentic=args.allow_authentic,
        invert_masks=invert,
        recursive=recursive,
    )
