"""Finds the `PDC2d` (kind, theta, padding, bias) that computes what a layer of another project does, by running it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from .._numbers import is_number
from ..backend import use_backend
from ..pdc.arguments import Geometry, parse_geometry
from ..pdc.layers import PDC2d
from .checkpoints import from_deconv
from .report import one_line

KINDS = ("vanilla", "central", "angular", "radial")
# Relative to the largest output; and the decimals of theta that a fit in this dtype can tell.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_DECIMALS = {torch.float64: 9, torch.float32: 5}


class Unrecognised(Exception):
    """Why a layer is not replaced."""


class Found(NamedTuple):
    """The new layer, and a note for the report."""

    layer: PDC2d
    note: str


class _Trial(NamedTuple):
    """A copy of the layer with random parameters, and its output; all in float64 on the CPU.

    x: [2, C, H, W].
    linear: [2, O, H', W'], the output without the bias.
    bias: [O], the output for x = 0.
    dtype: the one that the copy was run in.
    """

    layer: nn.Module
    x: torch.Tensor
    linear: torch.Tensor
    bias: torch.Tensor
    dtype: torch.dtype


def recognise_own_weight(layer: nn.Module) -> Found:
    """A layer with `weight` [O, I, 3, 3], `bias`, `stride`, `padding`, `dilation`, `groups` (PiDiNet)."""
    declared = getattr(layer, "theta", None)
    if not is_number(declared):
        declared = _closed_over(getattr(layer, "pdc", None), "theta")
    return _recognise(layer, "", KINDS, declared)


def recognise_wrapped(layer: nn.Module) -> Found:
    """A layer with `conv`, an `nn.Conv2d` of 3x3, and `theta` (CDCN)."""
    conv = layer.conv
    if type(conv) is not nn.Conv2d or conv.kernel_size != (3, 3):
        size = getattr(conv, "kernel_size", "")
        raise Unrecognised(f"its conv is a {type(conv).__name__} {size}, PDC2d is an nn.Conv2d of 3x3")
    found = _recognise(layer, "conv", ("central", "angular", "radial"), layer.theta)
    names = (
        "conv.weight and conv.bias are weight and bias" if conv.bias is not None else "conv.weight is weight"
    )
    return found._replace(note=f"in state dicts {names} now" + (found.note and f"; {found.note}"))


def recognise_branches(layer: nn.Module) -> Found:
    """A layer with the branches `conv1_1` to `conv1_5` (DEA-Net): one vanilla layer."""
    theta = getattr(layer.conv1_4, "theta", 1.0)
    plain = cast(nn.Module, layer.conv1_5).weight
    if not isinstance(plain, nn.Parameter) or plain.dim() != 4:
        raise Unrecognised("its conv1_5 has no weight [O, I, 3, 3]")
    geometry = parse_geometry("vanilla", 1.0, 1, 1, 1, 1)
    trial = _run(layer, plain, geometry, "zeros")
    merged = from_deconv(trial.layer.state_dict(), theta=theta)
    with use_backend("cpu"):
        expected = _pdc2d(merged["weight"], geometry, "zeros")(trial.x)
    if not _close(trial.linear, expected, trial.dtype) or not _close(
        trial.bias, merged.get("bias", torch.zeros(())).expand_as(trial.bias), trial.dtype
    ):
        raise Unrecognised("it does not compute the sum of its five branches")
    merged = from_deconv(layer.state_dict(), theta=theta)
    learns = any(parameter.requires_grad for parameter in layer.parameters())
    weight, bias = (
        None if tensor is None else nn.Parameter(tensor, requires_grad=learns)
        for tensor in (merged["weight"], merged.get("bias"))
    )
    new = _with_parameters(cast(nn.Parameter, weight), bias, geometry, "zeros", layer.training)
    _verify(layer, new, trial)
    return Found(new, "weight and bias are new parameters, the five branches merged: see from_deconv")


def _recognise(layer: nn.Module, inside: str, kinds: Sequence[str], declared: Any) -> Found:
    """A layer with the parameters and the geometry of the submodule `inside`."""
    holder = layer.get_submodule(inside)
    weight, bias = holder._parameters.get("weight"), holder._parameters.get("bias")
    if weight is None or weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise Unrecognised("it has no parameter weight [O, I, 3, 3]")
    missing = [name for name in ("stride", "padding", "dilation", "groups") if not hasattr(holder, name)]
    if missing:
        raise Unrecognised(f"it has no attribute {', '.join(missing)}")
    numbers: Any = (holder.stride, holder.padding, holder.dilation, holder.groups)
    mode = getattr(holder, "padding_mode", "zeros")
    geometry = parse_geometry("vanilla", 1.0, *numbers)
    trial = _run(layer, weight, geometry, mode)
    random = trial.layer.get_submodule(inside)._parameters
    matched = _match(trial, cast(torch.Tensor, random["weight"]), geometry, mode, kinds, declared)
    scale = _bias_scale(trial, random.get("bias"), matched.theta)
    note, new_bias = "", bias
    if bias is not None and scale == 0.0:
        note, new_bias = "the bias, which had no effect at theta 1, is left out", None
    elif bias is not None and scale != 1.0:
        learned = nn.Parameter((bias.detach().double() * scale).to(bias.dtype), bias.requires_grad)
        note, new_bias = f"bias is a new parameter, 1 - theta = {scale:g} times the old one", learned
    new = _with_parameters(weight, new_bias, matched, mode, layer.training)
    _verify(layer, new, trial)
    return Found(new, note)


def _run(layer: nn.Module, weight: torch.Tensor, geometry: Geometry, mode: str) -> _Trial:
    """Runs a copy with random parameters in float64, or in float32 if that fails."""
    if weight.is_meta:
        raise Unrecognised("it is on the meta device and cannot be run")
    generator = torch.Generator().manual_seed(0)
    sizes = [
        6 * d + 2 * s + 1 + i for i, (d, s) in enumerate(zip(geometry.dilation, geometry.stride, strict=True))
    ]
    x = torch.randn(2, weight.shape[1] * geometry.groups, *sizes, generator=generator, dtype=torch.float64)
    problem = ""
    for dtype in (torch.float64, torch.float32):
        try:
            trial = copy.deepcopy(layer).to(dtype).eval()
            with torch.no_grad():
                for parameter in trial.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            outputs = _outputs(trial, torch.cat((x, torch.zeros_like(x[:1]))), dtype, weight.device)
        except Exception as error:
            # Code of another project may fail here in any way.
            problem = problem or one_line(error)
            continue
        constant = outputs[2].flatten(1)
        if not _close(constant, constant[:, :1].expand_as(constant), dtype):
            raise Unrecognised("its output for x = 0 is not constant")
        bias = constant[:, 0]
        return _Trial(trial.double().cpu(), x, outputs[:2] - bias[:, None, None], bias, dtype)
    raise Unrecognised(f"it cannot be run ({problem})")


def _outputs(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The output of the layer, without TF32 or autocast, as float64 on the CPU."""
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False),
    ):
        return layer(x.to(device, dtype)).double().cpu()


