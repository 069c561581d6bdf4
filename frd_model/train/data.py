"""The data sets of a training configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from frd_model.data.augment import Augmentation
from frd_model.data.dataset import FolderDataset, ForgeryDataset, JsonDataset, PairDataset
from frd_model.data.files import describe_skipped
from frd_model.data.forge_options import ForgeOptions
from frd_model.data.photos import sample_photos
from frd_model.data.transforms import mask_to_tensor, to_tensor
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


class TrainingPairs(Dataset[Sample]):
    """Augmented crops of the photos of a `PairDataset`.

    A sample depends only on (seed, epoch, index) and the files, not on the worker. A photo that cannot be used is
    reported in `Sample.failures` and replaced by another one, drawn by the same rule.
    """

    def __init__(self, pairs: PairDataset, augmentation: Augmentation, seed: int) -> None:
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

    def _candidates(self, index: int, rng: np.random.Generator) -> typing.Iterator[int]:
        yield index
        others = rng.permutation(len(self.pairs))[: REPLACEMENTS + 1]
        yield from (int(other) for other in others if other != index)


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


def failure(data: Any, index: int, error: Exception) -> Failure:
    """The failure to report for a photo of a `PairDataset` that could not be loaded."""
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
    validation = _open_pairs(data, "val")
    if data.source == "sample":
        return open_training_data(config), validation or _forged_validation(data)
    pairs = cast(PairDataset, _open_pairs(data, "train"))
    if validation is None:
        pairs, validation = split(pairs, data.val_share, data.val_seed)
    augmentation = Augmentation(data.crop, **dataclasses.asdict(data.augment))
    return TrainingPairs(pairs, augmentation, config.seed), validation


def open_training_data(config: TrainConfig) -> Any:
    """Samples (image [3, crop, crop], mask [1, crop, crop]); forged anew every epoch for the sample photos."""
    data = config.data
    if data.source != "sample":
        return open_data(config)[0]
    return _forgeries(data, "train", data.samples, config.seed, data.colour)


def open_validation_data(config: TrainConfig) -> ValidationData:
    """The fixed validation set: the same photos in every epoch, and in every run of the same val_seed."""
    return open_data(config)[1]


def split(pairs: PairDataset, share: float, seed: int) -> tuple[PairDataset, PairDataset]:
    """Split into a training and a validation set. A fraction `share` of the photos with and of those without a mask
    is held out, at least one photo, and one with a mask if there are two of them.
    """
    rng = np.random.default_rng([seed, len(pairs)])
    held_out: set[int] = set()
    for masked in (True, False):
        group = [i for i, pair in enumerate(pairs.pairs) if (pair.mask is not None) == masked]
        minimum = 1 if len(group) > 1 and not held_out else 0
        count = min(max(round(share * len(group)), minimum), max(len(group) - 1, 0))
        held_out |= {group[i] for i in rng.permutation(len(group))[:count]}
    if not held_out:
        raise ConfigError(
            f"the training set must have two photos with a mask or two without for a validation set to be held out, "
            f"got {len(pairs)}; give data.val_images and data.val_masks, or data.val_json"
        )
    parts = [[p for i, p in enumerate(pairs.pairs) if (i in held_out) == which] for which in (False, True)]
    training, validation = (PairDataset(part, invert_masks=pairs.invert_masks) for part in parts)
    return training, validation


def pairs_of(data: Any) -> PairDataset | None:
    """The files behind a set, or None for generated photos."""
    data = data.pairs if isinstance(data, TrainingPairs) else data
    return data if isinstance(data, PairDataset) else None


def digest(data: Any) -> str:
    """Count and hash of the files of a set, in order; "" for generated photos, which the configuration determines."""
    pairs = pairs_of(data)
    if pairs is None:
        return ""
    lines = [f"{pair.image.name}\0{pair.mask.name if pair.mask else ''}" for pair in pairs.pairs]
    return f"{len(lines)} photos ({hashlib.sha256(os.fsencode(chr(10).join(lines))).hexdigest()[:12]})"


def describe(data: Any) -> str:
    """ "12 photos, 10 of them with a mask"."""
    pairs = pairs_of(data)
    if pairs is None:
        return f"{len(data)} generated photos"
    return f"{len(pairs)} photos, {sum(pair.mask is not None for pair in pairs.pairs)} of them with a mask"


def forge_options(values: dict[str, Any]) -> ForgeOptions:
    """ForgeOptions from plain values; ConfigError for an unknown key or a value out of range."""
    known = typing.get_type_hints(ForgeOptions)
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = f"data.forge.{key}"
        if key not in known:
            raise ConfigError(f"unknown key {name}; known here: {', '.join(sorted(known))}")
        fields[key] = convert(known[key], value, name)
        if known[key] is float:
            top = 180.0 if key == "rotation" else 1.0
            if not 0 <= fields[key] <= top:
                raise ConfigError(f"{name} must be between 0 and {top:g}, got {value!r}")
        if isinstance(fields[key], tuple) and key != "shapes":
            low, high = fields[key]
            if not 0 < low <= high < float("inf"):
                raise ConfigError(f"{name} must be two rising positive values, got {value!r}")
    try:
        return ForgeOptions(**fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"data.forge: {error}") from None


def _forged_validation(data: DataSection) -> ForgedValidation:
    return ForgedValidation(_forgeries(data, "val", data.val_samples, data.val_seed, colour=0.0))


def _forgeries(data: DataSection, photos: str, length: int, seed: int, colour: float) -> ForgeryDataset:
    return ForgeryDataset(
        sample_photos(photos),
        size=data.crop,
        length=length,
        seed=seed,
        authentic=data.authentic,
        options=forge_options(data.forge),
        zoom=data.zoom,
        colour=colour,
    )


def _open_pairs(data: DataSection, part: str) -> PairDataset | None:
    """The photos that the configuration names for a part ("train" or "val"), or None if it names none."""
    images, masks, listed = (getattr(data, f"{part}_{kind}") for kind in ("images", "masks", "json"))
    if listed is not None:
        return JsonDataset(listed, invert_masks=data.invert_masks)
    if images is None:
        return None
    found = FolderDataset(
        images, masks, allow_authentic=True, invert_masks=data.invert_masks, recursive=data.recursive
    )
    if found.skipped:
        say(f"not used of {images} and {masks}: {describe_skipped(found.skipped)}", sys.stderr)
    return found
