"""`frd data check` and `frd data convert`: audit data sets, and write them in another form."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frd_model.output import check_output_file, check_output_folder, say

from .arguments import UsageError, add_data_arguments, at_least, open_data_arguments, path

if TYPE_CHECKING:
    from frd_model.data.audit import Audit
    from frd_model.data.dataset import PairDataset

SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of `frd data`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    about = "missing and unreadable files, sizes, masks, duplicates, photos shared with test sets"
    check = actions.add_parser(
        "check", help=about, description=f"Report {about}. Status 1 where there are any."
    )
    add_data_arguments(check)
    check.add_argument("--allow-authentic", action="store_true", help="photos without a mask are untouched")
    check.add_argument(
        "--against",
        action="append",
        metavar="[NAME=]LAYOUT:PATH",
        help="a test set: photos that look like one of its photos are a fault (extra `audit`); may be repeated",
    )
    check.add_argument("--all", action="store_true", help=f"list every finding, not {SHOWN} of a kind")
    check.add_argument("--workers", type=at_least(1), default=4, help="threads that read files (default 4)")
    check.add_argument("--json-out", type=path, metavar="FILE", help="write every finding")
    check.add_argument("--overwrite", action="store_true", help="replace FILE of --json-out")
    about = "write data sets as Tp and Gt, as a JSON list, or decoded"
    convert = actions.add_parser("convert", help=about, description=f"{about.capitalize()}.")
    add_data_arguments(convert)
    convert.add_argument(
        "--to",
        choices=("mani", "json", "cache"),
        default="mani",
        help="mani: PNG files in OUT/Tp and OUT/Gt (default); json: the list OUT of the files where they are; cache: "
        "decoded photos, which `--data cache:OUT` reads without decoding",
    )
    convert.add_argument(
        "--out", type=path, required=True, metavar="OUT", help="a new folder, or file for json"
    )
    sides = convert.add_mutually_exclusive_group()
    sides.add_argument("--resize", type=at_least(1), metavar="N", help="squash every photo to N x N pixels")
    sides.add_argument(
        "--longest", type=at_least(1), metavar="N", help="reduce photos to a longer side of N pixels"
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace an earlier conversion of the same data in OUT"
    )


def run(args: argparse.Namespace) -> int:
    """Status 0 without a fault, 1 with one, 2 for bad usage."""
    try:
        strict = args.action == "check" and not args.allow_authentic
        sets = open_data_arguments(args, allow_authentic=not strict)
        if args.action == "check" and args.json_out is not None:
            check_output_file("--json-out", args.json_out, overwrite=args.overwrite)
        return _check(args, sets) if args.action == "check" else _convert(args, sets)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        say(f"frd data {args.action}: {error}", sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _bar(items: Iterable[Any], total: int) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, total=total, disable=None)


def _check(args: argparse.Namespace, sets: dict[str, PairDataset]) -> int:
    from frd_model.data.audit import audit, audit_against
    from frd_model.data.sets import open_sets, parse_spec

    layouts = {
        name: layout for name, layout, _ in map(parse_spec, [*(args.data or ()), *(args.against or ())])
    }
    if args.against:
        tests = open_sets(args.against)
        both = sorted(sets.keys() & tests.keys())
        if both:
            raise UsageError(
                f"--against must name sets unlike those to check, got {both[0]!r}; write NAME=LAYOUT:PATH"
            )
        audits = audit_against(sets, tests, layouts=layouts, workers=args.workers, progress=_bar)
    else:
        audits = {
            name: audit(data, layout=layouts.get(name, ""), workers=args.workers, progress=_bar)
            for name, data in sets.items()
        }
    for name, found in audits.items():
        if len(audits) > 1:
            say(f"{name}:")
        _print(found, None if args.all else SHOWN)
    if len(audits) > 1:
        print(_table(audits))
    if args.json_out is not None:
        from frd_model.data.images import write_json

        write_json(args.json_out, {name: found.to_dict() for name, found in audits.items()})
    return 1 if any(found.faults for found in audits.values()) else 0


def _print(found: Audit, limit: int | None) -> None:
    from frd_model.data.audit import FAULTS, NOTES

    for kind in (*FAULTS, *NOTES):
        texts = [finding.text for finding in found.findings if finding.kind == kind]
        for text in texts[:limit]:
            say(text if kind in FAULTS else f"note: {text}")
        if limit is not None and len(texts) > limit:
            say(f"... and {len(texts) - limit} more of this kind ({kind}); --all lists them")
    say(f"{found.photos} photos, {found.untouched} of them untouched, {len(found.faults)} findings")


def _table(audits: dict[str, Audit]) -> str:
    """Numbers by set and kind of fault; kinds of which there is none are left out."""
    from frd_model.data.audit import FAULTS

    counts = {name: found.to_dict()["counts"] for name, found in audits.items()}
    kinds = [kind for kind in FAULTS if any(kind in count for count in counts.values())]
    width = max(map(len, audits))
    lines = [" ".join([" " * width, "photos", "untouched", *kinds])]
    for name, found in audits.items():
        cells = [f"{found.photos:>6}", f"{found.untouched:>9}"]
        cells += [f"{counts[name].get(kind, 0):>{len(kind)}}" for kind in kinds]
        lines.append(" ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def _convert(args: argparse.Namespace, sets: dict[str, PairDataset]) -> int:
    from frd_model.data.convert import convert
    from frd_model.data.sets import join_sets

    if args.to == "json":
        check_output_file("--out", args.out, overwrite=args.overwrite)
    else:
        _check_folder(args.out, overwrite=args.overwrite)
    size = None if args.resize is None else (args.resize, args.resize)
    done = convert(join_sets(sets), args.out, args.to, size=size, longest=args.longest, progress=_bar)
    for text in done.failed:
        say(f"frd data convert: {text}", sys.stderr)
    say(f"{done.written} photos written to {args.out}, {len(done.failed)} left out")
    return 1 if done.failed or not done.written else 0


def _check_folder(out: Path, *, overwrite: bool) -> None:
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"--out must be a new or an empty folder, got {str(out)!r}; --overwrite writes into it"
        )
    check_output_folder("--out", out)
