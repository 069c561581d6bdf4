"""`frd predict`: localize edits in files, directories and globs, and write what was found."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frd_model.checkpoints import add_checkpoint_argument, open_checkpoint
from frd_model.data.images import ImageError, find_images, overlay, read_image, write_json, write_png
from frd_model.predict import OVERLAP, POLICIES, TILE, Prediction, predict

WRITTEN = ("_mask.png", "_overlay.png")


@dataclass(frozen=True)
class Job:
    """One photo and the stem of the files that are written for it."""

    path: Path
    name: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="photo, directory of photos, or glob pattern"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write the results")
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--threshold", type=_fraction, default=0.5, help="a pixel above it counts as edited (default 0.5)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--size",
        choices=POLICIES,
        default="auto",
        help="auto: whole photo up to one megapixel, tiles above (default); resize: 512x512 and back",
    )
    parser.add_argument("--tile", type=_tile, default=TILE, help=f"side of a tile in pixels (default {TILE})")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON line per photo instead of a table"
    )


def run(args: argparse.Namespace) -> int:
    """Localize every photo; a bad one is reported and the others are still done. Status 1 if any failed."""
    jobs, failed = collect(args.paths, args.out)
    if not jobs:
        return 1
    checkpoint = open_checkpoint(
        args.checkpoint, args.device, model=args.model, preset=args.preset, quiet=args.json
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        try:
            pixels = read_image(job.path)
            result = predict(
                pixels,
                checkpoint.model,
                size=args.size,
                tile=args.tile,
                overlap=min(OVERLAP, args.tile // 4),
                threshold=args.threshold,
                device=args.device,
            )
            record = save_prediction(args.out, job, pixels, result, checkpoint.label)
        except (ImageError, OSError, MemoryError) as error:
            _complain(job.path, error)
            failed += 1
            continue
        _report(record, as_json=args.json)
    return 1 if failed else 0


def collect(paths: list[str], out: Path) -> tuple[list[Job], int]:
    """The photos that the arguments name, each once, under distinct names; and how many arguments failed."""
    files: list[Path] = []
    failed = 0
    for path in paths:
        try:
            files += find_images([path])
        except (ImageError, OSError, ValueError) as error:
            _complain(path, error)
            failed += 1
    unique = list({f.resolve(): f for f in reversed(files) if not _own_output(f, out)}.values())[::-1]
    if not unique and not failed:
        print(f"frd predict: no images in {', '.join(paths)}", file=sys.stderr)
    return name_jobs(unique), failed


def name_jobs(files: list[Path]) -> list[Job]:
    """Name each file by its stem; where stems collide by PARENT_STEM_EXTENSION, then with a number.

    Compared without case, since the results may lie on a file system that ignores it.
    """
    stems = Counter(f.stem.lower() for f in files)
    taken: set[str] = set()
    jobs = []
    for file in files:
        name = file.stem
        if stems[name.lower()] > 1:
            name = "_".join(
                part for part in (file.resolve().parent.name, name, file.suffix.lstrip(".")) if part
            )
        unique, number = name, 2
        while unique.lower() in taken or (unique != file.stem and unique.lower() in stems):
            unique, number = f"{name}-{number}", number + 1
        taken.add(unique.lower())
        jobs.append(Job(file, unique))
    return jobs


def save_prediction(out: Path, job: Job, pixels: Any, result: Prediction, checkpoint: str) -> dict[str, Any]:
    """Write NAME_mask.png (0 or 255), NAME_overlay.png and NAME.json into `out`, each atomically."""
    height, width = result.size
    record = {
        "name": job.name,
        "path": str(job.path),
        "score": round(result.score, 6),
        "edited_fraction": round(float(result.mask.mean()), 6),
        "size": {"width": width, "height": height},
        "threshold": result.threshold,
        "checkpoint": checkpoint,
        "seconds": round(result.seconds, 4),
    }
    write_png(out / f"{job.name}_mask.png", result.mask.astype(np.uint8) * 255)
    write_png(out / f"{job.name}_overlay.png", overlay(pixels, result.probability))
    write_json(out / f"{job.name}.json", record)
    return record


def _own_output(file: Path, out: Path) -> bool:
    return file.name.endswith(WRITTEN) and file.resolve().parent == out.resolve()


def _report(record: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(record), flush=True)
        return
    size = f"{record['size']['width']}x{record['size']['height']}"
    print(
        f"{record['name']:<32} {size:>11}  score {record['score']:.3f}  "
        f"edited {100 * record['edited_fraction']:5.1f} %  {record['seconds']:.2f} s",
        flush=True,
    )


def _complain(path: object, error: BaseException) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    prefix = "" if str(path) in text else f"{path}: "
    print(f"frd predict: {prefix}{text}", file=sys.stderr)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def _tile(text: str) -> int:
    value = int(text)
    if value < 64:
        raise argparse.ArgumentTypeError(f"must be at least 64 pixels, got {text}")
    return value
