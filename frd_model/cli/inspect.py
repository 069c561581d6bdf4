"""`frd inspect`: what the files of photos say of their origin."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frd_model.output import one_line, say

from .predict_jobs import STANDARD_INPUT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="photo, directory of photos, or glob pattern; - is a photo at standard input",
    )
    parser.add_argument(
        "--recursive", action="store_true", help="read the directories inside directories too"
    )
    parser.add_argument(
        "--coordinates", action="store_true", help="print GPS coordinates, where there are any"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON line per photo; of a photo that failed path and error",
    )


def run(args: argparse.Namespace) -> int:
    """Inspect every photo. A bad one is reported and the others are still done; the status is then 1."""
    from frd_model.data.images import read_stream
    from frd_model.provenance import inspect_photo

    photos, failed = _collect(args)
    for photo in photos:
        try:
            data = read_stream(sys.stdin.buffer, photo) if photo == STANDARD_INPUT else None
            record = inspect_photo(photo, coordinates=args.coordinates, data=data)
        # Decoders and file systems raise errors of any type.
        except Exception as error:
            _complain(photo, error, as_json=args.json)
            failed += 1
            continue
        if args.json:
            print(json.dumps(record), flush=True)
        else:
            for line in _lines(record):
                say(line)
    return 1 if failed else 0


def _collect(args: argparse.Namespace) -> tuple[list[Path | str], int]:
    """The photos that the arguments name, each once, and the number of arguments that failed."""
    from frd_model.data.files import describe_skipped, scan_images

    photos: dict[str, Path | str] = {}
    failed = 0
    for name in args.paths:
        if name == STANDARD_INPUT:
            photos[name] = name
            continue
        try:
            found = scan_images([name], recursive=args.recursive)
        # Any error of one argument must not stop the others.
        except Exception as error:
            _complain(name, error, as_json=args.json)
            failed += 1
            continue
        if found.skipped:
            say(f"frd inspect: skipped {describe_skipped(found.skipped)}", sys.stderr)
        for photo in found.images:
            photos.setdefault(os.path.realpath(photo), photo)
    return list(photos.values()), failed


def _complain(name: object, error: Exception, *, as_json: bool) -> None:
    reason, shown = one_line(error), str(name)
    if as_json:
        print(json.dumps({"path": shown, "error": reason}), flush=True)
    say(f"frd inspect: {reason if shown in reason else f'{shown}: {reason}'}", sys.stderr)


def _lines(record: dict[str, Any]) -> Iterator[str]:
    """The record for a reader: one fact a line, the remarks last."""
    size = f"{record['size']['width']}x{record['size']['height']}"
    yield record["path"]
    yield f"  file: {record['format']}, {size}, {record['mode']}, {record['bytes']} bytes"
    yield f"  sha256: {record['sha256']}"
    for part in ("exif", "xmp", "color_profile", "text", "jpeg", "thumbnail", "trailing", "c2pa"):
        value = record[part]
        if value is None:
            yield f"  {part}: none"
        elif isinstance(value, dict):
            yield from (
                f"  {part} {name}: {_shown(v)}" for name, v in value.items() if name != "quantization"
            )
        else:
            yield f"  {part}: {value}"
    yield from (f"  remark: {remark}" for remark in record["remarks"])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in (None, "", [], {}):
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "; ".join(_shown(part) for part in value)
    return str(value)
