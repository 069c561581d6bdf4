"""`frd predict`: find the edited pixels of photos and write masks, overlays and scores."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from frd_model.output import check_output_folder, one_line, say
from frd_model.results import COLOUR_MAPS, DEFAULT_KINDS, KINDS, Job, save_prediction
from frd_model.tiling import OVERLAP, POLICIES, TILE

from .arguments import (
    Checkpoint,
    UsageError,
    add_checkpoint_argument,
    add_device_argument,
    add_engine_arguments,
    at_least,
    check_output_files,
    fraction,
    open_checkpoint,
    path,
    prepared,
    runs_in,
)
from .predict_jobs import (
    STANDARD_INPUT,
    Collected,
    Shard,
    begin,
    collect,
    is_done,
    listed_names,
    refuse_to_destroy,
    refuse_to_overwrite,
    remove,
    shard,
    shard_of_process,
)

if TYPE_CHECKING:
    from frd_model.pipeline import Content
    from frd_model.predict import Prediction
    from frd_model.score import ScoreRule

# Of --csv; what a photo has no value for stays empty.
COLUMNS = (
    *("path", "name", "score", "verdict", "false_alarm_rate", "edited_fraction", "raw_edited_fraction"),
    *("width", "height", "threshold", "seconds", "error"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="photo, directory of photos, or glob pattern; - is a photo at standard input",
    )
    parser.add_argument(
        "--from-file",
        metavar="FILE",
        help="read more PATHs from a file, one a line, or ended by NUL as `find -print0` does; - is standard input",
    )
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="where to write the results")
    parser.add_argument(
        "--save",
        type=kinds,
        metavar="KINDS",
        help=f"what to write beside the JSON file, separated by commas: {', '.join(KINDS)} (alone: nothing else) "
        f"(default {','.join(DEFAULT_KINDS)}, and map with --report)",
    )
    parser.add_argument(
        "--colour-map",
        choices=COLOUR_MAPS,
        default=COLOUR_MAPS[0],
        help=f"of overlay and sheet (default {COLOUR_MAPS[0]})",
    )
    parser.add_argument(
        "--recursive", action="store_true", help="read the directories inside directories too"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace results that are in DIR already")
    again.add_argument(
        "--skip-existing",
        action="store_true",
        help="go on with a folder: skip the photos whose results are in DIR already",
    )
    # Its former name.
    again.add_argument("--resume", action="store_true", dest="skip_existing", help=argparse.SUPPRESS)
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--threshold",
        type=fraction,
        help="a pixel above it counts as edited (default: the checkpoint's, 0.5 where `frd calibrate` has set none)",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="mark pixels and show the heat map where the verdict is `no trace found` too",
    )
    add_device_argument(parser, "auto")
    add_engine_arguments(parser)
    parser.add_argument(
        "--size",
        choices=POLICIES,
        default="auto",
        help="auto: whole photo up to one megapixel, tiles above (default); resize: 512x512 and back",
    )
    parser.add_argument(
        "--tile", type=at_least(64), default=TILE, help=f"side of a tile in pixels (default {TILE})"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON line per photo instead of a table; of a photo that failed path and error",
    )
    parser.add_argument("--csv", type=path, metavar="FILE", help="write the results of all photos as a table")
    parser.add_argument(
        "--report", type=path, metavar="FILE", help="write the results of all photos as one HTML page"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="do part I of N of the photos, for N processes at one time; torchrun's processes do so by themselves",
    )


def kinds(text: str) -> tuple[str, ...]:
    """The kinds of results in a list such as "mask,map"."""
    chosen = tuple(dict.fromkeys(text.split(",")))
    for kind in chosen:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(KINDS)}, got {kind!r}")
    return chosen


def run(args: argparse.Namespace) -> int:
    """Predict every photo. A bad one is reported and the others are still done; the status is then 1."""
    part = args.shard or shard_of_process()
    _check(args, part)
    # What a photo must have to count as done: a report alone is no reason to repeat those without a map.
    needed = args.save or DEFAULT_KINDS
    args.save = args.save or (*DEFAULT_KINDS, *(["map"] if args.report else []))
    found = _collect(args)
    refuse_to_destroy(found.jobs, args.out, {"--csv": args.csv, "--report": args.report})
    if not found.jobs:
        if not found.failed:
            say(f"frd predict: no images in {', '.join(args.paths) or args.from_file}", sys.stderr)
        return 1
    photos = [job for job in found.jobs if part is None or part.has(job)]
    left, checkpoint = _left(photos, needed, args)
    failed = _do(photos, left, checkpoint, found.failed, args)
    status = 1 if failed + len(found.failed) else 0
    earlier = f", {len(photos) - len(left)} done before" if args.skip_existing else ""
    done = f"{len(left) - failed} done, {failed + len(found.failed)} failed{earlier}"
    # With --json stdout holds records only.
    say(f"shard {part.number}/{part.count}: {done}" if part else done, sys.stderr if args.json else None)
    if args.report is not None and not _write_page(photos, args):
        status = 1
    if part and not args.shard:
        _wait_for_others()
    return status


def _check(args: argparse.Namespace, part: Shard | None) -> None:
    if not args.paths and args.from_file is None:
        raise UsageError("PATH or --from-file must name photos, got neither")
    if STANDARD_INPUT in args.paths:
        for flag, given in (("--from-file -", args.from_file == "-"), ("--shard", part)):
            if given:
                raise UsageError(f"- reads a photo from standard input, which does not go with {flag}")
        if args.skip_existing:
            raise UsageError(
                "- reads a photo that has no name, which --skip-existing cannot find; give --overwrite"
            )
    if part and (args.csv or args.report):
        raise UsageError(
            "--csv and --report are of all photos, got a shard; after the last shard give them to a run without "
            "--shard, with --skip-existing"
        )
    check_output_folder("--out", args.out)
    files = {"--csv": args.csv, "--report": args.report}
    check_output_files(files, overwrite=args.overwrite or args.skip_existing)


def _collect(args: argparse.Namespace) -> Collected:
    from frd_model.data.files import describe_skipped

    listed = [] if args.from_file is None else listed_names(args.from_file)
    files = [*(name for name in args.paths if name != STANDARD_INPUT), *listed]
    found = collect(files, args.out, args.recursive, standard_input=STANDARD_INPUT in args.paths)
    for name, reason in found.failed:
        _complain(name, reason, as_json=args.json)
    if found.skipped:
        say(f"frd predict: skipped {describe_skipped(found.skipped)}", sys.stderr)
    return found


def _left(
    photos: list[Job], needed: tuple[str, ...], args: argparse.Namespace
) -> tuple[list[Job], Checkpoint | None]:
    """The photos that are left to do, those without results of the `needed` kinds; and the checkpoint to do it."""
    if not args.skip_existing:
        if not args.overwrite:
            refuse_to_overwrite(photos, args.out)
        return photos, _open(args) if photos else None
    if not photos:
        return [], None
    checkpoint = _open(args)
    settings = _all_settings(args, checkpoint)
    return [job for job in photos if not is_done(job, args.out, needed, settings)], checkpoint


def _do(
    photos: list[Job],
    left: list[Job],
    checkpoint: Checkpoint | None,
    failed: list[tuple[str, str]],
    args: argparse.Namespace,
) -> int:
    """Predict the photos that are left and report all; returns how many of them failed."""
    todo, count = set(left), 0
    with (
        _table(args.csv) as add_row,
        _progress(len(left), args.json) as bar,
        contextlib.closing(_records(left, checkpoint, args)) as records,
    ):
        for name, reason in failed:
            add_row({"path": name, "error": reason})
        for job in photos:
            if job not in todo:
                add_row(json.loads((args.out / f"{job.name}.json").read_bytes()))
                continue
            record = next(records)
            add_row(record)
            if "error" in record:
                count += 1
                _complain(record["path"], record["error"], as_json=args.json)
            else:
                _report(record, as_json=args.json)
            bar.update()
    return count


def _records(
    jobs: list[Job], checkpoint: Checkpoint | None, args: argparse.Namespace
) -> Generator[dict[str, Any], None, None]:
    """Predict photos, write their results and yield their records; of one that failed path and error."""
    if not jobs or checkpoint is None:
        return
    from frd_model.pipeline import process

    def finish(job: Job, content: Content | None, result: Prediction | BaseException) -> dict[str, Any]:
        try:
            if isinstance(result, BaseException):
                raise result
            assert content is not None
            begin(job, args.out)
            settings = {**_settings(args), **runs_in(checkpoint), "provenance": content.provenance}
            return save_prediction(
                args.out, job, content.pixels, result, checkpoint.label, settings, args.save, args.colour_map
            )
        # Decoders, allocators and file systems raise errors of any type. A photo that failed has no results.
        except BaseException as error:
            remove(job, args.out)
            return {"path": str(job.path), "error": one_line(error)}

    yield from process(
        jobs,
        checkpoint.model,
        finish,
        size=args.size,
        tile=args.tile,
        overlap=min(OVERLAP, args.tile // 4),
        threshold=args.threshold,
        raw=args.raw,
        progress=True,
    )


def _write_page(photos: list[Job], args: argparse.Namespace) -> bool:
    """--report; whether all results could be shown."""
    from frd_model.report import write_report

    names = [job.name for job in photos if (args.out / f"{job.name}.json").exists()]
    if not names:
        say("frd predict: no report, since no photo has results", sys.stderr)
        return False
    shown, failed = write_report(args.out, args.report, names)
    for name, reason in failed:
        say(f"frd predict: report: {name}: {reason}", sys.stderr)
    say(f"{shown} photos in {args.report}", sys.stderr if args.json else None)
    return not failed


def _wait_for_others() -> None:
    """Keep this process until torchrun's others are done: torchrun stops them when one ends with a status of 1."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=365))
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def _table(file: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds the record of a photo, done or failed, to the CSV file; without a file it does nothing."""
    if file is None:
        yield lambda record: None
        return
    # A name that is no UTF-8 must not make a file that is none.
    with file.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        rows = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        rows.writeheader()

        def add(record: dict[str, Any]) -> None:
            rows.writerow(record | record.get("size", {}))
            stream.flush()

        yield add


def _progress(photos: int, as_json: bool) -> Any:
    """Photos done, rate and time that remains, for several photos on a terminal."""
    from tqdm import tqdm

    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(total=photos, unit="photo", disable=as_json or not terminal or photos < 2)


def _open(args: argparse.Namespace) -> Checkpoint:
    checkpoint = open_checkpoint(
        args.checkpoint, args.device, model=args.model, preset=args.preset, quiet=args.json
    )
    return prepared(checkpoint, args)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    colour_map = None if args.colour_map == COLOUR_MAPS[0] else args.colour_map
    optional = {"model": args.model, "preset": args.preset, "raw": args.raw or None, "colour_map": colour_map}
    given = {name: value for name, value in optional.items() if value is not None}
    return {"size_policy": args.size, "tile": args.tile, **given}


def _all_settings(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the results of one folder have in common."""
    rule: ScoreRule | None = getattr(checkpoint.model, "score_rule", None)
    default = 0.5 if rule is None else rule.pixel_threshold
    return {
        "threshold": default if args.threshold is None else args.threshold,
        "score_thresholds": None if rule is None else rule.thresholds,
        "checkpoint": checkpoint.label,
        **_settings(args),
        # Engines differ by rounding alone, and a photo more or less may change which one is the default.
        **{name: value for name, value in runs_in(checkpoint).items() if name == "precision"},
    }


def _report(record: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(record), flush=True)
        return
    size = f"{record['size']['width']}x{record['size']['height']}"
    share = f"{100 * record['edited_fraction']:5.1f} %"
    found = f"score {record['score']:.3f} (not calibrated: no verdict)"
    if "verdict" in record:
        found = record["explanation"]
    _say(f"{record['name']:<32} {size:>11}  {found}  marked {share}  {record['seconds']:.2f} s")


def _complain(name: object, reason: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"path": str(name), "error": reason}), flush=True)
    shown = str(name)
    _say(f"frd predict: {reason if shown in reason else f'{shown}: {reason}'}", sys.stderr)


def _say(text: str, file: TextIO | None = None) -> None:
    """`say`, above the progress bar."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        say(text, file)
