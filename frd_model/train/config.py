"""The configuration of a training run: one YAML file with strict keys, and flags that override it."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from frd_model.data.protocols import PROTOCOLS


class ConfigError(ValueError):
    """A configuration with an unknown key or an invalid value."""


@dataclass
class ModelSection:
    """Arguments of `create_model`; options are its keyword arguments."""

    name: str = "frdnet_mit_b0"
    preset: str = "lite"
    pretrained: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    encoder_weights: str | None = None


@dataclass
class AugmentSection:
    """Random changes of photos, each with its probability; see `Augmentation`. preset: "own", which these values set,
    or "mvss", which they do not change (`MvssAugmentation`); `augment: mvss` is short for it.
    """

    preset: str = "own"
    flip: float = 0.5
    turn: float = 0.5
    colour: float = 0.2
    blur: float = 0.1
    blur_sigma: tuple[float, float] = (0.3, 1.5)
    jpeg: float = 0.2
    jpeg_quality: tuple[int, int] = (70, 100)


@dataclass
class DataSection:
    """Where images come from. Relative paths start at the working directory, ~ is the home directory.

    Attributes:
        source: of the training images: "sample" (forgeries of the photos that ship with scikit-image and scikit-learn,
            by split), "sets" (train), "folder" (train_images, train_masks) or "json" (train_json).
        photos: folder whose photos in train and val "sample" takes in the place of the packaged ones, such as
            `tools/fetch_photos.py` makes.
        train, val: data sets by name, each "[NAME=]LAYOUT:PATH"; see `frd_model.data.sets.open_sets`.
        val, val_images and val_masks, or val_json: the validation set. Without one, "sample" validates on forgeries of
            other sample photos, and the others hold out a fraction `val_share` of each training set, at least one
            photo, drawn by `val_seed` from forged and untouched photos separately; of sets with `per_set`, that
            fraction of an epoch's photos.
        protocol: training lists of `frd_model.data.protocols`, made from the data sets in train.
        per_set, replacement: photos of each set, or list of the protocol, in an epoch, and whether they are drawn with
            replacement. None is the protocol's; without a protocol, each photo once.
        recursive: search sub-folders too.
        invert_masks: masks are black where edited.
        crop: side of the square training images in pixels. It is a random crop at the photo's own scale: nothing is
            resized. Smaller photos and their masks are padded by reflection.
        resize: in the place of the crop, the whole photo resized to a square of this side, and the validation photos
            and masks too (not "sample").
        augment: augmentation of the training images (not of "sample").
        max_bad: fraction of the photos of a set that may be unusable, at least one photo unless it is 0. They are
            reported and replaced by other photos; with more of them the run stops.
        samples, val_samples: images of one epoch and of the fixed validation set ("sample").
        authentic: fraction of untouched images among the generated ones.
        zoom, colour, focus: range of the random resize of a view, and fractions of the views with changed colours and
            with a shallow depth of field ("sample"; validation photos have neither).
        forge: fields of `ForgeOptions` to change.
    """

    source: str = "sample"
    crop: int = 256
    resize: int | None = None
    samples: int = 512
    val_samples: int = 48
    val_seed: int = 1
    authentic: float = 0.15
    zoom: tuple[float, float] = (0.5, 1.25)
    colour: float = 0.5
    focus: float = 0.0
    forge: dict[str, Any] = field(default_factory=dict)
    photos: str | None = None
    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    protocol: str | None = None
    per_set: int | None = None
    replacement: bool | None = None
    train_images: str | None = None
    train_masks: str | None = None
    val_images: str | None = None
    val_masks: str | None = None
    train_json: str | None = None
    val_json: str | None = None
    val_share: float = 0.1
    recursive: bool = False
    invert_masks: bool = False
    max_bad: float = 0.01
    augment: AugmentSection = field(default_factory=AugmentSection)


@dataclass
class LossSection:
    """form, edge_weight, edge_width: of `FRDLoss`; bce: weight of an added cross-entropy, focal: its exponent.

    The cross-entropy is for training from scratch. image: weight of the image head's cross-entropy
    (`model.options.image_head`).
    """

    form: str = "released"
    edge_weight: float = 1.0
    edge_width: int = 7
    bce: float = 0.0
    focal: float = 0.0
    image: float = 0.0


@dataclass
class OptimSection:
    """name: adamw or adam, with a linear warm-up and a cosine to min_lr (min_lr = lr: constant).

    weight_decay is decoupled in adamw, part of the gradient in adam. 0 disables clip_norm and ema.
    """

    name: str = "adamw"
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

    Attributes:
        batch_size: images of one optimizer step, over all processes and all parts of `accumulate`.
        accumulate: parts that each process computes its share of a batch in, one after another, to need less memory.
            The gradient is that of the whole batch, at the cost of a second forward pass; with `model.options.norm`
            "batch" the statistics are those of the parts.
        amp: "none", "bf16" or "fp16" (autocast, with a gradient scaler for fp16); the loss is computed in float32.
        compile: torch.compile the network for training.
        backend: of the kernels, see `frd_kernels.use_backend`; "auto" chooses by device.
        max_nonfinite: steps whose loss or gradient is not finite are skipped and counted; so many in a row, or a whole
            epoch of them, stop the run.
        log_every: steps between two transfers of the losses from the device, and two updates of what is shown.
        save_every, save_minutes: last.pt is also written every so many steps of an epoch, and at the first log after
            so many minutes; 0 switches either off.
    """

    output: str = "runs/frdnet"
    seed: int = 42
    epochs: int = 100
    batch_size: int = 16
    accumulate: int = 1
    workers: int = 0
    device: str = "cpu"
    amp: str = "none"
    channels_last: bool = False
    compile: bool = False
    backend: str = "auto"
    max_nonfinite: int = 20
    log_every: int = 10
    save_every: int = 0
    save_minutes: float = 10.0
    images_logged: int = 4
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    loss: LossSection = field(default_factory=LossSection)
    optim: OptimSection = field(default_factory=OptimSection)

    def __post_init__(self) -> None:
        for name in PATHS:
            section, _, key = name.rpartition(".")
            owner = getattr(self, section) if section else self
            value = getattr(owner, key)
            setattr(owner, key, value if value is None else os.path.expanduser(value))
        values = flatten(self.to_dict())
        for name, (holds, rule) in RULES.items():
            if not holds(values[name]):
                raise ConfigError(f"{name} must be {rule}, got {values[name]!r}")
        twice = [field.name for field in dataclasses.fields(ModelSection) if field.name in self.model.options]
        if twice:
            raise ConfigError(
                f"model.options must not hold {twice[0]}, which is set by model.{twice[0]}, got "
                f"{self.model.options[twice[0]]!r}"
            )
        self._check_sources()

    def _check_sources(self) -> None:
        data, optim = self.data, self.optim
        if self.accumulate > self.batch_size:
            raise ConfigError(
                f"accumulate must be at most batch_size ({self.batch_size}), got {self.accumulate}"
            )
        self._check_loss()
        if optim.min_lr > optim.lr:
            raise ConfigError(
                f"optim.min_lr must be at most optim.lr ({optim.lr:g}), got {optim.min_lr:g}; set both"
            )
        for key, source in (
            ("train", "sets"),
            ("train_images", "folder"),
            ("train_masks", "folder"),
            ("train_json", "json"),
        ):
            given = getattr(data, key) not in (None, ())
            if not given and data.source == source:
                raise ConfigError(f"data.{key} must be given for data.source {source}, got nothing")
            if given and data.source != source:
                raise ConfigError(
                    f"data.source must be {source} where data.{key} is given, got {data.source}"
                )
        if data.photos is not None and data.source != "sample":
            raise ConfigError(
                f"data.source must be sample where data.photos is given, got {data.source}; leave out data.photos"
            )
        named = [key for key in ("val", "val_json", "val_images") if getattr(data, key) not in (None, ())]
        if len(named) > 1:
            raise ConfigError(f"data.{named[0]} and data.{named[1]} exclude each other, got both")
        if (data.val_images is None) != (data.val_masks is None):
            raise ConfigError("data.val_images and data.val_masks must be given together, got only one")
        if data.protocol is not None and data.source != "sets":
            raise ConfigError(
                f"data.source must be sets where data.protocol is given, got {data.source}; name each set by --data"
            )
        for key in ("per_set", "replacement"):
            if getattr(data, key) is not None and data.source == "sample":
                raise ConfigError(
                    f"data.{key} must be left out for data.source sample, got {getattr(data, key)}"
                )
        changed = [
            key.name
            for key in dataclasses.fields(AugmentSection)
            if getattr(data.augment, key.name) != key.default
        ]
        if data.augment.preset == "mvss" and changed != ["preset"]:
            raise ConfigError(
                f"data.augment.{changed[1]} must be left out for data.augment.preset mvss, got a value"
            )

    def _check_loss(self) -> None:
        head = bool(self.model.options.get("image_head", False))
        if head != (self.loss.image > 0):
            raise ConfigError(
                f"loss.image must be above 0 where model.options.image_head is true, and only there, got "
                f"{self.loss.image:g} and {str(head).lower()}"
            )
        if self.loss.focal and not self.loss.bce:
            raise ConfigError(
                f"loss.bce must be above 0 where loss.focal is, its exponent, got 0 and {self.loss.focal:g}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary that `TrainConfig` can be read back from."""
        plain = dataclasses.asdict(self)
        plain["optim"]["betas"] = list(self.optim.betas)
        return plain


Rule = tuple[Callable[[Any], bool], str]


def _between(low: float, high: float) -> Rule:
    return lambda value: low <= value <= high, f"between {low} and {high}"


def _one_of(*choices: str) -> Rule:
    return lambda value: value in choices, f"one of {', '.join(choices)}"


def _optional(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), rule[1]


def _ordered(low: float, high: float) -> Rule:
    """A pair (a, b) with low <= a <= b <= high."""
    return lambda pair: low <= pair[0] <= pair[1] <= high, f"two rising values between {low} and {high}"


def _is_utf8(name: str) -> bool:
    """Whether TensorBoard can write to a directory of this name."""
    try:
        return b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


AMP = ("none", "bf16", "fp16")
_CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = {name: _CONFIGS / f"{name}.yaml" for name in ("paper", "released")}
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
SOURCES = ("sample", "sets", "folder", "json")
PATHS = (
    "output",
    "model.pretrained",
    "model.encoder_weights",
    "data.photos",
    *(f"data.{split}_{kind}" for split in ("train", "val") for kind in ("images", "masks", "json")),
)

# The range of NumPy's seeds; torch accepts more.
_SEED = _between(0, 2**32 - 1)
_COUNT: Rule = (lambda value: value >= 1, "at least 1")
_FROM_ZERO: Rule = (lambda value: 0 <= value < math.inf, "at least 0 and finite")
_SHARE = _between(0, 1)
_BELOW_ONE: Rule = (lambda value: 0 <= value < 1, "in [0, 1)")

RULES: dict[str, Rule] = {
    "output": (lambda value: bool(value.strip()) and _is_utf8(value), "the name of a directory, in UTF-8"),
    "seed": _SEED,
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "accumulate": _COUNT,
    "workers": _FROM_ZERO,
    "images_logged": _FROM_ZERO,
    "amp": _one_of(*AMP),
    "backend": _one_of(*BACKENDS),
    "max_nonfinite": _COUNT,
    "log_every": _COUNT,
    "save_every": _FROM_ZERO,
    "save_minutes": _FROM_ZERO,
    "data.source": _one_of(*SOURCES),
    "data.crop": _between(32, 8192),
    "data.resize": _optional(_between(32, 8192)),
    "data.protocol": _optional(_one_of(*PROTOCOLS)),
    "data.per_set": _optional(_COUNT),
    "data.samples": _COUNT,
    "data.val_samples": _COUNT,
    "data.val_seed": _SEED,
    "data.val_share": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "data.max_bad": _BELOW_ONE,
    "data.authentic": _BELOW_ONE,
    "data.zoom": _ordered(0.01, 100),
    "data.colour": _SHARE,
    "data.focus": _SHARE,
    "data.augment.preset": _one_of("own", "mvss"),
    **{f"data.augment.{name}": _SHARE for name in ("flip", "turn", "colour", "blur", "jpeg")},
    "data.augment.blur_sigma": _ordered(0.01, 100),
    "data.augment.jpeg_quality": _ordered(1, 100),
    "loss.form": _one_of("paper", "released"),
    "loss.edge_weight": _FROM_ZERO,
    "loss.edge_width": (lambda value: value >= 1 and value % 2 == 1, "odd and at least 1"),
    "loss.bce": _FROM_ZERO,
    "loss.focal": _FROM_ZERO,
    "loss.image": _FROM_ZERO,
    "optim.name": _one_of("adamw", "adam"),
    "optim.lr": (lambda value: 0 < value < math.inf, "positive and finite"),
    "optim.min_lr": _FROM_ZERO,
    "optim.betas": (lambda pair: all(0 <= value < 1 for value in pair), "two values in [0, 1)"),
    "optim.weight_decay": _FROM_ZERO,
    "optim.warmup_epochs": _between(0, 10_000),
    "optim.clip_norm": _FROM_ZERO,
    "optim.ema": _BELOW_ONE,
}


def load_config(
    path: str | Path | None, overrides: dict[str, Any] | None = None, preset: str | None = None
) -> TrainConfig:
    """A training preset (None: the defaults), changed by a YAML file and then by overrides.

    Args:
        path: the file, or None.
        overrides: values by dotted name ("optim.lr": 1e-3).
        preset: one of PRESETS, the published ways to train.

    Raises ConfigError that names an unknown key, a value of the wrong type or out of range, or a file that cannot be
    read.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    values = _read_file(PRESETS[preset]) if preset else {}
    changes = _read_file(Path(path).expanduser()) if path is not None else {}
    values = _merge(values, changes)
    for name, value in (overrides or {}).items():
        _put(values, name, value)
    return from_dict(values)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} must be a readable file, got: {error.strerror}") from None
    values = _read_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(values).__name__}")
    return values


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A TrainConfig from nested plain values; the inverse of `TrainConfig.to_dict`."""
    return typing.cast(TrainConfig, _build(TrainConfig, values, ""))


def parse_override(text: str) -> tuple[str, Any]:
    """ "optim.lr=1e-3" -> ("optim.lr", 0.001); the value is read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"an override must look like name=value, got {text!r}")
    return name.strip(), _read_yaml(value, f"the value of {name.strip()}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}; an empty section stays, as {}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _read_yaml(text: str | bytes, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    # ValueError: a date that does not exist, or bytes that are not text.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        section = merged.get(key)
        if isinstance(section, dict):
            # A section whose keys are all commented out reads as None and changes nothing.
            merged[key] = (
                _merge(section, value) if isinstance(value, dict) else section if value is None else value
            )
        else:
            merged[key] = value
    return merged


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"{section} in {name} is a value, not a section")
    values[last] = value


def _build(cls: type, values: Any, prefix: str) -> Any:
    # YAML reads a section whose keys are all commented out as None.
    values = {} if values is None and prefix else values
    if cls is AugmentSection and isinstance(values, str):
        values = {"preset": values}
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
        else convert(hints[name], value, prefix + name)
        for name, value in values.items()
    }
    return cls(**arguments)


def convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type. YAML reads 1e-3 as text and 1 as int where a float is meant."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return convert(hint, value, name)
    if origin is tuple:
        arguments = typing.get_args(hint)
        if arguments[-1] is Ellipsis:
            if not isinstance(value, (list, tuple)):
                raise ConfigError(f"{name} must be a list, got {value!r}")
            arguments = arguments[:1] * len(value)
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise ConfigError(f"{name} must be a list of {len(arguments)} values, got {value!r}")
        return tuple(convert(arg, item, name) for arg, item in zip(arguments, value, strict=True))
    kind: type = origin or hint
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            raise ConfigError(f"{name} must be a number, got {value!r}") from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name} must be {kind.__name__}, got {value!r}")
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} must have names as keys, got {value!r}")
    return value