def _match(
    trial: _Trial, weight: torch.Tensor, geometry: Geometry, mode: str, kinds: Sequence[str], declared: Any
) -> Geometry:
    """The kind, theta and padding with which PDC2d gives the output of the trial; raises Unrecognised."""
    for kind in kinds:
        # PiDiNet's radial layer always pads by twice the dilation, which for PDC2d is a padding of one dilation.
        for padding in dict.fromkeys((geometry.padding, geometry.dilation)):
            candidate = parse_geometry(
                kind, 1.0, geometry.stride, padding, geometry.dilation, geometry.groups
            )
            theta = _fit_theta(trial, weight, candidate, mode, declared)
            if theta is not None:
                return candidate._replace(theta=theta)
    raise Unrecognised("it computes none of the kinds of PDC2d")


def _fit_theta(
    trial: _Trial, weight: torch.Tensor, geometry: Geometry, mode: str, declared: Any
) -> float | None:
    """The theta in [0, 1] with which this kind gives the output of the trial; None if there is none."""
    with use_backend("cpu"):
        ends = [_pdc2d(weight, geometry._replace(theta=theta), mode)(trial.x) for theta in (0.0, 1.0)]
    if ends[0].shape != trial.linear.shape:
        return None
    slope = ends[0] - ends[1]
    # Vanilla does not depend on theta.
    if not slope.any():
        return 1.0 if _close(trial.linear, ends[0], trial.dtype) else None
    theta = (((ends[0] - trial.linear) * slope).sum() / slope.square().sum()).item()
    nearest = round(theta, _DECIMALS[trial.dtype])
    if is_number(declared) and abs(declared - theta) <= 10.0 ** -_DECIMALS[trial.dtype]:
        nearest = float(declared)
    if not 0.0 <= nearest <= 1.0 or not _close(trial.linear, ends[0] - nearest * slope, trial.dtype):
        return None
    return nearest


def _bias_scale(trial: _Trial, bias: torch.Tensor | None, theta: float) -> float:
    """The factor of the bias: 1, or 1 - theta as in CDCN's layer; raises Unrecognised."""
    added = torch.zeros_like(trial.bias) if bias is None else bias.detach()
    for scale in (1.0, 1.0 - theta):
        if _close(trial.bias, scale * added, trial.dtype):
            return scale
    raise Unrecognised("its bias is added in a way of its own")


def _pdc2d(weight: torch.Tensor, geometry: Geometry, mode: str) -> PDC2d:
    return _with_parameters(nn.Parameter(weight.detach(), False), None, geometry, mode, training=False)


def _with_parameters(
    weight: nn.Parameter, bias: nn.Parameter | None, geometry: Geometry, mode: str, training: bool
) -> PDC2d:
    """A layer with these parameters, the same objects."""
    layer = PDC2d(
        weight.shape[1] * geometry.groups,
        weight.shape[0],
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        bias=bias is not None,
        padding_mode=mode,
        device="meta",
        kind=geometry.kind.name.lower(),
        theta=geometry.theta,
    )
    layer.weight, layer.bias = weight, bias
    return layer.train(training)


def _verify(old: nn.Module, new: PDC2d, trial: _Trial) -> None:
    """Raises Unrecognised unless the new layer gives the output of the old one with the real parameters."""
    expected = _outputs(copy.deepcopy(old).to(trial.dtype).eval(), trial.x, trial.dtype, new.weight.device)
    with use_backend("cpu"), torch.no_grad():
        ours = copy.deepcopy(new).double().cpu().eval()(trial.x)
    if not _close(ours, expected, trial.dtype):
        raise Unrecognised("with its own parameters, PDC2d gives another output")


def _close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    if a.shape != b.shape or a.numel() == 0:
        return a.shape == b.shape
    largest = torch.stack((a, b)).abs().nan_to_num(0.0, 0.0).amax().item()
    return torch.allclose(a, b, rtol=0.0, atol=_TOLERANCE[dtype] * largest, equal_nan=True)


def _closed_over(function: Any, name: str) -> Any:
    """The variable of that name in the closure of a function; None if there is none."""
    return inspect.getclosurevars(function).nonlocals.get(name) if inspect.isfunction(function) else None
