"""Data sets of pairs: image [3,H,W] float32, ImageNet-normalised, and mask [1,H,W] float32 in {0, 1}."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .files import PathLike, Skipped, describe_skipped, expand_user
from .forge import Forger, Forgery
from .forge_options import ForgeOptions
from .images import ImageError, read_image, read_mask
from .pairing import DatasetError, Pair, pair_by_name, read_list
from .transforms import is_coloured, mask_to_tensor, random_look, random_view, resize, to_tensor

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Sample = tuple[Tensor, Tensor]


class ForgeryDataset(Dataset[Sample]):
    """Forgeries made on the fly from photos: a random view, then an edit, or none (a fraction `authentic`).

    A sample depends on (seed, epoch, index) only, not on worker or order. Call `set_epoch` before
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
        """Another photo: in three of four cases in colour for a colour host, and grey for a grey host.

        Otherwise colour inside a grey photo would be an easy cue in many samples, and in no real photo.
        """
        others = np.delete(np.arange(len(self.photos)), host)
        same_kind = others[self._coloured[others] == self._coloured[host]]
        if len(same_kind) and rng.random() < 0.75:
            others = same_kind
        return int(rng.choice(others)) if len(others) else None

    def __getitem__(self, index: int) -> Sample:
        forgery = self.forgery(index)
        return to_tensor(forgery.image), mask_to_tensor(forgery.mask)


class Inspection(NamedTuple):
    """What `frd data check` reports: faults, notes on what may be intended, and the number of untouched photos."""

    faults: list[str]
    notes: list[str]
    untouched: int


def _note(files: list[Path], what: str) -> str:
    return f"{len(files)} {what}, the first {str(files[0])!r}" if files else ""


def is_inverted(mask: Bool) -> bool:
    """Whether a mask [H,W] marks more than half of its photo, which suggests that it is black where edited."""
    return bool(mask.mean() > 0.5)


class PairDataset(Dataset[Sample]):
    """Photos and masks on disk. `pairs` lists the files, `names` the photos' names.

    Args:
        pairs: the files, in order.
        size: (height, width) to resize to, or None for each photo's own size (batches then need equal photos).
        invert_masks: for data sets whose masks are white on untouched pixels.
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
        self.skipped: list[Skipped] = []

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[UInt8, Bool]:
        """Photo uint8 RGB [H,W,3] and mask bool [H,W] at their own size; ImageError if the sizes differ."""
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
        """One line for each pair that is unreadable, has two sizes, appears twice, or has an inverted mask."""
        return self.inspect().faults

    def inspect(self) -> Inspection:
        """Read every pair: the faults of `check`, and notes on what may be intended."""
        faults: list[str] = []
        black: list[Path] = []
        twins: list[Path] = []
        seen: dict[bytes, tuple[Path, bool]] = {}
        for index, pair in enumerate(self.pairs):
            try:
                _, mask = self.load(index)
                digest = hashlib.sha256(pair.image.read_bytes()).digest()
            except (ValueError, OSError) as error:
                faults.append(" ".join(str(error).split()))
                continue
            edited = bool(mask.any())
            if digest not in seen:
                seen[digest] = (pair.image, edited)
            elif edited or seen[digest][1]:
                other = str(seen[digest][0])
                faults.append(f"photo {str(pair.image)!r} must stand once, got the same file as {other!r}")
            else:
                twins.append(pair.image)
            if pair.mask is not None and not edited:
                black.append(pair.mask)
            elif is_inverted(mask):
                faults.append(
                    f"mask {str(pair.mask)!r} must be white where edited, got {mask.mean():.0%} white (inverted?)"
                )
        notes = [
            _note(black, "black masks, whose photos count as untouched"),
            _note(twins, "untouched photos that stand there before"),
            f"passed over {describe_skipped(self.skipped)}" if self.skipped else "",
        ]
        untouched = len(black) + sum(pair.mask is None for pair in self.pairs)
        return Inspection(faults, [note for note in notes if note], untouched)

    def inverted_masks(self, sample: int = 200) -> str:
        """One line if masks mark more than half of their photo, so that they seem black where edited; else "".

        Reads at most `sample` masks, spread over the set, and no photos, so it is cheap before long work. Masks that
        cannot be read are skipped: `load` reports them.
        """
        paths = [pair.mask for pair in self.pairs if pair.mask is not None]
        read, inverted = 0, []
        for path in paths[:: max(1, -(-len(paths) // sample))]:
            try:
                mask = read_mask(path, invert=self.invert_masks)
            except ImageError:
                continue
            read += 1
            if is_inverted(mask):
                inverted.append(path)
        if not inverted:
            return ""
        return (
            f"{len(inverted)} of {read} masks read mark more than half of their photo, the first "
            f"{str(inverted[0])!r}: inverted? They must be white where edited"
        )


class FolderDataset(PairDataset):
    """A folder of photos and one of masks, paired by name: NAME.* with NAME.*, NAME_gt.* or NAME_mask.*.

    A photo without a mask is an error that names it, unless `allow_authentic` counts it as untouched. A mask
    without a photo is always an error, since it means that names do not match. With `recursive`, sub-folders
    are read too, and a name is the path below the folder. `skipped` lists what is not an image.
    """

    def __init__(
        self,
        images: PathLike,
        masks: PathLike,
        size: tuple[int, int] | None = None,
        allow_authentic: bool = False,
        invert_masks: bool = False,
        recursive: bool = False,
    ) -> None:
        folder = expand_user(images)
        pairing = pair_by_name(folder, expand_user(masks), allow_authentic, recursive)
        super().__init__(pairing.pairs, size, invert_masks)
        self.names = [pair.image.relative_to(folder).as_posix() for pair in self.pairs]
        self.skipped = pairing.skipped


class ManiDataset(FolderDataset):
    """The layout DIR/Tp (photos) and DIR/Gt (masks) of IMDL-BenCo, paired by name, not by order."""

    def __init__(
        self,
        root: PathLike,
        size: tuple[int, int] | None = None,
        invert_masks: bool = False,
        recursive: bool = False,
    ) -> None:
        folder = expand_user(root)
        super().__init__(folder / "Tp", folder / "Gt", size, False, invert_masks, recursive)


class JsonDataset(PairDataset):
    """A JSON list [[image, mask or "Negative"], ...]; relative paths start at the JSON file's folder.

    If a file of the list is missing, `load` raises an error for its pair; if no pair is complete, the constructor
    does.
    """

    def __init__(
        self, path: PathLike, size: tuple[int, int] | None = None, invert_masks: bool = False
    ) -> None:
        pairs, self._missing = read_list(expand_user(path))
        super().__init__(pairs, size, invert_masks)

    def load(self, index: int) -> tuple[UInt8, Bool]:
        """See `PairDataset.load`."""
        for file in self.pairs[index]:
            if file in self._missing:
                raise ImageError(self._missing[file])
        return super().load(index)
