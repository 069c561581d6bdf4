"""The data sets of a training configuration."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from frd_model.data.augment import Augmentation, MvssAugmentation
from frd_model.data.balanced_sampler import BalancedSampler
from frd_model.data.dataset import FolderDataset, ForgeryDataset, JoinedDataset, PairDataset
from frd_model.data.files import describe_skipped, name_bytes, real_path
from frd_model.data.forge_options import ForgeOptions
from frd_model.data.photos import sample_files, sample_photos
from frd_model.data.protocols import PROTOCOLS, select_lists
from frd_model.data.sets import join_sets, open_sets
from frd_model.data.transforms import mask_to_tensor, squash, to_tensor
from frd_model.output import one_line, say

from .config import ConfigError, DataSection, TrainConfig, convert

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
REPLACEMENTS = 20


class Failure(NamedTuple):
    """A photo that could not be used, and the reason in one line."""

    name: str
    reason: str


class Sample(NamedTuple):
    """image [3, crop, crop] and mask [1, crop, crop], or None if no photo could be read. failures: skipped photos."""

    image: Tensor | None
    mask: Tensor | None
    failures: Sequence[Failure] = ()


class ValidationData(Protocol):
    """Whole photos with their masks."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[UInt8, Bool]:
        """Photo uint8 RGB [H, W, 3] and mask bool [H, W]; ValueError or OSError for a file that cannot be used."""


Augment = Callable[[UInt8, Bool, int], tuple[UInt8, Bool]]


class TrainingPairs(Dataset[Sample]):
    """Augmented views of the photos of a `PairDataset`.

    A sample depends only on (seed, epoch, index) and the files, not on the worker. A photo that cannot be used is
    reported in `Sample.failures` and replaced by another one, drawn by the same rule.
    """

    def __init__(self, pairs: PairDataset, augmentation: Augment, seed: int) -> None:
        self.pairs = pairs
        self.augmentation = augmentation
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        seed = int(rng.integers(2**63))
        failures: list[Failure] = []
        for number in self._candidates(index, rng):
            try:
                image, mask = self.pairs.load(number)
            except (ValueError, OSError) as error:
                failures.append(failure(self.pairs, number, error))
                continue
            image, mask = self.augmentation(image, mask, seed)
            return Sample(to_tensor(image), mask_to_tensor(mask), failures)
        return Sample(None, None, failures)

    def _candidates(self, index: int, rng: np.random.Generator) -> Iterator[int]:
        number = index % len(self.pairs)
        yield number
        alike = self._alike(number)
        others = rng.permutation(len(alike))[: REPLACEMENTS + 1]
        yield from (alike[other] for other in others if alike[other] != number)

    def _alike(self, number: int) -> range:
        """The photos one of which replaces a photo."""
        return range(len(self.pairs))


class BalancedPairs(TrainingPairs):
    """As many photos of each set of a `JoinedDataset` in an epoch; see `BalancedSampler`.

    An epoch takes the indices of `order`. Those of a photo that comes again are higher by the number of photos each
    time, so that it is augmented anew.
    """

    def __init__(
        self, pairs: PairDataset, augmentation: Augment, seed: int, per_set: int, replacement: bool = False
    ) -> None:
        super().__init__(pairs, augmentation, seed)
        self.sets = list(pairs.parts.values()) if isinstance(pairs, JoinedDataset) else [range(len(pairs))]
        self.sampler = BalancedSampler(self.sets, per_set, seed, replacement=replacement)

    def __len__(self) -> int:
        return self.sampler.total

    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch."""
        times: Counter[int] = Counter()
        indices = []
        for number in self.sampler.order(epoch):
            indices.append(number + times[number] * len(self.pairs))
            times[number] += 1
        return indices

    def _alike(self, number: int) -> range:
        return next(part for part in self.sets if number in part)


class SquarePairs(PairDataset):
    """The photos of a set with their masks, resized to squares as the training images are."""

    def __init__(self, source: PairDataset, side: int) -> None:
        super().__init__(source.pairs)
        self.names = source.names
        self._source, self._side = source, side

    def load_mask(self, index: int, size: tuple[int, int] | None = None) -> Bool | None:
        """See `PairDataset.load_mask`; at the mask's own size."""
        return self._source.load_mask(index, size)

    def load(self, index: int) -> tuple[UInt8, Bool]:
        """Photo uint8 RGB [side,side,3] and mask bool [side,side]."""
        return squash(*self._source.load(index), self._side)


