"""`replace_pdc`: replaces the PDC layers of other projects in a model by `PDC2d`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from .._inner import has_hooks
from .._numbers import is_number
from .._torch_internals import is_plain_conv2d
from ..pdc.layers import PDC2d
from .recognise import Found, Unrecognised, recognise_branches, recognise_own_weight, recognise_wrapped
from .report import KEPT, REPLACED, Entry, Report, one_line, swap

_TELLING_NAME = re.compile(r"pdc|cdc|difference|(^|_)(cd|ad|rd|hd|vd)(_|conv|$)", re.IGNORECASE)
_BRANCHES = {f"conv1_{i}" for i in range(1, 6)}


def replace_pdc(model: nn.Module) -> Report:
    """Replaces, in place, the PDC layers of PiDiNet, CDCN and DEA-Net by `PDC2d`.

    It knows three forms: a layer with a 3x3 `weight` (PiDiNet's `Conv2d(pdc, ...)` and its copies), one that wraps
    `conv` and has a `theta` (CDCN's `Conv2d_cd`), and one with the branches `conv1_1` to `conv1_5` (DEA-Net's `DEConv`,
    which becomes one vanilla layer). Kind, theta, padding and the factor of the bias are not guessed from names: they
    are found by running a copy with random weights on random input. A layer is replaced only if the new one gives the
    same output with the real weights. A layer that looks like a PDC layer but is not recognised is kept, with the
    reason.

    The new layer has the same parameter objects, so that optimizers keep working, unless the entry's note says that a
    parameter is new. Device, dtype, training mode and `requires_grad` do not change.

    Args:
        model: changed in place.

    Returns:
        One entry for each layer that is or looks like a PDC layer, except those that already are `PDC2d`.

    Raises:
        TypeError: model is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    report = Report()
    replacements: dict[int, nn.Module] = {}
    for name, layer in _candidates(model):
        kind = theta = None
        try:
            if layer is model:
                raise Unrecognised("it is the model itself: nothing holds it in which it could be replaced")
            if any(has_hooks(module) for module in layer.modules()):
                raise Unrecognised("has hooks, which would be lost")
            found = _recognise(layer)
        except Unrecognised as error:
            if not _looks_like_pdc(layer):
                continue
            result, note = KEPT, str(error)
        except Exception as error:
            # Code of another project may fail here in any way.
            if not _looks_like_pdc(layer):
                continue
            result, note = KEPT, one_line(error)
        else:
            if found.layer.kind == "vanilla" and not _looks_like_pdc(layer):
                continue
            replacements[id(layer)] = found.layer
            kind, theta, result, note = found.layer.kind, found.layer.theta, REPLACED, found.note
        report.append(Entry(name, type(layer).__name__, kind, theta, result, note))
    swap(model, replacements)
    return report


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a known form or that look like one, without those inside of another."""
    parts: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in parts or isinstance(module, PDC2d):
            continue
        if _has_branches(module) or _wraps_conv(module) or _has_own_weight(module) or _looks_like_pdc(module):
            parts |= {id(part) for part in module.modules()}
            yield name, module


def _has_branches(module: nn.Module) -> bool:
    return set(module._modules) >= _BRANCHES


def _wraps_conv(module: nn.Module) -> bool:
    return set(module._modules) == {"conv"} and is_number(getattr(module, "theta", None))


def _has_own_weight(module: nn.Module) -> bool:
    """A leaf with a 3x3 weight and a forward that is not `nn.Conv2d`'s."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and not module._modules
        and tuple(weight.shape[2:]) == (3, 3)
        and not is_plain_conv2d(type(module))
        and not isinstance(module, nn.ConvTranspose2d)
    )


def _looks_like_pdc(module: nn.Module) -> bool:
    """Whether a single layer has a name or an attribute of a difference convolution."""
    if not set(module._modules) <= {"conv", "parametrizations", *_BRANCHES} or isinstance(module, PDC2d):
        return False
    if not any(True for _ in module.parameters()):
        return False
    if callable(getattr(module, "pdc", None)) or _has_branches(module) or _wraps_conv(module):
        return True
    return _TELLING_NAME.search(type(module).__name__) is not None


def _recognise(layer: nn.Module) -> Found:
    if _has_branches(layer):
        return recognise_branches(layer)
    if _wraps_conv(layer):
        return recognise_wrapped(layer)
    return recognise_own_weight(layer)
