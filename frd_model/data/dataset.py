"""Data sets of pairs: image [3,H,W] float32, ImageNet-normalised, and mask [1,H,W] float32 in {0, 1}."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .forge import ForgeOptions, Forger, Forgery
from .images import EXTENSIONS, PathLike, find_images, read_image, read_mask
from .transforms import is_coloured, mask_to_tensor, random_look, random_view, resize, to_tensor

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Sample = tuple[Tensor, Tensor]


class DatasetError(ValueError):
    """A data set whose files do not fit together; one line with the path, the rule and what came."""


class ForgeryDataset(Dataset[Sample]):
    """Forgeries made on the fly from photos: a random view, then an edit, or none (share `authentic`).

    An item depends on (seed, epoch, index) alone, whatever the worker or the order. Call `set_epoch` before
    each epoch; it reaches running workers too.

    Args:
        photos: name to uint8 RGB [H,W,3], or a sequence of photos.
        size: side of the square samples.
        length: samples per epoch.
        zoom: range of the random resize (see `random_view`).
        colour: probability of a colour change of the whole photo.
        colour_weight: how much more often a colour photo is the host than a grey one.
    """

    def __init__(
        self,
        photos: Mapping[str, UInt8] | Sequence[UInt8],
        size: int = 256,
        length: int = 1000,
        seed: int = 0,
        authentic: float = 0.15,
        options: ForgeOptions | None = None,
        zoom: tuple[float, float] = (0.5, 1.25),
        colour: float = 0.5,
        colour_weight: float = 3.0,
    ) -> None:
        self.photos = list(photos.values()) if isinstance(photos, Mapping) else list(photos)
        if not self.photos:
            raise ValueError("photos must hold at least one photo, got none")
        if size < 32 or length < 1:
            raise ValueError(f"size must be at least 32 and length at least 1, got {size} and {length}")
        if not 0 <= authentic <= 1:
            raise ValueError(f"authentic must be a probability, got {authentic}")
        self.size = size
        self.length = length
        self.seed = seed
        self.authentic = authentic
        self.options = options or ForgeOptions()
        self.zoom = zoom
        self.colour = colour
        if not colour_weight > 0:
            raise ValueError(f"colour_weight must be above 0, got {colour_weight}")
        self._coloured = np.array([is_coloured(photo) for photo in self.photos])
        weights = np.where(self._coloured, colour_weight, 1.0)
        self._host_weights = weights / weights.sum()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.length

    def forgery(self, index: int) -> Forgery:
        """The sample before its conversion to tensors."""
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in [0, {self.length}), got {index}")
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        host = int(rng.choice(len(self.photos), p=self._host_weights))
        photo = self._view(rng, host)
        forger = Forger(rng, self.options)
        if rng.random() < self.authentic:
            return forger.authentic(photo)
        other = self._donor(rng, host)
        return forger.forge(photo, None if other is None else self._view(rng, other))

    def _view(self, rng: np.random.Generator, number: int) -> UInt8:
        view = random_view(rng, self.photos[number], self.size, self.zoom)
        return random_look(rng, view, self.colour)

    def _donor(self, rng: np.random.Generator, host: int) -> int | None:
        """Another photo, three times of four a colour one for a colour host and a grey one for a grey host.

        Otherwise colour inside grey would be the easiest cue of many samples, and of no real photo.
        """
        others = np.delete(np.arange(len(self.photos)), host)
        alike = others[self._coloured[others] == self._coloured[host]]
        if len(alike) and rng.random() < 0.75:
            others = alike
        return int(rng.choice(others)) if len(others) else None

    def __getitem__(self, index: int) -> Sample:
        forgery = self.forgery(index)
        return to_tensor(forgery.image), mask_to_tensor(forgery.mask)


class Pair(NamedTuple):
    """A photo file and its mask file, or None for an untouched photo."""

    image: Path
    mask: Path | None


class PairDataset(Dataset[Sample]):
    """Photos and masks on disk. `pairs` lists the files, `names` the photos' names.

    Args:
        pairs: the files, in order. size: None for each photo's own size (batches then need equal photos), or
        (height, width) to resize to. invert_masks: for data sets whose masks are white on untouched pixels.
    """

    def __init__(
        self, pairs: Sequence[Pair], size: tuple[int, int] | None = None, invert_masks: bool = False
    ) -> None:
        if not pairs:
            raise DatasetError("pairs must hold at least one photo, got none")
        self.pairs = list(pairs)
        self.names = [pair.image.name for pair in self.pairs]
        self.size = size
        self.invert_masks = invert_masks

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[UInt8, Bool]:
        """Photo uint8 RGB [H,W,3] and mask bool [H,W] at their own size; ImageError where they do not fit."""
        pair = self.pairs[index]
        image = read_image(pair.image)
        size = (image.shape[0], image.shape[1])
        if pair.mask is None:
            return image, np.zeros(size, np.bool_)
        return image, read_mask(pair.mask, size, invert=self.invert_masks)

    def __getitem__(self, index: int) -> Sample:
        image, mask = self.load(index)
        if self.size is not None:
            image, mask = resize(image, mask, self.size)
        return to_tensor(image), mask_to_tensor(mask)

    def check(self) -> list[str]:
        """One line for each pair that is unreadable, of two sizes, stands twice, or has an odd mask."""
        problems = []
        seen: dict[bytes, Path] = {}
        for index, pair in enumerate(self.pairs):
            try:
                _, mask = self.load(index)
            except ValueError as error:
                problems.append(str(error))
                continue
            digest = hashlib.sha256(pair.image.read_bytes()).digest()
            if digest in seen:
                problems.append(
                    f"photo {str(pair.image)!r} must stand once, got the same file as {str(seen[digest])!r}"
                )
            seen.setdefault(digest, pair.image)
            share = float(mask.mean())
            if pair.mask is not None and share == 0:
                problems.append(f"mask {str(pair.mask)!r} must mark edited pixels, got none above 127")
            elif share > 0.5:
                problems.append(
                    f"mask {str(pair.mask)!r} must be white where edited, got {share:.0%} white (inverted?)"
                )
        return problems


class FolderDataset(PairDataset):
    """A folder of photos and one of masks, paired by name: NAME.* with NAME.*, NAME_gt.* or NAME_mask.*.

    A photo without a mask is an error that names it, unless `allow_authentic` counts it as untouched. A mask
    without a photo is always an error: it means that names do not match.
    """

    def __init__(
        self,
        images: PathLike,
        masks: PathLike,
        size: tuple[int, int] | None = None,
        allow_authentic: bool = False,
        invert_masks: bool = False,
    ) -> None:
        super().__init__(_pair_by_name(Path(images), Path(masks), allow_authentic), size, invert_masks)


class ManiDataset(FolderDataset):
    """The layout DIR/Tp (photos) and DIR/Gt (masks) of IMDL-BenCo, paired by name, not by order."""

    def __init__(
        self, root: PathLike, size: tuple[int, int] | None = None, invert_masks: bool = False
    ) -> None:
        super().__init__(Path(root, "Tp"), Path(root, "Gt"), size, invert_masks=invert_masks)


class JsonDataset(PairDataset):
    """A JSON list [[image, mask or "Negative"], ...]; relative paths start at the JSON file's folder."""

    def __init__(
        self, path: PathLike, size: tuple[int, int] | None = None, invert_masks: bool = False
    ) -> None:
        super().__init__(_read_list(Path(path)), size, invert_masks)


