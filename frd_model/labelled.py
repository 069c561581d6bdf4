"""Photos with known masks, read from folders or forged from sample photos, one at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from frd_model.data.dataset import PairDataset
from frd_model.data.files import PathLike, describe_skipped, name_bytes, scan_images
from frd_model.data.forge import Forger
from frd_model.data.forge_options import KINDS
from frd_model.data.forged_folder import kind_of
from frd_model.data.pairing import Pair
from frd_model.data.photos import sample_files, sample_photos
from frd_model.output import one_line


@dataclass(frozen=True)
class Labelled:
    """image uint8 RGB [H, W, 3], mask bool [H, W] (all False: untouched).

    kind: of forgery, "authentic", or "" if not known. path: the photo's file, or None where it was made.
    """

    name: str
    kind: str
    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    path: Path | None = None


@dataclass(frozen=True)
class Unusable:
    """A pair that cannot be scored, and the one line that says why."""

    name: str
    error: str


@dataclass(frozen=True)
class Source:
    """Samples made or read one at a time, how many there are, and a line that says what they are.

    skipped: one line on what the folders hold beside images, inverted: one on masks that look inverted; "" for nothing.
    files: a hash of the names and sizes of the files; "" for images generated from the packaged photos.
    """

    samples: Iterator[Labelled | Unusable]
    length: int
    label: str
    skipped: str = ""
    inverted: str = ""
    files: str = ""


def forged_samples(split: str, repeats: int, seed: int, folder: PathLike | None = None) -> Source:
    """`repeats` forgeries of each kind and as many untouched versions of every photo of a split, at full size.

    folder: of the photos, see :func:`frd_model.data.sample_photos`.
    """
    photos = sample_photos(split, folder)
    length = len(photos) * repeats * (len(KINDS) + 1)
    names = ("" if folder is None else f"of {os.fspath(folder)} ") + f"({', '.join(photos)})"
    label = f"sample photos {split} {names}, {repeats} forgeries of each kind per photo, seed {seed}"
    found = sample_files(split, folder)
    files = "" if folder is None else _hash(f"{file.name}\0{_size(file)}" for file in found.images)
    return Source(_forge(photos, repeats, seed), length, label, describe_skipped(found.skipped), files=files)


def _forge(photos: dict[str, npt.NDArray[np.uint8]], repeats: int, seed: int) -> Iterator[Labelled]:
    names = sorted(photos)
    for number, name in enumerate(names):
        for repeat in range(repeats):
            for which, kind in enumerate((*KINDS, "authentic")):
                rng = np.random.default_rng([seed, number, repeat, which])
                forger = Forger(rng)
                if kind == "authentic":
                    made = forger.authentic(photos[name])
                else:
                    others = [n for n in names if n != name] or names
                    made = forger.forge(photos[name], photos[others[int(rng.integers(len(others)))]], kind)
                yield Labelled(f"{name}-{kind}-{repeat}", kind, made.image, made.mask)


def labelled_pairs(data: PairDataset, label: str) -> Source:
    notes = describe_skipped(data.skipped), data.inverted_masks()
    return Source(_read(data), len(data), str(label), *notes, _digest(data))


def untouched_photos(folder: Path) -> Source:
    """The photos of a folder, with nothing edited. ValueError if it holds none."""
    found = scan_images(folder)
    if not found.images:
        raise ValueError(f"{folder}: must hold photos, got none")
    data = PairDataset([Pair(file, None) for file in found.images])
    data.skipped = found.skipped
    return labelled_pairs(data, str(folder))


def _digest(data: PairDataset) -> str:
    return _hash(
        f"{name}\0{_size(pair.image)}\0{_size(pair.mask)}"
        for name, pair in zip(data.names, data.pairs, strict=True)
    )


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256(name_bytes("\n".join(lines))).hexdigest()[:12]


def _size(file: Path | None) -> int | None:
    try:
        return None if file is None else file.stat().st_size
    except (OSError, ValueError):
        return None


def _read(data: PairDataset) -> Iterator[Labelled | Unusable]:
    for index, name in enumerate(data.names):
        try:
            image, mask = data.load(index)
        # A damaged or missing file, or one too large for the memory.
        except Exception as error:
            yield Unusable(name, one_line(error))
            continue
        yield Labelled(name, kind_of(name), image, mask, data.pairs[index].image)
