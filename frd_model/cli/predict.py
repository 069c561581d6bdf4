"""`frd predict`: find the edited pixels of photos and write masks, overlays and scores."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from frd_model.output import check_output_file, check_output_folder, one_line, say
from frd_model.results import COLOUR_MAPS, DEFAULT_KINDS, ENDINGS, KINDS, Job, files_of, save_prediction
from frd_model.tiling import OVERLAP, POLICIES, TILE

from .arguments import (
    Checkpoint,
    UsageError,
    add_checkpoint_argument,
    add_engine_arguments,
    at_least,
    fraction,
    open_checkpoint,
    path,
    prepared,
)

if TYPE_CHECKING:
    from frd_model.data.files import Skipped
    from frd_model.score import ScoreRule

# Of --csv; what a photo has no value for stays empty.
COLUMNS = (
    *("path", "name", "score", "verdict", "false_alarm_rate", "edited_fraction", "raw_edited_fraction"),
    *("width", "height", "threshold", "seconds", "error"),
)
# Settings that a record has only where they are not the default.
OPTIONAL = ("model", "preset", "raw", "colour_map", "precision")
# Bytes for the longest ending and for the number that distinguishes equal names.
NAME_MARGIN = 20


@dataclass(frozen=True)
class Collected:
    """The photos that the arguments name, each once and under a distinct name, failed arguments, and skipped files."""

    jobs: list[Job]
    failed: list[tuple[str, str]]
    skipped: list[Skipped]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="photo, directory of photos, or glob pattern"
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
        default=DEFAULT_KINDS,
        metavar="KINDS",
        help=f"what to write beside the JSON file, separated by commas: {', '.join(KINDS)} (alone: nothing else) "
        f"(default {','.join(DEFAULT_KINDS)})",
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
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
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


def kinds(text: str) -> tuple[str, ...]:
    """The kinds of results in a list such as "mask,map"."""
    chosen = tuple(dict.fromkeys(text.split(",")))
    for kind in chosen:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(KINDS)}, got {kind!r}")
    return chosen


def run(args: argparse.Namespace) -> int:
    """Predict every photo. A bad one is reported and the others are still done; the status is then 1."""
    from frd_model.data.files import describe_skipped

    if not args.paths and args.from_file is None:
        raise UsageError("PATH or --from-file must name photos, got neither")
    check_output_folder("--out", args.out)
    if args.csv is not None:
        check_output_file("--csv", args.csv, overwrite=args.overwrite or args.skip_existing)
    names = [*args.paths, *([] if args.from_file is None else listed_names(args.from_file))]
    found = collect(names, args.out, args.recursive)
    for name, reason in found.failed:
        _complain(name, reason, as_json=args.json)
    if found.skipped:
        say(f"frd predict: skipped {describe_skipped(found.skipped)}", sys.stderr)
    jobs = found.jobs
    _refuse_to_destroy(jobs, args.out, args.csv)
    checkpoint = None
    if args.skip_existing and jobs:
        checkpoint = _open(args)
        settings = _all_settings(args, checkpoint)
        jobs = [job for job in jobs if not _is_done(job, args.out, args.save, settings)]
    elif not args.overwrite:
        _refuse_to_overwrite(jobs, args.out)
    if not found.jobs:
        if not found.failed:
            say(f"frd predict: no images in {', '.join(args.paths) or args.from_file}", sys.stderr)
        return 1
    if jobs:
        checkpoint = checkpoint or _open(args)
    failed = len(found.failed)
    with _table(args.csv) as add_row, _progress(len(jobs), args.json) as bar:
        for name, reason in found.failed:
            add_row({"path": name, "error": reason})
        left = set(jobs)
        for job in found.jobs:
            if job not in left:
                add_row(json.loads((args.out / f"{job.name}.json").read_bytes()))
                continue
            assert checkpoint is not None
            record = _do(job, checkpoint, args)
            add_row(record)
            bar.update()
            failed += "error" in record
    done = len(jobs) - (failed - len(found.failed))
    earlier = f", {len(found.jobs) - len(jobs)} done before" if args.skip_existing else ""
    # With --json stdout holds records only.
    say(f"{done} done, {failed} failed{earlier}", sys.stderr if args.json else None)
    return 1 if failed else 0


def listed_names(file: str) -> list[str]:
    """The paths in a list, one a line or each ended by NUL; "-" is standard input."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"--from-file must be a readable list, got {file!r}: {error.strerror}") from None
    if b"\0" in data:
        lines = data.split(b"\0")
    else:
        lines = [line.removesuffix(b"\r") for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    return [os.fsdecode(line) for line in lines if line]


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


def collect(paths: list[str], out: Path, recursive: bool = False) -> Collected:
    """The photos that the arguments name, without results of an earlier run in `out`."""
    from frd_model.data.files import Skipped, scan_images

    files: dict[str, Path] = {}
    skipped: dict[Path, Skipped] = {}
    failed = []
    for name in paths:
        try:
            found = scan_images([name], recursive=recursive)
        # Any error of one argument must not stop the others.
        except Exception as error:
            failed.append((name, one_line(error)))
            continue
        skipped |= {entry.path: entry for entry in found.skipped}
        for file in found.images:
            if _own_output(file, out):
                skipped[file] = Skipped(file, "result of an earlier run")
            else:
                files.setdefault(os.path.realpath(file), file)
    return Collected(name_jobs(list(files.values()), _longest_name(out)), failed, list(skipped.values()))


def name_jobs(files: list[Path], longest: int = 255) -> list[Job]:
    """Name each file by its stem; equal stems become PARENT_STEM_EXTENSION, then get a number.

    Names are compared without case and Unicode form, which the file system of the results may ignore. A name that
    leaves no room for its endings in `longest` bytes is truncated and gets a digest of the full name.
    """
    stems = Counter(_folded(f.stem) for f in files)
    taken: set[str] = set()
    jobs = []
    for file in files:
        name = file.stem
        if stems[_folded(name)] > 1:
            parent = Path(os.path.realpath(file)).parent.name
            name = "_".join(part for part in (parent, name, file.suffix.lstrip(".")) if part)
        name = whole = _shortened(name, longest - NAME_MARGIN)
        number = 2
        while _folded(name) in taken or (name != file.stem and _folded(name) in stems):
            name, number = f"{whole}-{number}", number + 1
        taken.add(_folded(name))
        jobs.append(Job(file, name))
    return jobs


def _do(job: Job, checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """Predict one photo, write and report its results and return its record; on any error path and error.

    A photo that failed has no results.
    """
    from frd_model.data.images import read_image
    from frd_model.predict import predict
    from frd_model.provenance import provenance

    try:
        # If this run fails, an old result must not be taken for its own.
        _remove(job, args.out)
        pixels = read_image(job.path)
        # Decodes the file again, so that it comes before the maps take their memory.
        settings = {**_settings(args), **_runs_in(checkpoint), "provenance": provenance(job.path)}
        result = predict(
            pixels,
            checkpoint.model,
            size=args.size,
            tile=args.tile,
            overlap=min(OVERLAP, args.tile // 4),
            threshold=args.threshold,
            raw=args.raw,
            device=args.device,
            progress=True,
        )
        record = save_prediction(
            args.out, job, pixels, result, checkpoint.label, settings, args.save, args.colour_map
        )
    # Decoders, allocators and file systems raise errors of any type.
    except Exception as error:
        _complain(job.path, one_line(error), as_json=args.json)
        _remove(job, args.out, suppress=True)
        return {"path": str(job.path), "error": one_line(error)}
    _report(record, as_json=args.json)
    return record


def _remove(job: Job, out: Path, *, suppress: bool = False) -> None:
    """Delete the results, first the JSON file, which marks them as complete."""
    for file in reversed(files_of(out, job.name)):
        try:
            file.unlink(missing_ok=True)
        except OSError:
            if not suppress:
                raise


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
        **{name: value for name, value in _runs_in(checkpoint).items() if name == "precision"},
    }


def _runs_in(checkpoint: Checkpoint) -> dict[str, Any]:
    """The engine, and the precision where it is not float32."""
    engine, precision = checkpoint.model.engine, checkpoint.model.precision
    return {"engine": engine} | ({} if precision == "float32" else {"precision": precision})


def _refuse_to_destroy(jobs: list[Job], out: Path, table: Path | None) -> None:
    """ValueError if a result would replace a photo of this run."""
    photos = {os.path.realpath(job.path) for job in jobs}
    if table is not None and os.path.realpath(table) in photos:
        raise ValueError(f"--csv must be a file of its own, got the photo {str(table)!r}")
    for file in (file for job in jobs for file in files_of(out, job.name)):
        if os.path.realpath(file) in photos:
            raise ValueError(
                f"--out must be another directory: a result would replace the photo {str(file)!r}"
            )


def _refuse_to_overwrite(jobs: list[Job], out: Path) -> None:
    there = [file for job in jobs for file in files_of(out, job.name) if os.path.lexists(file)]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(
            f"--out must not hold results of these photos, got {str(there[0])!r}{more}; "
            "give --skip-existing to keep them, --overwrite to replace them, or another --out"
        )


def _is_done(job: Job, out: Path, kinds: tuple[str, ...], wanted: dict[str, Any]) -> bool:
    """Whether the photo's results exist. ValueError if they are of another photo or other settings."""
    file = out / f"{job.name}.json"
    try:
        record = json.loads(file.read_bytes())
        saved = os.path.abspath(record["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if saved != os.path.abspath(job.path):
        raise ValueError(f"cannot go on: {str(file)!r} is of the photo {saved!r}, not of {str(job.path)!r}")
    for name in (
        *wanted,
        *(n for n in OPTIONAL if n in record and n not in wanted),
    ):
        if record.get(name) != wanted.get(name):
            raise ValueError(
                f"cannot go on: {name} was {record.get(name)!r} in {str(file)!r}, now {wanted.get(name)!r}; "
                "give --overwrite, another --out, or what it was"
            )
    if "rle" in kinds and "rle" not in record:
        return False
    endings = tuple(KINDS[kind] for kind in kinds)
    return all(output.is_file() for output in files_of(out, job.name, endings))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _shortened(name: str, limit: int) -> str:
    raw = os.fsencode(name)
    if len(raw) <= limit:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:12]
    # Cut between characters; the name may be in another encoding than the locale's.
    start = raw[: max(1, limit - 13)].decode(errors="ignore")
    return f"{os.fsdecode(start.encode())}-{digest}"


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return 255


def _own_output(file: Path, out: Path) -> bool:
    stem = next((file.name.removesuffix(e) for e in ENDINGS if file.name.endswith(e)), None)
    if stem is None or os.path.realpath(file.parent) != os.path.realpath(out):
        return False
    return (out / f"{stem}.json").exists()


def _report(record: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(record), flush=True)
        return
    size = f"{record['size']['width']}x{record['size']['height']}"
    share = f"{100 * record['edited_fraction']:5.1f} %"
    found = f"score {record['score']:.3f}  edited {share}"
    if "verdict" in record:
        found = f"{record['explanation']}  marked {share}"
    _say(f"{record['name']:<32} {size:>11}  {found}  {record['seconds']:.2f} s")


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
