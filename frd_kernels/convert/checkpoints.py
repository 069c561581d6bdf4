"""Converts state dicts of PiDiNet, CDCN and DEA-Net to those of the same nets built from `PDC2d`, and back.

Nothing is changed in place; tensors without a change are shared. A checkpoint's outer dict (`{"state_dict": ...}`,
`{"model": ...}`) and the prefix `module.` of DataParallel are removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..pdc.api import pdc_weight
from ..pdc.arguments import parse_theta
from ..pdc.kinds import parse_kind, plain_size

StateDict = dict[str, Any]

_CYCLES = {
    "baseline": "v",
    **{f"{a}-v15": a + 15 * "v" for a in "car"},
    **{f"{a}vvv4": f"{a}vvv" for a in "car"},
    **{f"{a * 3}v4": f"{a * 3}v" for a in "car"},
    **{f"{a}16": a for a in "car"},
    "carv4": "carv",
}
_LETTERS = {"v": "vanilla", "c": "central", "a": "angular", "r": "radial"}
_BLOCKS = [f"block{stage}_{i}" for stage in range(1, 5) for i in range(1, 4 if stage == 1 else 5)]
_PIDINET_LAYERS = ["init_block", *(f"{block}.conv1" for block in _BLOCKS)]
_DECONV_BRANCHES = ("conv1_1", "conv1_2", "conv1_3", "conv1_4", "conv1_5")


def pidinet_kinds(config: str | Sequence[str]) -> dict[str, str]:
    """The kind of each of PiDiNet's 16 difference convolutions: {"init_block": "central", ...}.

    Args:
        config: the name of one of PiDiNet's 14 configurations ("carv4", "baseline", "c-v15", ...), or the 16
            kinds in order.

    Raises:
        ValueError: an unknown name, or not 16 kinds.
    """
    if isinstance(config, str):
        if config not in _CYCLES:
            raise ValueError(f"config must be one of {', '.join(_CYCLES)} or 16 kinds, got {config!r}")
        cycle = _CYCLES[config]
        config = [_LETTERS[letter] for letter in cycle * (16 // len(cycle))]
    if len(config) != len(_PIDINET_LAYERS):
        raise ValueError(f"config must hold {len(_PIDINET_LAYERS)} kinds, got {len(config)}")
    names = (parse_kind(kind).name.lower() for kind in config)
    return dict(zip(_PIDINET_LAYERS, names, strict=True))


def from_plain_weight(plain: torch.Tensor, *, kind: str, theta: float = 1.0) -> torch.Tensor:
    """The inverse of `pdc_weight`: the weight of least norm whose plain kernel is `plain`.

    At theta 1 the plain kernel does not depend on a part of the weight: the centre (central), the centre and the mean
    of the ring (angular), weight 0 (radial). That part is 0 in the result.

    Args:
        plain: [O, I, 3, 3], for radial [O, I, 5, 5].

    Returns:
        [O, I, 3, 3].

    Raises:
        ValueError: plain is not a kernel of this kind and theta, up to the rounding of its dtype.
    """
    size = plain_size(parse_kind(kind))
    if plain.dim() != 4 or tuple(plain.shape[2:]) != (size, size):
        raise ValueError(f"plain must be [O, I, {size}, {size}] for kind {kind!r}, got {list(plain.shape)}")
    basis = torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3)
    # [9, size * size]: row k is the plain kernel of weight k.
    transform = pdc_weight(basis, kind=kind, theta=theta).flatten(1)
    target = plain.detach().double().cpu().flatten(2)
    inverse = torch.linalg.pinv(transform, rcond=1e-12)
    weight = target @ inverse
    # A step of refinement removes the rounding of the inverse.
    weight = weight + (target - weight @ transform) @ inverse
    error = (weight @ transform - target).abs().amax()
    if target.numel() and not error <= _rounding(plain) * target.abs().amax():
        raise ValueError(
            f"plain is not a kernel of kind {kind} with theta {theta:g}: off by {error.item():.3g}"
        )
    return weight.unflatten(2, (3, 3)).to(plain)


def from_pidinet(
    state_dict: Mapping[str, Any],
    config: str | Sequence[str] | None = None,
    *,
    theta: float = 1.0,
    blocks: bool = False,
) -> StateDict:
    """A checkpoint of PiDiNet, converted to plain convolutions or not, for a PiDiNet built from `PDC2d`.

    Args:
        state_dict: of PiDiNet: keys `init_block.weight`, `block1_1.conv1.weight`, ...
        config: see `pidinet_kinds`. Without it, the kind of a converted kernel is inferred as for theta 1: 5x5 is
            radial, a sum of 0 is central, or angular if the centre is 0 too, and everything else is vanilla.
        theta: of the checkpoint; other than 1 only for nets built from PiDiNet's `ops_theta`. Below 1, only the 5x5
            kernels show that a checkpoint is converted, and it needs `config`.
        blocks: renames `conv1`, `conv2` of the blocks to `pdc`, `point`, the names in `PDCBlock2d`.

    Returns:
        Weights [O, I / groups, 3, 3] for every kind; for a converted checkpoint those of `from_plain_weight`.

    Raises:
        ValueError: there is no layer of PiDiNet, a converted kernel is not of its kind, or only some layers are
            converted.
    """
    theta = parse_theta(theta)
    result = _unwrap(state_dict)
    weights = {name: result[f"{name}.weight"] for name in _PIDINET_LAYERS if f"{name}.weight" in result}
    if not weights:
        raise ValueError("state_dict must hold PiDiNet's layers (init_block.weight, ...), got none of them")
    if config is None and theta < 1.0 and any(_size(weight) == 5 for weight in weights.values()):
        raise ValueError("config must name the kinds of a converted checkpoint with theta below 1, got None")
    shown = {name: _shown_kind(weight) for name, weight in weights.items()}
    kinds = shown if config is None else pidinet_kinds(config)
    if _is_converted(weights, kinds, theta):
        for name, weight in weights.items():
            if kinds[name] == "vanilla":
                continue
            try:
                result[f"{name}.weight"] = from_plain_weight(weight, kind=kinds[name], theta=theta)
            except ValueError as error:
                raise ValueError(f"state_dict: {name}.weight: {error}") from None
    if not blocks:
        return result
    return {_renamed(key, {"conv1": "pdc", "conv2": "point"}): value for key, value in result.items()}


def to_pidinet(
    state_dict: Mapping[str, Any],
    config: str | Sequence[str] | None = None,
    *,
    theta: float = 1.0,
    converted: bool = False,
) -> StateDict:
    """The inverse of `from_pidinet`: PiDiNet's names, and with `converted` its plain kernels (radial: 5x5).

    Args:
        state_dict: of a PiDiNet built from `PDC2d` or from `PDCBlock2d`.
        config: see `pidinet_kinds`; needed with `converted`.

    Raises:
        ValueError: config is missing, or there is no layer of PiDiNet.
    """
    result = {
        _renamed(key, {"pdc": "conv1", "point": "conv2"}): value for key, value in _unwrap(state_dict).items()
    }
    if not any(f"{name}.weight" in result for name in _PIDINET_LAYERS):
        raise ValueError("state_dict must hold PiDiNet's layers (init_block.weight, ...), got none of them")
    if converted:
        if config is None:
            raise ValueError("config must name the kinds of the layers where converted=True, got None")
        for name, kind in pidinet_kinds(config).items():
            weight = result[f"{name}.weight"]
            result[f"{name}.weight"] = pdc_weight(weight.detach(), kind=kind, theta=theta)
    return result


def from_cdcn(
    state_dict: Mapping[str, Any], *, theta: float = 0.7, layers: Iterable[str] | None = None
) -> StateDict:
    """A checkpoint of CDCN for the same net built from `PDC2d(..., kind="central", theta=theta)`.

    `<layer>.conv.weight` becomes `<layer>.weight`. A bias is multiplied by 1 - theta, since CDCN's layer adds it once
    and subtracts it theta times.

    Args:
        theta: of the net; a checkpoint does not contain it. 0.7 is CDCN's default.
        layers: names of the central difference layers; by default all with a 3x3 `conv.weight`.

    Raises:
        ValueError: a named layer has no `conv.weight` [O, I, 3, 3], or no layer is found.
    """
    theta, source = parse_theta(theta), _unwrap(state_dict)
    if layers is None:
        found = (
            key for key, value in source.items() if f".{key}".endswith(".conv.weight") and _is_3x3(value)
        )
        layers = [key.removesuffix("conv.weight").removesuffix(".") for key in found]
        if not layers:
            raise ValueError("state_dict must hold a <layer>.conv.weight [O, I, 3, 3], got none")
    renamed: dict[str, tuple[str, float]] = {}
    for layer in layers:
        weight, bias = (_join(layer, f"conv.{name}") for name in ("weight", "bias"))
        if not _is_3x3(source.get(weight)):
            raise ValueError(f"state_dict must hold {weight} [O, I, 3, 3], got {_shape(source.get(weight))}")
        renamed |= {weight: (_join(layer, "weight"), 1.0), bias: (_join(layer, "bias"), 1.0 - theta)}
    return _rescaled(source, renamed)


def to_cdcn(state_dict: Mapping[str, Any], layers: Iterable[str], *, theta: float = 0.7) -> StateDict:
    """The inverse of `from_cdcn`.

    Args:
        layers: names of the `PDC2d` layers: `[n for n, m in net.named_modules() if isinstance(m, PDC2d)]`.

    Raises:
        ValueError: a layer has no weight [O, I, 3, 3], or a bias other than 0 with theta 1, which CDCN's
            layer cannot have.
    """
    theta, source = parse_theta(theta), _unwrap(state_dict)
    renamed: dict[str, tuple[str, float]] = {}
    for layer in layers:
        weight, bias = (_join(layer, name) for name in ("weight", "bias"))
        if not _is_3x3(source.get(weight)):
            raise ValueError(f"state_dict must hold {weight} [O, I, 3, 3], got {_shape(source.get(weight))}")
        if theta == 1.0 and bias in source and source[bias].any():
            raise ValueError(f"{bias} must be 0 with theta 1: CDCN's layer adds (1 - theta) times its bias")
        scale = 1.0 if theta == 1.0 else 1.0 / (1.0 - theta)
        renamed |= {weight: (_join(layer, "conv.weight"), 1.0), bias: (_join(layer, "conv.bias"), scale)}
    return _rescaled(source, renamed)


def from_deconv(state_dict: Mapping[str, Any], *, theta: float = 1.0) -> StateDict:
    """A checkpoint with DEA-Net's detail-enhanced convolutions for the same net with one 3x3 convolution each.

    The five branches of a layer (`conv1_1` central, `conv1_2` horizontal, `conv1_3` vertical, `conv1_4`
    angular, `conv1_5` plain) become `<layer>.weight` and `<layer>.bias`, for `PDC2d(kind="vanilla")` or
    `nn.Conv2d`, with padding 1. The weight of a branch may be at `conv1_1.conv.weight` or `conv1_1.weight`.

    Args:
        theta: of the angular branch; DEA-Net's central branch is always a pure difference.

    Raises:
        ValueError: there is no such layer, or a branch is missing or has another shape.
    """
    theta, source = parse_theta(theta), _unwrap(state_dict)
    pattern = re.compile(r"(|.*\.)conv1_[1-5]\.(conv\.)?(weight|bias)")
    matches = {key: match for key in source if (match := pattern.fullmatch(key))}
    if not matches:
        raise ValueError("state_dict must hold <layer>.conv1_1.conv.weight ... conv1_5.weight, got none")
    result: StateDict = {}
    for key, value in source.items():
        if key not in matches:
            result[key] = value
            continue
        prefix = matches[key][1]
        if f"{prefix}weight" not in result:
            result |= {f"{prefix}{name}": v for name, v in _merged(source, prefix, theta).items()}
    return result


def to_deconv(state_dict: Mapping[str, Any], layers: Iterable[str]) -> StateDict:
    """The inverse of `from_deconv`, with the whole weight in the plain branch and zeros in the other four.

    Args:
        layers: names of the merged layers.

    Raises:
        ValueError: a layer has no weight [O, I, 3, 3].
    """
    result = _unwrap(state_dict)
    for layer in layers:
        weight = result.pop(_join(layer, "weight"), None)
        if not _is_3x3(weight):
            raise ValueError(
                f"state_dict must hold {_join(layer, 'weight')} [O, I, 3, 3], got {_shape(weight)}"
            )
        bias = result.pop(_join(layer, "bias"), None)
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        for branch in _DECONV_BRANCHES:
            plain = branch == "conv1_5"
            zero = weight.new_zeros(weight.shape[:3] if branch in ("conv1_2", "conv1_3") else weight.shape)
            prefix = _join(layer, branch if plain else f"{branch}.conv")
            result[f"{prefix}.weight"] = weight if plain else zero
            result[f"{prefix}.bias"] = bias if plain else torch.zeros_like(bias)
    return result


def _merged(source: StateDict, prefix: str, theta: float) -> StateDict:
    """The merged weight, and bias if a branch has one, of the five branches under `prefix`."""
    weights, biases = [], []
    for branch in _DECONV_BRANCHES:
        at = f"{prefix}{branch}." if f"{prefix}{branch}.weight" in source else f"{prefix}{branch}.conv."
        weight = source.get(f"{at}weight")
        flat = branch in ("conv1_2", "conv1_3")
        if weight is None or tuple(weight.shape[2:]) != ((3,) if flat else (3, 3)):
            shape = "[O, I, 3]" if flat else "[O, I, 3, 3]"
            raise ValueError(f"state_dict must hold {at}weight {shape}, got {_shape(weight)}")
        weights.append(weight.detach())
        biases += [source[f"{at}bias"].detach()] if source.get(f"{at}bias") is not None else []
    central, horizontal, vertical, angular, plain = (weight.double() for weight in weights)
    total = pdc_weight(central, kind="central") + pdc_weight(angular, kind="angular", theta=theta) + plain
    total[..., 0] += horizontal
    total[..., 2] -= horizontal
    total[..., 0, :] += vertical
    total[..., 2, :] -= vertical
    result = {"weight": total.to(weights[-1].dtype)}
    if biases:
        result["bias"] = torch.stack(biases).double().sum(0).to(biases[0].dtype)
    return result


def _unwrap(checkpoint: Mapping[str, Any]) -> StateDict:
    """The state dict of a checkpoint, as a new dict, without the prefix `module.` of DataParallel."""
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(checkpoint).__name__}")
    for name in ("state_dict", "model"):
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
    wrapped = len(checkpoint) > 0 and all(key.startswith("module.") for key in checkpoint)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in checkpoint.items()}


def _size(weight: torch.Tensor) -> int:
    return weight.shape[-1]


def _rounding(plain: torch.Tensor) -> float:
    """The tolerance of the test for a kind, relative to the largest tap: nine taps have an error of half an eps each,
    and their sum has eight roundings of at most nine times the largest tap."""
    own = torch.finfo(plain.dtype).eps
    return 4.5 * own + 36 * min(own, torch.finfo(torch.float32).eps)


def _shown_kind(weight: torch.Tensor) -> str:
    """The kind of a converted kernel for theta 1; "vanilla" if it is of no other."""
    if _size(weight) == 5:
        return "radial"
    exact = weight.detach().double()
    if not exact.any() or (exact.sum((2, 3)).abs().amax() > _rounding(weight) * exact.abs().amax()):
        return "vanilla"
    return "central" if exact[..., 1, 1].any() else "angular"


def _is_converted(weights: dict[str, torch.Tensor], kinds: dict[str, str], theta: float) -> bool:
    """Whether the weights are plain kernels: one is 5x5, or those of difference layers are kernels of their kind."""
    if any(_size(weight) == 5 for weight in weights.values()):
        return True
    names = [name for name, weight in weights.items() if kinds[name] != "vanilla" and weight.any()]
    if theta < 1.0 or "radial" in {kinds[name] for name in names}:
        return False
    shown = [name for name in names if _shown_kind(weights[name]) == kinds[name]]
    if shown and shown != names:
        other = next(name for name in names if name not in shown)
        raise ValueError(f"state_dict must be converted or not: {shown[0]}.weight is, {other}.weight is not")
    return bool(shown)


def _renamed(key: str, names: dict[str, str]) -> str:
    """`block2_1.conv1.weight` with its middle part replaced."""
    block, _, rest = key.partition(".")
    part, dot, name = rest.partition(".")
    return f"{block}.{names[part]}{dot}{name}" if block in _BLOCKS and part in names else key


def _rescaled(source: StateDict, renamed: dict[str, tuple[str, float]]) -> StateDict:
    result: StateDict = {}
    for key, value in source.items():
        name, scale = renamed.get(key, (key, 1.0))
        result[name] = value if scale == 1.0 else value * scale
    return result


def _join(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _is_3x3(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 4 and tuple(value.shape[2:]) == (3, 3)


def _shape(value: Any) -> str:
    return "none" if value is None else str(list(value.shape)) if hasattr(value, "shape") else repr(value)
