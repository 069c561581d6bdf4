"""`frd forge`: make forged images with masks from authentic photos."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from frd_model import data
from frd_model.data.forge_options import ALL_METHODS, KINDS, MIN_SIDE, UNSEEN
from frd_model.data.photos import SPLITS, sample_files
from frd_model.output import say

from .arguments import add_photos_dir, at_least, fraction, path

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    UInt8 = npt.NDArray[np.uint8]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `frd forge`."""
    parser.add_argument("photos", nargs="*", help="authentic photos: files, directories, patterns")
    parser.add_argument(
        "--recursive", action="store_true", help="read the directories inside directories as well"
    )
    parser.add_argument(
        "--sample", choices=[*sorted(SPLITS), "all"], help="use the sample photos of a split instead"
    )
    add_photos_dir(parser)
    parser.add_argument(
        "--out", type=path, required=True, help="folder for images/, masks/ and manifest.json"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the forgeries of an earlier run in --out"
    )
    parser.add_argument(
        "--count", type=at_least(1), default=100, help="number of images (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="same seed, same bytes, whatever the count (default: %(default)s)",
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kinds of forgery (default: all)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=ALL_METHODS,
        metavar="NAME",
        help=f"operations to draw from, of {', '.join(ALL_METHODS)} (default: all but {', '.join(UNSEEN)})",
    )
    parser.add_argument("--size", type=at_least(MIN_SIDE), help="side of square views; default: whole photos")
    parser.add_argument(
        "--max-side",
        type=at_least(MIN_SIDE),
        help=f"reduce larger photos first, by area averaging, so that no side is longer, but none below {MIN_SIDE}",
    )
    parser.add_argument(
        "--authentic", type=fraction, default=0.0, help="share of untouched photos (default: %(default)g)"
    )
    parser.add_argument("--format", choices=("png", "jpg"), default="png", help="of the images")


def run(args: argparse.Namespace) -> int:
    """`frd forge`: status 0, 1 when a photo could not be used or nothing was made, 2 for bad usage."""
    if bool(args.photos) == bool(args.sample):
        say("frd forge: give either photos or --sample", sys.stderr)
        return 2
    if args.photos_dir and not args.sample:
        say("frd forge: --photos-dir goes with --sample, got none", sys.stderr)
        return 2
    from frd_model.data.forged_folder import check_output
    from frd_model.data.transforms import reduce

    files = [] if args.sample else _find_photos(args.photos, args.recursive, args.out)
    check_output(args.out, args.overwrite)
    photos, failed = (_sample(args.sample, args.photos_dir), 0) if args.sample else _read_photos(files)
    if args.max_side:
        photos = {name: reduce(photo, args.max_side) for name, photo in photos.items()}
    made = data.forge_folder(
        photos,
        args.out,
        args.count,
        args.seed,
        args.kinds,
        args.methods,
        args.size,
        args.authentic,
        args.format,
        overwrite=args.overwrite,
    )
    say(f"{len(made)} images from {len(photos)} photos in {args.out}")
    return 1 if failed else 0


def _sample(split: str, folder: Path | None) -> dict[str, UInt8]:
    _report_skipped(sample_files(split, folder))
    return data.sample_photos(split, folder)


def _find_photos(paths: Sequence[str], recursive: bool, out: Path) -> list[Path]:
    """The photos' files; what else their folders hold is reported. They must not be where the output goes."""
    found = data.scan_images(paths, recursive)
    _report_skipped(found)
    written = {(out / name).resolve() for name in ("images", "masks")}
    for file in found.images:
        if file.resolve().parent in written:
            raise data.ImageError(
                f"photo {str(file)!r} must lie outside the output {str(out)!r}, got one inside"
            )
    return found.images


def _report_skipped(found: data.Found) -> None:
    if found.skipped:
        say(f"frd forge: skipped {data.describe_skipped(found.skipped)}", sys.stderr)


def _read_photos(files: Sequence[Path]) -> tuple[dict[str, UInt8], int]:
    """Readable photos by name and the number of those that were not, each of which is reported."""
    photos: dict[str, UInt8] = {}
    failed = 0
    for file in files:
        try:
            photo = data.read_image(file)
            if min(photo.shape[:2]) < MIN_SIDE:
                height, width = photo.shape[:2]
                raise data.ImageError(
                    f"photo {str(file)!r} must have sides of at least {MIN_SIDE}, got {width} x {height}"
                )
        except data.ImageError as error:
            say(f"frd forge: {error}", sys.stderr)
            failed += 1
            continue
        photos[file.stem if file.stem not in photos else str(file)] = photo
    if not photos:
        raise data.ImageError(f"photos must hold at least one usable image, got {failed} unusable")
    return photos, failed