class ForgedValidation:
    """The photos of a `ForgeryDataset`, each generated once per run."""

    def __init__(self, source: ForgeryDataset) -> None:
        self.source = source
        self.made: dict[int, tuple[UInt8, Bool]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[UInt8, Bool]:
        """See `ValidationData`."""
        if index not in self.made:
            forgery = self.source.forgery(index)
            self.made[index] = forgery.image, forgery.mask
        return self.made[index]


class FolderForgeries(ForgeryDataset):
    """Forgeries of the photos of a folder, `files`."""

    files: Sequence[Path] = ()


def failure(data: Any, index: int, error: Exception) -> Failure:
    """The failure to report for a photo of a `PairDataset` that could not be loaded; others do not read files."""
    if pairs_of(data) is None:
        raise error
    name, reason = str(data.pairs[index].image), one_line(error)
    return Failure(name, reason if repr(name) in reason else f"{name!r}: {reason}")


def collate(samples: Sequence[Any]) -> tuple[Tensor | None, Tensor | None, list[Failure]]:
    """Images [B, 3, H, W] and masks [B, 1, H, W] (None if no sample has one), and the failures of the samples."""
    made = [Sample(*sample) for sample in samples]
    failures = [failed for sample in made for failed in sample.failures]
    images = [sample.image for sample in made if sample.image is not None]
    masks = [sample.mask for sample in made if sample.mask is not None]
    if not images:
        return None, None, failures
    return torch.stack(images), torch.stack(masks), failures


def start_worker(_: int) -> None:
    """Turn off OpenCV's threads, which do not survive the fork of a process that has used them."""
    cv2.setNumThreads(0)


def open_data(config: TrainConfig) -> tuple[Any, ValidationData]:
    """Training set, with `set_epoch`, and validation set. ConfigError or DatasetError if they cannot be opened."""
    data = config.data
    # Checked even if the section is not used.
    forge_options(data.forge)
    held = _open_sets(data, "val")
    validation = join_sets(held) if held else None
    if data.source == "sample":
        return open_training_data(config), validation or _forged_validation(data)
    sets = _open_sets(data, "train")
    per_set, replacement = data.per_set, data.replacement
    if data.protocol is not None:
        protocol = PROTOCOLS[data.protocol]
        sets = select_lists(data.protocol, sets)
        per_set = protocol.per_set if per_set is None else per_set
        replacement = protocol.replacement if replacement is None and per_set else replacement
    if per_set is None and replacement is not None:
        raise ConfigError("data.replacement goes with data.per_set, the photos of each set, got none")
    if validation is None:
        sets, validation = split_sets(sets, data.val_share, data.val_seed, per_set)
    if data.resize:
        validation = SquarePairs(validation, data.resize)
    pairs, augment = join_sets(sets), _augmentation(data)
    if per_set is None:
        return TrainingPairs(pairs, augment, config.seed), validation
    return BalancedPairs(pairs, augment, config.seed, per_set, bool(replacement)), validation


def open_training_data(config: TrainConfig) -> Any:
    """Samples (image [3, crop, crop], mask [1, crop, crop]); forged anew every epoch for the sample photos."""
    data = config.data
    if data.source != "sample":
        return open_data(config)[0]
    return _forgeries(data, "train", data.samples, config.seed, data.colour, data.focus)


def open_validation_data(config: TrainConfig) -> ValidationData:
    """The fixed validation set: the same photos in every epoch, and in every run of the same val_seed."""
    return open_data(config)[1]


def split(pairs: PairDataset, share: float, seed: int) -> tuple[PairDataset, PairDataset]:
    """Split into a training and a validation set. A fraction `share` of the photos with and of those without a mask
    is held out, at least one photo, and one with a mask if there are two of them.
    """
    training, validation = split_sets({"": pairs}, share, seed)
    return training[""], validation


def split_sets(
    sets: Mapping[str, PairDataset], share: float, seed: int, per_set: int | None = None
) -> tuple[dict[str, PairDataset], PairDataset]:
    """Hold photos out of each set as `split` does; with `per_set` a fraction of an epoch's photos, not of all.

    A file that several records or sets name is held out of all of them.
    """
    held: dict[str, list[int]] = {}
    for name, pairs in sets.items():
        part = share if per_set is None else share * min(1.0, per_set / len(pairs))
        held[name] = _held_out(pairs, part, seed)
    validation = {name: sets[name].subset(indices) for name, indices in held.items() if indices}
    # Of the folders alone: to resolve every file of a large set takes a minute.
    folder = functools.cache(real_path)
    files = {(folder(p.image.parent), p.image.name) for pairs in validation.values() for p in pairs.pairs}
    training = {}
    for name, pairs in sets.items():
        kept = [i for i, p in enumerate(pairs.pairs) if (folder(p.image.parent), p.image.name) not in files]
        if files and not kept:
            raise ConfigError(
                f"training set {name} must keep photos beside those held out for validation, got none"
            )
        training[name] = pairs.subset(kept) if kept else pairs
    if not validation:
        raise ConfigError(
            f"the training set must have two photos with a mask or two without for a validation set to be held out, "
            f"got {sum(map(len, sets.values()))}; give data.val_images and data.val_masks, data.val_json or data.val"
        )
    return training, join_sets(validation)


def _held_out(pairs: PairDataset, share: float, seed: int) -> list[int]:
    rng = np.random.default_rng([seed, len(pairs)])
    held_out: set[int] = set()
    for masked in (True, False):
        group = [i for i, pair in enumerate(pairs.pairs) if (pair.mask is not None) == masked]
        minimum = 1 if len(group) > 1 and not held_out else 0
        count = min(max(round(share * len(group)), minimum), max(len(group) - 1, 0))
        held_out |= {group[i] for i in rng.permutation(len(group))[:count]}
    return sorted(held_out)


def pairs_of(data: Any) -> PairDataset | None:
    """The files behind a set, or None for generated photos."""
    data = data.pairs if isinstance(data, TrainingPairs) else data
    return data if isinstance(data, PairDataset) else None


def files_of(data: Any) -> list[Path] | None:
    """The files of a set's photos, those that forgeries are made of included; None for the packaged photos."""
    data = data.source if isinstance(data, ForgedValidation) else data
    if isinstance(data, FolderForgeries):
        return list(data.files)
    pairs = pairs_of(data)
    return None if pairs is None else [pair.image for pair in pairs.pairs]


def digest(data: Any) -> str:
    """Count and hash of the files of a set, in order; "" for the packaged photos, which the code determines."""
    pairs, files = pairs_of(data), files_of(data)
    if files is None:
        return ""
    masks = [None] * len(files) if pairs is None else [pair.mask for pair in pairs.pairs]
    lines = [f"{file.name}\0{mask.name if mask else ''}" for file, mask in zip(files, masks, strict=True)]
    return f"{len(lines)} photos ({hashlib.sha256(name_bytes(chr(10).join(lines))).hexdigest()[:12]})"


def describe(data: Any) -> str:
    """ "12 photos, 10 of them with a mask"."""
    pairs = pairs_of(data)
    if pairs is None:
        return f"{len(data)} generated photos"
    text = f"{len(pairs)} photos, {sum(pair.mask is not None for pair in pairs.pairs)} of them with a mask"
    if isinstance(data, BalancedPairs):
        sets = pairs.parts if isinstance(pairs, JoinedDataset) else {"the set": range(len(pairs))}
        sizes = ", ".join(f"{name} {len(part)}" for name, part in sets.items())
        text += f" ({data.sampler.per_set} in an epoch of each of {sizes})"
    return text


def count_photos(data: Any) -> int:
    """Photos of a set, which may be more than an epoch takes."""
    pairs = pairs_of(data)
    return len(data if pairs is None else pairs)


def forge_options(values: dict[str, Any]) -> ForgeOptions:
    """ForgeOptions from plain values; ConfigError for an unknown key or a value out of range."""
    known = typing.get_type_hints(ForgeOptions)
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = f"data.forge.{key}"
        if key not in known:
            raise ConfigError(f"unknown key {name}; known here: {', '.join(sorted(known))}")
        fields[key] = convert(known[key], value, name)
    try:
        return ForgeOptions(**fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"data.forge: {error}") from None


def _forged_validation(data: DataSection) -> ForgedValidation:
    return ForgedValidation(_forgeries(data, "val", data.val_samples, data.val_seed))


def _forgeries(
    data: DataSection, photos: str, length: int, seed: int, colour: float = 0.0, focus: float = 0.0
) -> ForgeryDataset:
    found = sample_files(photos, data.photos)
    if found.skipped:
        say(f"not used of {data.photos}: {describe_skipped(found.skipped)}", sys.stderr)
    made = (ForgeryDataset if data.photos is None else FolderForgeries)(
        sample_photos(photos, data.photos),
        size=data.crop,
        length=length,
        seed=seed,
        authentic=data.authentic,
        options=forge_options(data.forge),
        zoom=data.zoom,
        colour=colour,
        focus=focus,
    )
    if isinstance(made, FolderForgeries):
        made.files = found.images
    return made


def _augmentation(data: DataSection) -> Augment:
    """The configured changes of a photo of data.crop pixels, or of data.resize."""
    side, resize = data.resize or data.crop, data.resize is not None
    values = dataclasses.asdict(data.augment)
    if values.pop("preset") == "mvss":
        return MvssAugmentation(side, resize=resize)
    return Augmentation(side, resize=resize, **values)


def _open_sets(data: DataSection, part: str) -> dict[str, PairDataset]:
    """The data sets that the configuration names for a part ("train" or "val"); none if it names none."""
    images, masks, listed = (getattr(data, f"{part}_{kind}") for kind in ("images", "masks", "json"))
    specs = getattr(data, part) if listed is None else [f"json:{listed}"]
    if specs:
        sets = open_sets(specs, invert_masks=data.invert_masks, recursive=data.recursive)
    elif images is not None:
        folders = FolderDataset(
            images, masks, allow_authentic=True, invert_masks=data.invert_masks, recursive=data.recursive
        )
        sets = {"photos": folders}
    else:
        return {}
    for name, found in sets.items():
        if found.skipped:
            where = name if specs else f"{images} and {masks}"
            say(f"not used of {where}: {describe_skipped(found.skipped)}", sys.stderr)
    return sets