def _pair_by_name(images: Path, masks: Path, allow_authentic: bool) -> list[Pair]:
    for folder in (images, masks):
        if not folder.is_dir():
            raise DatasetError(f"folder {str(folder)!r} must be a directory, got none there")
    photos = find_images(images)
    found: dict[str, Path] = {}
    for entry in sorted(masks.iterdir()):
        if entry.suffix.lower() in EXTENSIONS and not entry.name.startswith("."):
            if entry.stem in found:
                raise DatasetError(
                    f"mask {str(entry)!r} must have a name of its own, got {found[entry.stem].name!r}"
                )
            found[entry.stem] = entry
    pairs, used = [], set()
    for photo in photos:
        stem = next((s for s in (photo.stem, f"{photo.stem}_gt", f"{photo.stem}_mask") if s in found), None)
        if stem is None and not allow_authentic:
            raise DatasetError(
                f"photo {str(photo)!r} must have a mask of its name in {str(masks)!r}, got none"
            )
        if stem in used:
            raise DatasetError(f"photo {str(photo)!r} must have a name of its own, got another of its name")
        if stem is not None:
            used.add(stem)
        pairs.append(Pair(photo, found[stem] if stem is not None else None))
    stray = sorted(set(found) - used)
    if stray:
        raise DatasetError(
            f"mask {str(found[stray[0]])!r} must belong to a photo in {str(images)!r}, got none"
        )
    return pairs


def _read_list(path: Path) -> list[Pair]:
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"list {str(path)!r} must be a readable file, got: {error.strerror}") from None
    except ValueError as error:
        raise DatasetError(f"list {str(path)!r} must be JSON, got: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"list {str(path)!r} must hold a JSON list of pairs, got {type(entries).__name__}")
    pairs = []
    for number, entry in enumerate(entries):
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
            raise DatasetError(
                f'list {str(path)!r} entry {number} must be [image, mask or "Negative"], got {entry!r}'
            )
        image = path.parent / entry[0]
        mask = None if entry[1] == "Negative" else path.parent / entry[1]
        for file in (image, mask):
            if file is not None and not file.is_file():
                raise DatasetError(f"list {str(path)!r} entry {number} must name files, got {str(file)!r}")
        pairs.append(Pair(image, mask))
    return pairs
