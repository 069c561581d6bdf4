"""A folder of forgeries with masks and a manifest, and the `frd forge` command that writes one."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .forge import KINDS, MIN_SIDE, ForgeOptions, Forger, Forgery
from .images import ImageError, PathLike, find_images, read_image, write_jpeg, write_json, write_png
from .photos import SPLITS, sample_photos
from .transforms import random_view

UInt8 = npt.NDArray[np.uint8]


def forge_folder(
    photos: Mapping[str, UInt8],
    out_dir: PathLike,
    count: int,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    size: int | None = None,
    authentic: float = 0.0,
    extension: str = "png",
    options: ForgeOptions | None = None,
) -> list[dict[str, Any]]:
    """Write `count` forgeries: images/NAME.png or .jpg, masks/NAME.png and manifest.json in out_dir.

    Item i depends on (seed, i) and the photos alone. The photos take turns as host. With `extension` "jpg"
    the file's own compression is the final one. Untouched photos (a share `authentic`) get an empty mask.

    Args:
        photos: name to uint8 RGB [H,W,3].
        kinds: the kinds to draw from, in equal parts; None for the options' weights.
        size: side of a random square view of the host; None forges the whole photo.

    Returns:
        The manifest's items: name, kind, host, donor, parameters.
    """
    _check_arguments(photos, count, authentic, extension)
    options = options or ForgeOptions()
    if kinds is not None:
        options = replace(options, kinds=dict.fromkeys(kinds, 1.0))
    quality = options.final_quality
    if extension == "jpg":
        options = replace(options, final_jpeg=0.0)
    items = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        forgery, host, donor = _forge_one(rng, photos, index, size, authentic, options)
        name = f"{index:05d}_{forgery.kind}_{re.sub('[^0-9A-Za-z-]+', '-', host)}"
        image_file = Path(out_dir, "images", f"{name}.{extension}")
        if extension == "jpg":
            forgery.parameters["final"]["jpeg"] = int(rng.integers(quality[0], quality[1] + 1))
            write_jpeg(image_file, forgery.image, forgery.parameters["final"]["jpeg"])
        else:
            write_png(image_file, forgery.image)
        write_png(Path(out_dir, "masks", f"{name}.png"), forgery.mask)
        items.append(
            {
                "name": name,
                "image": f"images/{image_file.name}",
                "mask": f"masks/{name}.png",
                "kind": forgery.kind,
                "host": host,
                "donor": donor,
                "parameters": forgery.parameters,
            }
        )
    manifest = {"seed": seed, "size": size, "count": count, "photos": sorted(photos), "items": items}
    write_json(Path(out_dir, "manifest.json"), manifest)
    return items


def _check_arguments(photos: Mapping[str, UInt8], count: int, authentic: float, extension: str) -> None:
    if not photos:
        raise ValueError("photos must hold at least one photo, got none")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not 0 <= authentic <= 1:
        raise ValueError(f"authentic must be in [0, 1], got {authentic}")
    if extension not in ("png", "jpg"):
        raise ValueError(f"extension must be png or jpg, got {extension!r}")


def _forge_one(
    rng: np.random.Generator,
    photos: Mapping[str, UInt8],
    index: int,
    size: int | None,
    authentic: float,
    options: ForgeOptions,
) -> tuple[Forgery, str, str | None]:
    names = sorted(photos)
    host = names[index % len(names)]
    photo = photos[host] if size is None else random_view(rng, photos[host], size)
    forger = Forger(rng, options)
    if rng.random() < authentic:
        return forger.authentic(photo), host, None
    donor = None
    if len(names) > 1:
        donor = names[(index + 1 + int(rng.integers(len(names) - 1))) % len(names)]
    forgery = forger.forge(photo, None if donor is None else photos[donor])
    return forgery, host, donor if forgery.kind == "splicing" else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `frd forge`."""
    parser.add_argument("photos", nargs="*", help="authentic photos: files, directories, patterns")
    parser.add_argument(
        "--sample", choices=[*sorted(SPLITS), "all"], help="use the sample photos of a split instead"
    )
    parser.add_argument("--out", required=True, help="folder for images/, masks/ and manifest.json")
    parser.add_argument("--count", type=int, default=100, help="number of images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kinds of forgery (default: all)")
    parser.add_argument("--size", type=int, help="side of square views; default: whole photos")
    parser.add_argument("--authentic", type=float, default=0.0, help="share of untouched photos")
    parser.add_argument("--format", choices=("png", "jpg"), default="png", help="of the images")


def run(args: argparse.Namespace) -> int:
    """`frd forge`: status 0, 1 when a photo could not be used or nothing was made, 2 for bad usage."""
    if bool(args.photos) == bool(args.sample):
        print("frd forge: give either photos or --sample", file=sys.stderr)
        return 2
    if args.size is not None and args.size < MIN_SIDE:
        print(f"frd forge: --size must be at least {MIN_SIDE}, got {args.size}", file=sys.stderr)
        return 2
    try:
        photos, failed = (sample_photos(args.sample), 0) if args.sample else _read_photos(args.photos)
        items = forge_folder(
            photos, args.out, args.count, args.seed, args.kinds, args.size, args.authentic, args.format
        )
    except (ValueError, RuntimeError, OSError) as error:
        print(f"frd forge: {error}", file=sys.stderr)
        return 1
    print(f"{len(items)} images from {len(photos)} photos in {args.out}")
    return 1 if failed else 0


def _read_photos(paths: Sequence[str]) -> tuple[dict[str, UInt8], int]:
    """Readable photos by name and the number of those that were not, each of which is reported."""
    photos: dict[str, UInt8] = {}
    failed = 0
    for path in find_images(paths):
        try:
            photo = read_image(path)
            if min(photo.shape[:2]) < MIN_SIDE:
                height, width = photo.shape[:2]
                raise ImageError(
                    f"photo {str(path)!r} must have sides of at least {MIN_SIDE}, got {width} x {height}"
                )
        except ImageError as error:
            print(f"frd forge: {error}", file=sys.stderr)
            failed += 1
            continue
        photos[path.stem if path.stem not in photos else str(path)] = photo
    if not photos:
        raise ImageError(f"photos must hold at least one usable image, got {failed} unusable")
    return photos, failed
