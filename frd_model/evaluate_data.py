"""Images with known masks for `frd evaluate`: a folder, a JSON list, or seeded forgeries of the sample photos."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from frd_model.data.dataset import FolderDataset, JsonDataset, PairDataset
from frd_model.data.forge import KINDS, Forger
from frd_model.data.photos import SPLITS, sample_photos


@dataclass(frozen=True)
class Labelled:
    """image uint8 RGB [H, W, 3], mask bool [H, W] (all False: untouched); kind of forgery, or "" if not known."""

    name: str
    kind: str
    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Source:
    """Samples made or read one at a time, how many there are, and a line that says what they are."""

    samples: Iterator[Labelled]
    length: int
    label: str


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """--images with --masks, or --json, or --sample."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--images", type=Path, metavar="DIR", help="folder of photos; needs --masks")
    which.add_argument("--json", type=Path, metavar="FILE", help='list of [image, mask or "Negative"]')
    which.add_argument(
        "--sample", choices=sorted(SPLITS), help="seeded forgeries of the sample photos of a split"
    )
    parser.add_argument(
        "--masks", type=Path, metavar="DIR", help="folder of masks, paired with photos by name"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="--sample: forgeries of each kind per photo (default 5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="--sample: seed of the forgeries (default 0)")


def open_source(args: argparse.Namespace) -> Source:
    """The samples that the arguments name. Raises ValueError where they do not fit together."""
    if args.sample:
        if args.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
        return forged_samples(args.sample, args.repeats, args.seed)
    if args.json:
        return _pairs(JsonDataset(args.json), str(args.json))
    if args.masks is None:
        raise ValueError("--images needs --masks, got none")
    return _pairs(FolderDataset(args.images, args.masks, allow_authentic=True), str(args.images))


def forged_samples(split: str, repeats: int, seed: int) -> Source:
    """`repeats` forgeries of each kind and as many untouched versions of every photo of a split, at full size."""
    photos = sample_photos(split)
    length = len(photos) * repeats * (len(KINDS) + 1)
    label = f"sample photos {split} ({', '.join(photos)}), {repeats} forgeries of each kind per photo, seed {seed}"
    return Source(_forge(photos, repeats, seed), length, label)


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


def _pairs(data: PairDataset, label: str) -> Source:
    def read() -> Iterator[Labelled]:
        for index, name in enumerate(data.names):
            image, mask = data.load(index)
            yield Labelled(name, "", image, mask)

    return Source(read(), len(data), label)
