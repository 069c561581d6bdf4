"""Images with known masks for `frd evaluate`: folders, a JSON list, or seeded forgeries of the sample photos."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from frd_model.arguments import one_line
from frd_model.data.forge import KINDS, Forger
from frd_model.data.photos import SPLITS, sample_photos

if TYPE_CHECKING:
    from frd_model.data.dataset import PairDataset


@dataclass(frozen=True)
class Labelled:
    """image uint8 RGB [H, W, 3], mask bool [H, W] (all False: untouched); kind of forgery, or "" if not known."""

    name: str
    kind: str
    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Unusable:
    """A pair that cannot be scored, and the one line that says why."""

    name: str
    error: str


@dataclass(frozen=True)
class Source:
    """Samples made or read one at a time, how many there are, and a line that says what they are.

    skipped: one line on what the folders hold beside images, inverted: one on masks that look inverted; "" for nothing.
    """

    samples: Iterator[Labelled | Unusable]
    length: int
    label: str
    skipped: str = ""
    inverted: str = ""


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """--images with --masks, or --json, --mani or --sample."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--images", metavar="DIR", help="folder of photos; needs --masks")
    which.add_argument("--json", metavar="FILE", help='list of [image, mask or "Negative"]')
    which.add_argument("--mani", metavar="DIR", help="folder with Tp (photos) and Gt (masks)")
    which.add_argument(
        "--sample", choices=sorted(SPLITS), help="seeded forgeries of the sample photos of a split"
    )
    parser.add_argument("--masks", metavar="DIR", help="folder of masks, paired with photos by name")
    parser.add_argument("--recursive", action="store_true", help="read the folders inside folders too")
    parser.add_argument("--invert-masks", action="store_true", help="the masks are black where edited")
    parser.add_argument(
        "--repeats", type=int, default=5, help="--sample: forgeries of each kind per photo (default 5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="--sample: seed of the forgeries (default 0)")


def open_source(args: argparse.Namespace) -> Source:
    """The samples that the arguments name. Raises ValueError where they do not fit together."""
    from frd_model.data.dataset import FolderDataset, JsonDataset, ManiDataset

    if args.masks is not None and args.images is None:
        raise ValueError("--masks needs --images, got none")
    if args.recursive and args.images is None and args.mani is None:
        raise ValueError("--recursive needs --images or --mani, got neither")
    if args.sample:
        if args.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
        if args.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {args.seed}")
        if args.invert_masks:
            raise ValueError("--invert-masks needs masks in files, got --sample")
        return forged_samples(args.sample, args.repeats, args.seed)
    if args.json is not None:
        return _pairs(JsonDataset(args.json, invert_masks=args.invert_masks), args.json)
    if args.mani is not None:
        mani = ManiDataset(args.mani, invert_masks=args.invert_masks, recursive=args.recursive)
        return _pairs(mani, args.mani)
    if args.masks is None:
        raise ValueError("--images needs --masks, got none")
    folders = FolderDataset(
        args.images,
        args.masks,
        allow_authentic=True,
        invert_masks=args.invert_masks,
        recursive=args.recursive,
    )
    return _pairs(folders, args.images)


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
    from frd_model.data.files import describe_skipped

    return Source(_read(data), len(data), str(label), describe_skipped(data.skipped), data.inverted_masks())


def _read(data: PairDataset) -> Iterator[Labelled | Unusable]:
    for index, name in enumerate(data.names):
        try:
            image, mask = data.load(index)
        except Exception as error:  # a damaged or vanished file, or one too large for the memory
            yield Unusable(name, one_line(error))
            continue
        yield Labelled(name, "", image, mask)
