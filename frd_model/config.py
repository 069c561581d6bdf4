"""The configuration of an FRD-Net, and the three presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VARIANTS = ("paper", "released")
CENTRES = ("last", "divergent")
NORMS = ("group", "batch", "none")
DECODERS = ("deconv", "pyramid")
STEMS = ("none", "pdc")
ENCODER_INPUTS = ("planes", "trace")
# What runs a net for prediction, and in which precision (frd_model/engines.py).
ENGINES = ("auto", "torch", "compile", "onnxruntime", "openvino")
PRECISIONS = ("auto", "float32", "bf16")
CHOICES = (
    ("variant", VARIANTS),
    ("icm_centres", CENTRES),
    ("norm", NORMS),
    ("decoder", DECODERS),
    ("stem", STEMS),
    ("encoder_input", ENCODER_INPUTS),
)


@dataclass(frozen=True)
class FRDNetConfig:
    """Everything that determines the architecture of an :class:`frd_model.FRDNet`.

    Attributes:
        encoder: ``mit_b0`` ... ``mit_b5``, or the name of any timm backbone that offers ``features_only``.
        stages: encoder stages to use, counted from 1, ascending. The FRD blocks run on the last one.
        drop_path: largest stochastic-depth rate of a MiT; the rate rises linearly from 0 with depth.
        stem: ``"pdc"`` concatenates pixel difference convolutions of the image to its RGB planes before the
            first patch embedding; ``"none"`` uses the RGB planes only.
        stem_central, stem_angular: output channels of the stem's central and angular convolution.
        stem_gain: initial gain of the tanh that bounds the stem's differences; None leaves them unbounded.
        blocks: number of FRD blocks; 0 leaves the encoder and the decoder, the baseline of the ablation.
        mlp_ratio: hidden width of a block's MLP divided by its channels.
        variant: equations of the ICM: ``"paper"`` (Eq. 1-4) or ``"released"`` (the authors' code).
        grids: centres of each clustering round as (rows, columns); 64, 16 and 2 centres by default.
        icm_centres: what the ICM gives back to the pixels: ``"last"``, the centres of the last round (the equations
            and the authors' code), or ``"divergent"`` (the text of the paper; ``variant="paper"`` only): there is
            no last round, but the two least alike centres of the round before it; see :class:`DivergentICM`.
        icm_alpha: initial value of the ICM's alpha; None keeps the default of :class:`frd_kernels.ICM`.
        icm, dpm: switch off one half of the mixer. Its channels then pass through unchanged, so that only
            the component itself is missing.
        angular, central: switch off one of the DPM's two PDC blocks.
        norm: normalisation of the FRD blocks: ``"group"`` (one group), ``"batch"`` or ``"none"``.
        block_norm: another normalisation after every block, as in the authors' code.
        layer_scale: initial value of the per-channel scale of both residual branches; None for no scale.
        decoder: ``"deconv"`` (transposed convolutions up to full size) or ``"pyramid"`` (sums all stages and the
            trace branch at the finest resolution; trains from scratch).
        decoder_widths: channels between the transposed convolutions. There is one more convolution than widths,
            and each doubles the size: four widths go from 1/32 to full size.
        decoder_kernel: kernel of the transposed convolutions: 4 (padding 1), 3 (padding and output padding 1)
            or 2 (no padding).
        decoder_skip: ``"deconv"`` only: concatenate the encoder's last features with those of the last block.
        pyramid_width: ``"pyramid"`` only: channels of the summed maps.
        trace_widths: ``"pyramid"`` only: channels of the trace branch at 1/2, 1/4, ... of the image's size;
            empty for no trace branch.
        encoder_input: ``"planes"`` (the stem's output, or RGB) or ``"trace"`` (the trace branch at half size,
            which makes every stage twice as coarse and the encoder four times as cheap).
        image_head: ``"pyramid"`` only: one more logit per image, that it was edited anywhere; see
            :meth:`FRDNet.with_score`.
    """

    encoder: str = "mit_b2"
    stages: tuple[int, ...] = (4,)
    drop_path: float = 0.1
    stem: str = "none"
    stem_central: int = 12
    stem_angular: int = 4
    stem_gain: float | None = None
    blocks: int = 4
    mlp_ratio: float = 4.0
    variant: str = "paper"
    grids: tuple[tuple[int, int], ...] = ((8, 8), (4, 4), (2, 1))
    icm_alpha: float | None = None
    icm: bool = True
    dpm: bool = True
    angular: bool = True
    central: bool = True
    norm: str = "group"
    block_norm: bool = True
    layer_scale: float | None = 1e-5
    decoder: str = "deconv"
    decoder_widths: tuple[int, ...] = (256, 128, 64, 32)
    decoder_kernel: int = 4
    decoder_skip: bool = False
    pyramid_width: int = 64
    trace_widths: tuple[int, ...] = ()
    encoder_input: str = "planes"
    icm_centres: str = "last"
    image_head: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values: tuples become lists."""
        return {f.name: _as_lists(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FRDNetConfig:
        """The inverse of :meth:`to_dict`. Missing fields keep their defaults; unknown fields raise ValueError."""
        if not isinstance(values, Mapping):
            raise TypeError(f"configuration: a mapping is needed, got {type(values).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(str(k) for k in values if k not in known)
        if unknown:
            raise ValueError(
                f"configuration: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def replace(self, **overrides: Any) -> FRDNetConfig:
        """A validated copy with some fields changed."""
        return self.from_dict({**self.to_dict(), **overrides})

    def differences(self, other: FRDNetConfig) -> list[str]:
        """Fields in which two configurations differ, as ``name: own against other``."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{k}: {mine[k]!r} against {theirs[k]!r}" for k in mine if mine[k] != theirs[k]]


def _as_lists(value: Any) -> Any:
    return [_as_lists(v) for v in value] if isinstance(value, tuple) else value


def _plain(value: Any) -> Any:
    """Convert NumPy and torch values to Python's and sequences to tuples, as JSON and comparisons need."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(_plain(v) for v in value) if isinstance(value, (list, tuple)) else value


def _is_int(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int_tuple(value: Any, minimum: int) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(_is_int(v, minimum) for v in value)


def _need(good: bool, name: str, rule: str, got: Any) -> None:
    if not good:
        raise ValueError(f"{name}: {rule}, got {got!r}")


def _check(c: FRDNetConfig) -> None:
    _need(
        isinstance(c.encoder, str) and bool(c.encoder),
        "encoder",
        "the name of a backbone is needed",
        c.encoder,
    )
    for name, choices in CHOICES:
        value = getattr(c, name)
        _need(value in choices, name, f"must be one of {', '.join(choices)}", value)
    for name in ("icm", "dpm", "angular", "central", "block_norm", "decoder_skip", "image_head"):
        _need(isinstance(getattr(c, name), bool), name, "must be true or false", getattr(c, name))
    for name in ("stem_central", "stem_angular", "blocks"):
        _need(_is_int(getattr(c, name), 0), name, "must be an integer of at least 0", getattr(c, name))
    _need(_is_int(c.pyramid_width, 1), "pyramid_width", "must be an integer of at least 1", c.pyramid_width)
    _check_values(c)
    _check_combinations(c)


def _check_values(c: FRDNetConfig) -> None:
    ascending = _is_int_tuple(c.stages, 1) and all(
        a < b for a, b in zip(c.stages, c.stages[1:], strict=False)
    )
    _need(ascending, "stages", "must be ascending integers from 1 on", c.stages)
    _need(
        isinstance(c.grids, tuple)
        and len(c.grids) > 0
        and all(_is_int_tuple(g, 1) and len(g) == 2 for g in c.grids),
        "grids",
        "must be pairs (rows, columns) of integers of at least 1, one for each round",
        c.grids,
    )
    _need(
        _is_int_tuple(c.decoder_widths, 1),
        "decoder_widths",
        "must be integers of at least 1",
        c.decoder_widths,
    )
    _need(
        _is_int(c.decoder_kernel, 2) and c.decoder_kernel <= 4,
        "decoder_kernel",
        "must be 2, 3 or 4",
        c.decoder_kernel,
    )
    _need(_is_number(c.drop_path) and 0 <= c.drop_path < 1, "drop_path", "must lie in [0, 1)", c.drop_path)
    _need(_is_number(c.mlp_ratio) and c.mlp_ratio > 0, "mlp_ratio", "must be above 0", c.mlp_ratio)
    widths = c.trace_widths
    _need(widths == () or _is_int_tuple(widths, 1), "trace_widths", "must be integers of at least 1", widths)
    for name in ("layer_scale", "icm_alpha", "stem_gain"):
        value = getattr(c, name)
        _need(value is None or _is_number(value), name, "must be a number or None", value)


def _check_combinations(c: FRDNetConfig) -> None:
    _need(
        c.icm_centres == "last" or c.variant == "paper",
        "icm_centres",
        'must be "last" in variant "released"',
        c.icm_centres,
    )
    _need(
        c.icm_centres == "last" or (len(c.grids) > 1 and math.prod(c.grids[-2]) > 1),
        "grids",
        "divergent centres need a round of two or more centres before the last",
        c.grids,
    )
    _need(
        not c.dpm or c.angular or c.central,
        "angular, central",
        "a DPM needs at least one of its two PDC blocks (or set dpm=False)",
        (c.angular, c.central),
    )
    _need(
        c.stem == "none" or c.stem_central + c.stem_angular > 0,
        "stem_central, stem_angular",
        "a pdc stem needs at least one channel",
        (c.stem_central, c.stem_angular),
    )
    _need(
        c.decoder == "deconv" or not c.decoder_skip,
        "decoder_skip",
        "belongs to the deconv decoder only",
        c.decoder_skip,
    )
    _need(
        c.decoder == "pyramid" or not c.trace_widths,
        "trace_widths",
        "belongs to the pyramid decoder only",
        c.trace_widths,
    )
    _need(
        c.decoder == "pyramid" or not c.image_head,
        "image_head",
        "belongs to the pyramid decoder only",
        c.image_head,
    )
    _need(
        c.encoder_input == "planes" or len(c.trace_widths) > 0,
        "encoder_input",
        "the trace branch needs at least one of trace_widths",
        c.encoder_input,
    )


#: The configurations that have a name.
#:
#: ``paper``: the equations; counts that match the paper's Table 2. ``released``: the authors' code, whose
#: checkpoints it loads. ``lite``: a small network that learns low-level traces from scratch on a CPU, used by the demo.
PRESETS: dict[str, FRDNetConfig] = {
    "paper": FRDNetConfig(),
    "released": FRDNetConfig(variant="released", decoder_kernel=3, decoder_skip=True),
    "lite": FRDNetConfig(
        encoder="mit_b0",
        stages=(1, 2, 3),
        drop_path=0.0,
        stem="pdc",
        stem_gain=8.0,
        blocks=2,
        mlp_ratio=2.0,
        # Nothing here is pretrained, so the blocks must carry signal from the first step on.
        layer_scale=0.1,
        decoder="pyramid",
        pyramid_width=48,
        trace_widths=(32, 48, 64),
        encoder_input="trace",
    ),
}

NAME_PREFIX = "frdnet_"
BASELINE_PREFIX = "segformer_"


def model_config(name: str | None = None, preset: str = "paper", **overrides: Any) -> FRDNetConfig:
    """The configuration of a net by the name and preset of :func:`frd_model.create_model`.

    Args:
        name: ``frdnet_`` or ``segformer_`` and the encoder; None for the preset's own.

    Raises:
        ValueError: unknown name, preset or field, a value out of its range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: must be one of {', '.join(PRESETS)}, got {preset!r}")
    if name is None:
        return PRESETS[preset].replace(**overrides)
    for prefix in (NAME_PREFIX, BASELINE_PREFIX):
        if isinstance(name, str) and name.startswith(prefix):
            family = _baseline(PRESETS[preset]) if prefix == BASELINE_PREFIX else PRESETS[preset]
            return family.replace(**{"encoder": name.removeprefix(prefix), **overrides})
    raise ValueError(
        f"name: must be {NAME_PREFIX}ENCODER or {BASELINE_PREFIX}ENCODER, such as frdnet_mit_b2, got {name!r}"
    )


def _baseline(preset: FRDNetConfig) -> FRDNetConfig:
    """A preset without FRD blocks. Its deconv decoder is the one of IMDL-BenCo's SegFormer: 3x3 kernels, no skip."""
    if preset.decoder != "deconv":
        return preset.replace(blocks=0)
    return preset.replace(blocks=0, decoder_kernel=3, decoder_skip=False)
