"""A folder of forgeries with masks and a manifest, and the `frd forge` command that writes one."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from frd_model.arguments import check_output_folder, fraction, one_line, path, say

from .files import ImageError, PathLike, describe_skipped, expand_user, scan_images
from .forge import KINDS, MIN_SIDE, ForgeOptions, Forger, Forgery
from .images import read_image, write_jpeg, write_json, write_png
from .photos import SPLITS, sample_photos
from .transforms import random_view

UInt8 = npt.NDArray[np.uint8]

# The files that `forge_folder` writes into images/ and masks/.
_FORGED = re.compile(rf"\d{{5,}}_({'|'.join((*KINDS, 'authentic'))})_[0-9A-Za-z-]*\.(png|jpg)")


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
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Write `count` forgeries: images/NAME.png or .jpg, masks/NAME.png and manifest.json in out_dir.

    Item i depends on (seed, i) and the photos alone. The photos take turns as host. With `extension` "jpg"
    the file's own compression is the final one. Untouched photos (a share `authentic`) get a black mask.

    Args:
        photos: name to uint8 RGB [H,W,3].
        kinds: the kinds to draw from, in equal parts; None for the options' weights.
        size: side of a random square view of the host; None forges the whole photo.
        overwrite: replace the forgeries of an earlier call in out_dir, which is refused otherwise.

    Returns:
        The manifest's items: name, kind, host, donor, parameters.
    """
    _check_arguments(photos, count, seed, authentic, extension)
    options = options or ForgeOptions()
    if kinds is not None:
        options = replace(options, kinds=dict.fromkeys(kinds, 1.0))
    quality = options.final_quality
    if extension == "jpg":
        options = replace(options, final_jpeg=0.0)
    out_dir = expand_user(out_dir)
    for file in check_output(out_dir, overwrite):
        file.unlink()
    items = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        forgery, host, donor = _forge_one(rng, photos, index, size, authentic, options)
        name = f"{index:05d}_{forgery.kind}_{re.sub('[^0-9A-Za-z-]+', '-', host)[:100]}"
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


def check_output(out_dir: Path, overwrite: bool) -> list[Path]:
    """Make the folders of a run; hands back the files of an earlier one, which are to go first.

    Forgeries of two runs in one folder would be one data set that no manifest describes.

    Raises:
        ValueError: a folder cannot be written, or holds such files or a manifest and `overwrite` is False.
    """
    folders = [out_dir / name for name in ("images", "masks")]
    for folder in folders:
        check_output_folder("output folder", folder)
    old = [file for folder in folders for file in folder.iterdir() if _FORGED.fullmatch(file.name)]
    manifest = out_dir / "manifest.json"
    # the manifest goes first: a run that stops here leaves none that tells of files that are gone
    old = [manifest, *old] if manifest.exists() else old
    if old and not overwrite:
        raise ValueError(
            f"output folder {str(out_dir)!r} must hold no forgeries yet, got {len(old)} files of an earlier run "
            f"such as {str(old[0])!r}; take another folder, or replace them with --overwrite (overwrite=True)"
        )
    return old


def _check_arguments(
    photos: Mapping[str, UInt8], count: int, seed: int, authentic: float, extension: str
) -> None:
    if not photos:
        raise ValueError("photos must hold at least one photo, got none")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
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
        "--recursive", action="store_true", help="read the directories inside directories as well"
    )
    parser.add_argument(
        "--sample", choices=[*sorted(SPLITS), "all"], help="use the sample photos of a split instead"
    )
    parser.add_argument(
        "--out", type=path, required=True, help="folder for images/, masks/ and manifest.json"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the forgeries of an earlier run in --out"
    )
    parser.add_argument(
        "--count", type=_at_least(1), default=100, help="number of images (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=_at_least(0),
        default=0,
        help="same seed, same bytes, whatever the count (default: %(default)s)",
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kinds of forgery (default: all)")
    parser.add_argument(
        "--size", type=_at_least(MIN_SIDE), help="side of square views; default: whole photos"
    )
    parser.add_argument("--authentic", type=fraction, default=0.0, help="share of untouched photos")
    parser.add_argument("--format", choices=("png", "jpg"), default="png", help="of the images")


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return value

    return whole_number


def run(args: argparse.Namespace) -> int:
    """`frd forge`: status 0, 1 when a photo could not be used or nothing was made, 2 for bad usage."""
    if bool(args.photos) == bool(args.sample):
        say("frd forge: give either photos or --sample", sys.stderr)
        return 2
    try:
        files = [] if args.sample else _find_photos(args.photos, args.recursive, args.out)
        check_output(args.out, args.overwrite)
        photos, failed = (sample_photos(args.sample), 0) if args.sample else _read_photos(files)
        items = forge_folder(
            photos,
            args.out,
            args.count,
            args.seed,
            args.kinds,
            args.size,
            args.authentic,
            args.format,
            overwrite=args.overwrite,
        )
    except (ValueError, RuntimeError, OSError) as error:
        say(f"frd forge: {one_line(error)}", sys.stderr)
        return 1
    say(f"{len(items)} images from {len(photos)} photos in {args.out}")
    return 1 if failed else 0


def _find_photos(paths: Sequence[str], recursive: bool, out: Path) -> list[Path]:
    """The photos' files; what their folders hold beside is reported. They may not lie where the output goes."""
    found = scan_images(paths, recursive)
    if found.skipped:
        say(f"frd forge: passed over {describe_skipped(found.skipped)}", sys.stderr)
    written = {(out / name).resolve() for name in ("images", "masks")}
    for file in found.images:
        if file.resolve().parent in written:
            raise ImageError(f"photo {str(file)!r} must lie outside the output {str(out)!r}, got one inside")
    return found.images


def _read_photos(files: Sequence[Path]) -> tuple[dict[str, UInt8], int]:
    """Readable photos by name and the number of those that were not, each of which is reported."""
    photos: dict[str, UInt8] = {}
    failed = 0
    for file in files:
        try:
            photo = read_image(file)
            if min(photo.shape[:2]) < MIN_SIDE:
                height, width = photo.shape[:2]
                raise ImageError(
                    f"photo {str(file)!r} must have sides of at least {MIN_SIDE}, got {width} x {height}"
                )
        except ImageError as error:
            say(f"frd forge: {error}", sys.stderr)
            failed += 1
            continue
        photos[file.stem if file.stem not in photos else str(file)] = photo
    if not photos:
        raise ImageError(f"photos must hold at least one usable image, got {failed} unusable")
    return photos, failed
