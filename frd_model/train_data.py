"""The data sets that a training configuration names."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset

from frd_model.data.dataset import FolderDataset, ForgeryDataset, JsonDataset, PairDataset
from frd_model.data.forge import ForgeOptions
from frd_model.data.photos import sample_photos
from frd_model.train_config import ConfigError, DataSection, TrainConfig

Sample = tuple[Tensor, Tensor]


class CachedDataset(Dataset[Sample]):
    """Keeps every sample after its first use: validation forgeries are made once in a run."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.samples: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if index not in self.samples:
            self.samples[index] = self.source[index]
        return self.samples[index]


def open_training_data(config: TrainConfig) -> Any:
    """Samples (image [3, crop, crop], mask [1, crop, crop]); forged anew every epoch for the sample photos."""
    data = config.data
    if data.source != "sample":
        return _open_pairs(data, "train", (data.crop, data.crop))
    return ForgeryDataset(
        sample_photos("train"),
        size=data.crop,
        length=data.samples,
        seed=config.seed,
        authentic=data.authentic,
        options=forge_options(data.forge),
        zoom=data.zoom,
        colour=data.colour,
    )


def open_validation_data(config: TrainConfig) -> Any:
    """The fixed validation set: the same forgeries in every epoch and every run of the same val_seed."""
    data = config.data
    if data.source != "sample":
        return _open_pairs(data, "val", None)
    made = ForgeryDataset(
        sample_photos("val"),
        size=data.crop,
        length=data.val_samples,
        seed=data.val_seed,
        authentic=data.authentic,
        options=forge_options(data.forge),
        zoom=data.zoom,
        colour=0.0,
    )
    return CachedDataset(made)


def forge_options(values: dict[str, Any]) -> ForgeOptions:
    """ForgeOptions from plain values; ConfigError for an unknown key."""
    known = {f.name for f in dataclasses.fields(ForgeOptions)}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key data.forge.{key}; known here: {', '.join(sorted(known))}")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return ForgeOptions(**fields)


def _open_pairs(data: DataSection, split: str, size: tuple[int, int] | None) -> PairDataset:
    if data.source == "json":
        return JsonDataset(_required(data, f"{split}_json"), size=size)
    images, masks = _required(data, f"{split}_images"), _required(data, f"{split}_masks")
    return FolderDataset(images, masks, size=size, allow_authentic=True)


def _required(data: DataSection, name: str) -> str:
    value = getattr(data, name)
    if value is None:
        raise ConfigError(f"data.{name} must be given for data.source {data.source}, got nothing")
    return cast(str, value)
