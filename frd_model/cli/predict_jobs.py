"""The photos of a run of `frd predict`: which there are, how their results are called, and which are left to do."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import hashlib
import json
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frd_model.output import one_line
from frd_model.results import ENDINGS, KINDS, Job, files_of, record_of

from .arguments import path

if TYPE_CHECKING:
    from frd_model.data.files import Skipped

# The PATH that stands for a photo at standard input, and the name of its results.
STANDARD_INPUT, STANDARD_INPUT_NAME = "-", "stdin"
# Bytes for the longest ending and for the number that distinguishes equal names.
NAME_MARGIN = 20
PICTURES = tuple(ending for ending in ENDINGS if ending != ".json")
# Settings that a record has only where they are not the default.
OPTIONAL = ("model", "preset", "raw", "colour_map", "precision")


@dataclass(frozen=True)
class Collected:
    """The photos that the arguments name, each once and under a distinct name, failed arguments, and skipped files."""

    jobs: list[Job]
    failed: list[tuple[str, str]]
    skipped: list[Skipped]


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of the photos, `number` from 1."""

    number: int
    count: int

    def has(self, job: Job) -> bool:
        """Whether a photo is in this part. Its name decides, whatever other photos there are."""
        return zlib.crc32(os.fsencode(job.name)) % self.count == self.number - 1


def shard(text: str) -> Shard:
    """The shard that "2/5" names."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, such as 2/5, got {text!r}")
    return Shard(int(found[1]), int(found[2]))


def shard_of_process() -> Shard | None:
    """The shard of a process that torchrun has started with others; None for a process that is alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return Shard(int(os.environ["RANK"]) + 1, count) if count > 1 and "RANK" in os.environ else None


def listed_names(file: str) -> list[str]:
    """The paths in a list, one a line or each ended by NUL; "-" is standard input."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"--from-file must be a readable list, got {file!r}: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        # As Windows PowerShell writes a list.
        data = data.decode("utf-16", "surrogatepass").encode(errors="surrogatepass")
    if b"\0" in data:
        lines = data.split(b"\0")
    else:
        lines = [line.removesuffix(b"\r") for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    return [os.fsdecode(line) for line in lines if line]


def collect(paths: list[str], out: Path, recursive: bool = False, standard_input: bool = False) -> Collected:
    """The photos that the arguments name, without results of an earlier run in `out`.

    `standard_input` adds one that is read from there.
    """
    from frd_model.data.files import Skipped, scan_images

    files: dict[str, Path] = {}
    skipped: dict[Path, Skipped] = {}
    failed = []
    for name in paths:
        if "://" in name and not os.path.exists(name):
            failed.append((name, "must be a file, folder or pattern, got an address: download it first"))
            continue
        try:
            found = scan_images([name], recursive=recursive)
        # Any error of one argument must not stop the others.
        except Exception as error:
            failed.append((name, one_line(error)))
            continue
        skipped |= {entry.path: entry for entry in found.skipped}
        listed = not os.path.isfile(name)
        for file in found.images:
            if _own_output(file, out) or (listed and record_of(file) is not None):
                skipped[file] = Skipped(file, "result of an earlier run")
            else:
                files.setdefault(os.path.realpath(file), file)
    named = [*files.values(), *([Path(STANDARD_INPUT_NAME)] if standard_input else [])]
    jobs = name_jobs(named, _longest_name(out))
    if standard_input:
        jobs[-1] = replace(jobs[-1], path=Path(STANDARD_INPUT), standard_input=True)
    return Collected(jobs, failed, list(skipped.values()))


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


def begin(job: Job, out: Path) -> None:
    """Mark the results as unfinished and delete old ones.

    If the run is stopped, what it leaves must neither count as done nor, where `out` holds the photos too, as a photo.
    """
    from frd_model.data.images import write_json

    write_json(out / f"{job.name}.json", {"path": str(job.path), "unfinished": True})
    for file in files_of(out, job.name, PICTURES):
        file.unlink(missing_ok=True)


def remove(job: Job, out: Path) -> None:
    """Delete the results as far as that is possible, last the JSON file, which tells whose they are."""
    for file in (*files_of(out, job.name, PICTURES), out / f"{job.name}.json"):
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def refuse_to_destroy(jobs: list[Job], out: Path, files: dict[str, Path | None]) -> None:
    """ValueError if a result, or one of the `files` that the flags name, would replace a photo of this run, or one the
    other.
    """
    photos = {os.path.realpath(job.path) for job in jobs if not job.standard_input}
    flags = {os.path.realpath(file): flag for flag, file in files.items() if file is not None}
    for real in flags.keys() & photos:
        raise ValueError(
            f"{flags[real]} must be a file of its own, got the photo {str(files[flags[real]])!r}"
        )
    for file in (file for job in jobs for file in files_of(out, job.name)):
        real = os.path.realpath(file)
        if real in photos:
            raise ValueError(
                f"--out must be another directory: a result would replace the photo {str(file)!r}"
            )
        if real in flags:
            raise ValueError(
                f"{flags[real]} must be a file of its own, got {str(file)!r}, the name of a photo's result"
            )


def refuse_to_overwrite(jobs: list[Job], out: Path) -> None:
    there = [file for job in jobs for file in files_of(out, job.name) if os.path.lexists(file)]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(
            f"--out must not hold results of these photos, got {str(there[0])!r}{more}; "
            "give --skip-existing to keep them, --overwrite to replace them, or another --out"
        )


def is_done(job: Job, out: Path, kinds: tuple[str, ...], wanted: dict[str, Any]) -> bool:
    """Whether the photo's results exist. ValueError if they are of another photo or other settings."""
    file = out / f"{job.name}.json"
    try:
        record = json.loads(file.read_bytes())
        saved = os.path.abspath(record["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if "unfinished" in record:
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
