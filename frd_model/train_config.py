"""The configuration of a training run: one YAML file with strict keys, and flags that override it."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A configuration that names an unknown key or holds a value of the wrong kind."""


@dataclass
class ModelSection:
    """name, preset, pretrained, options: the arguments of `create_model`; options are its keyword arguments."""

    name: str = "frdnet_mit_b0"
    preset: str = "lite"
    pretrained: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataSection:
    """Where images come from.

    source: "sample" (forgeries of the photos that ship with scikit-image and scikit-learn, by split), "folder"
        (train_images, train_masks, val_images, val_masks) or "json" (train_json, val_json).
    crop: side of the square training images, in pixels.
    samples, val_samples: images of one epoch and of the fixed validation set (source "sample" only).
    authentic: share of untouched images among the generated ones.
    zoom, colour: range of the random resize of a view, and share of views with changed colours.
    forge: fields of `ForgeOptions` to change.
    """

    source: str = "sample"
    crop: int = 256
    samples: int = 512
    val_samples: int = 48
    val_seed: int = 1
    authentic: float = 0.15
    zoom: tuple[float, float] = (0.5, 1.25)
    colour: float = 0.5
    forge: dict[str, Any] = field(default_factory=dict)
    train_images: str | None = None
    train_masks: str | None = None
    val_images: str | None = None
    val_masks: str | None = None
    train_json: str | None = None
    val_json: str | None = None


@dataclass
class LossSection:
    """form, edge_weight: of `FRDLoss`; bce: weight of an added binary cross entropy, which steadies a cold start."""

    form: str = "released"
    edge_weight: float = 1.0
    bce: float = 0.0


@dataclass
class OptimSection:
    """AdamW with a linear warm-up and a cosine to min_lr; clip_norm and ema of 0 switch them off."""

    lr: float = 5e-5
    min_lr: float = 5e-7
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    warmup_epochs: float = 2.0
    clip_norm: float = 1.0
    ema: float = 0.0


@dataclass
class TrainConfig:
    """Everything a run depends on; `frd train` stores it next to the weights.

    backend: of the kernels, see `frd_kernels.use_backend`; auto goes by the device.
    """

    output: str = "runs/frdnet"
    seed: int = 42
    epochs: int = 100
    batch_size: int = 16
    workers: int = 0
    device: str = "cpu"
    amp: str = "none"
    channels_last: bool = False
    backend: str = "auto"
    images_logged: int = 4
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    loss: LossSection = field(default_factory=LossSection)
    optim: OptimSection = field(default_factory=OptimSection)

    def __post_init__(self) -> None:
        rules = [
            ("epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("workers", self.workers, self.workers >= 0, "at least 0"),
            ("amp", self.amp, self.amp in ("none", "bf16"), "none or bf16"),
            ("backend", self.backend, self.backend in BACKENDS, f"one of {', '.join(BACKENDS)}"),
            ("optim.lr", self.optim.lr, self.optim.lr > 0, "positive"),
            ("optim.ema", self.optim.ema, 0 <= self.optim.ema < 1, "in [0, 1)"),
            ("data.crop", self.data.crop, self.data.crop >= 32, "at least 32"),
            ("data.source", self.data.source, self.data.source in SOURCES, f"one of {', '.join(SOURCES)}"),
            ("data.authentic", self.data.authentic, 0 <= self.data.authentic < 1, "in [0, 1)"),
        ]
        for name, value, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{name} must be {rule}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary that `TrainConfig` can be read back from."""
        plain = dataclasses.asdict(self)
        plain["optim"]["betas"] = list(self.optim.betas)
        return plain


BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
SOURCES = ("sample", "folder", "json")


def load_config(path: str | Path | None, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Read a YAML file (None: the defaults) and apply overrides, given by dotted name ("optim.lr": 1e-3).

    Raises ConfigError that names the key for an unknown key or a value of the wrong type, OSError for a file
    that cannot be read.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(values).__name__}")
    for name, value in (overrides or {}).items():
        _put(values, name, value)
    return from_dict(values)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Build a TrainConfig from nested plain values; the inverse of `TrainConfig.to_dict`."""
    return typing.cast(TrainConfig, _build(TrainConfig, values, ""))


def parse_override(text: str) -> tuple[str, Any]:
    """ "optim.lr=1e-3" -> ("optim.lr", 0.001); the value is read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"an override must look like name=value, got {text!r}")
    return name.strip(), yaml.safe_load(value)


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{section} in {name} is a value, not a section")
    values[last] = value


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.')} must be a section of keys, got {values!r}")
    hints = typing.get_type_hints(cls)
    unknown = [f"{prefix}{key}" for key in values if key not in hints]
    if unknown:
        raise ConfigError(
            f"unknown key {unknown[0]}; known here: {', '.join(prefix + name for name in hints)}"
        )
    arguments = {
        name: _build(hints[name], value, f"{prefix}{name}.")
        if dataclasses.is_dataclass(hints[name])
        else _convert(hints[name], value, prefix + name)
        for name, value in values.items()
    }
    return cls(**arguments)


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type. YAML reads 1e-3 as text and 1 as int where a float is meant."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return _convert(hint, value, name)
    if origin is tuple:
        arguments = typing.get_args(hint)
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise ConfigError(f"{name} must be a list of {len(arguments)} values, got {value!r}")
        return tuple(_convert(arg, item, name) for arg, item in zip(arguments, value, strict=True))
    kind: type = origin or hint
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{name} must be a number, got {value!r}") from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name} must be {kind.__name__}, got {value!r}")
    return value
