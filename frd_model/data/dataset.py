"""Data sets of pairs: image [3,H,W] float32, ImageNet-normalised, and mask [1,H,W] float32 in {0, 1}."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .audit import Audit, audit
from .files import PathLike, Skipped, describe_skipped, expand_user, scan_folder
from .forge import Forger, Forgery
from .forge_options import ForgeOptions
from .handoff import view_side
from .images import ImageError, read_image, read_mask
from .pairing import DatasetError, Pair, pair_by_name, read_list
from .transforms import is_coloured, mask_to_tensor, random_focus, random_look, random_view, resize, to_tensor

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
        focus: probability of a view with a shallow depth of field (see `random_focus`).
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
        focus: float = 0.0,
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
        if authentic < 1:
            self.options.check_donors(len(self.photos))
        self.zoom = zoom
        self.colour = colour
        self.focus = focus
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
        side = view_side(rng, self.size, self.options)
        photo = self._view(rng, host, side)
        forger, size = Forger(rng, self.options), (self.size, self.size)
        if rng.random() < self.authentic:
            return forger.authentic(photo, size)
        other = self._donor(rng, host)
        return forger.forge(photo, None if other is None else self._view(rng, other, side), size=size)

    def _view(self, rng: np.random.Generator, number: int, side: int) -> UInt8:
        view = random_view(rng, self.photos[number], side, self.zoom)
        if self.focus and rng.random() < self.focus:
            view = random_focus(rng, view)
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


def is_inverted(mask: Bool) -> bool:
    """Whether a mask [H,W] marks more than half of its photo, which suggests that it is black where edited."""
    return bool(mask.mean() > 0.5)


class PairDataset(Dataset[Sample]):
    """Photos and masks on disk. `pairs` lists the files, `names` the photos' names.

    Args:
        pairs: the files, in order.
        size: (height, width) to resize to, or None for each photo's own size (batches then need equal photos).
        invert_masks: for data sets whose masks are white on untouched pixels.
        reader: decodes a mask; for data sets whose masks are not black-and-white images (`frd_model.data.layouts`).
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        size: tuple[int, int] | None = None,
        invert_masks: bool = False,
        reader: Callable[..., Bool] = read_mask,
    ) -> None:
        if not pairs:
            raise DatasetError("pairs must hold at least one photo, got none")
        self.pairs = list(pairs)
        self.names = [pair.image.name for pair in self.pairs]
        self.size = size
        self.invert_masks = invert_masks
        self.skipped: list[Skipped] = []
        self._read_mask = reader

    def __len__(self) -> int:
        return len(self.pairs)

    def subset(self, indices: Sequence[int]) -> PairDataset:
        """The pairs of these numbers, loaded as they are here."""
        return _Subset(self, indices)

    def load_mask(self, index: int, size: tuple[int, int] | None = None) -> Bool | None:
        """Mask bool [H,W] of a pair, None for an untouched photo. ImageError if it is not a mask of that size."""
        mask = self.pairs[index].mask
        return None if mask is None else self._read_mask(mask, size, invert=self.invert_masks)

    def load(self, index: int) -> tuple[UInt8, Bool]:
        """Photo uint8 RGB [H,W,3] and mask bool [H,W] at their own size; ImageError if the sizes differ."""
        image = read_image(self.pairs[index].image)
        size = (image.shape[0], image.shape[1])
        mask = self.load_mask(index, size)
        return image, np.zeros(size, np.bool_) if mask is None else mask

    def __getitem__(self, index: int) -> Sample:
        image, mask = self.load(index)
        if self.size is not None:
            image, mask = resize(image, mask, self.size)
        return to_tensor(image), mask_to_tensor(mask)

    def check(self) -> list[str]:
        """One line for each pair that is unreadable, has two sizes, appears twice, or has an inverted mask."""
        return self.inspect().faults

    def inspect(self) -> Audit:
        """Read every pair: the faults of `check`, and notes on what may be intended."""
        return audit(self)

    def inverted_masks(self, sample: int = 200) -> str:
        """One line if masks mark more than half of their photo, so that they seem black where edited; else "".

        Reads at most `sample` masks, spread over the set, and no photos, so it is cheap before long work. Masks that
        cannot be read are skipped: `load` reports them.
        """
        masked = [index for index, pair in enumerate(self.pairs) if pair.mask is not None]
        read, inverted = 0, []
        for index in masked[:: max(1, -(-len(masked) // sample))]:
            try:
                mask = self.load_mask(index)
            except ImageError:
                continue
            read += 1
            if mask is not None and is_inverted(mask):
                inverted.append(self.pairs[index].mask)
        if not inverted:
            return ""
        return (
            f"{len(inverted)} of {read} masks read mark more than half of their photo, the first "
            f"{str(inverted[0])!r}: inverted? They must be white where edited"
        )


class _Subset(PairDataset):
    def __init__(self, source: PairDataset, indices: Sequence[int]) -> None:
        super().__init__([source.pairs[i] for i in indices], source.size, source.invert_masks)
        self.names = [source.names[i] for i in indices]
        self._source, self._indices = source, list(indices)

    def load_mask(self, index: int, size: tuple[int, int] | None = None) -> Bool | None:
        return self._source.load_mask(self._indices[index], size)

    def load(self, index: int) -> tuple[UInt8, Bool]:
        return self._source.load(self._indices[index])


class JoinedDataset(PairDataset):
    """Several data sets as one. `parts` are the numbers of the pairs of each, by its name; `names` begin with it."""

    def __init__(self, sets: Mapping[str, PairDataset]) -> None:
        super().__init__([pair for data in sets.values() for pair in data.pairs])
        self.names = [f"{name}/{photo}" for name, data in sets.items() for photo in data.names]
        self.skipped = [entry for data in sets.values() for entry in data.skipped]
        self.parts: dict[str, range] = {}
        start = 0
        for name, data in sets.items():
            self.parts[name] = range(start, start + len(data))
            start += len(data)
        self._places = [(data, i) for data in sets.values() for i in range(len(data))]

    def load_mask(self, index: int, size: tuple[int, int] | None = None) -> Bool | None:
        data, place = self._places[index]
        return data.load_mask(place, size)

    def load(self, index: int) -> tuple[UInt8, Bool]:
        data, place = self._places[index]
        return data.load(place)


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

    @classmethod
    def untouched(cls, images: PathLike, recursive: bool = False) -> PairDataset:
        """A folder of untouched photos, without masks."""
        folder = expand_user(images)
        try:
            found = scan_folder(folder, recursive)
        except ImageError as error:
            raise DatasetError(str(error)) from None
        if not found.images:
            held = describe_skipped(found.skipped) or "nothing"
            raise DatasetError(f"folder {str(folder)!r} must hold at least one photo, got {held}")
        data = PairDataset([Pair(file, None) for file in found.images])
        data.names = [file.relative_to(folder).as_posix() for file in found.images]
        data.skipped = found.skipped
        return data


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
