"""The report of `fold` and `replace_pdc`: what was done with each layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

REPLACED, KEPT = "replaced", "kept"


@dataclass(frozen=True)
class Entry:
    """One layer.

    Attributes:
        name: dotted name in the model; "" is the model itself.
        layer: class of the layer as it was found.
        kind, theta: of the difference convolution; None for other layers and for unrecognised ones.
        result: "replaced" or "kept".
        note: why the layer is kept, or what else changed with its replacement.
    """

    name: str
    layer: str
    kind: str | None
    theta: float | None
    result: str
    note: str = ""

    def __str__(self) -> str:
        what = self.layer if self.kind is None else f"{self.layer} ({self.kind}, theta {self.theta:g})"
        note = f": {self.note}" if self.note else ""
        return f"{self.name or '(model)'}: {what} {self.result}{note}"


class Report(list[Entry]):
    """A list of entries; `print` shows one line for each."""

    def __str__(self) -> str:
        return "\n".join(str(entry) for entry in self)


def swap(model: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    """Registers `replacements[id(m)]` in place of m everywhere. Returns the model, or its own replacement."""
    if id(model) in replacements:
        return replacements[id(model)]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    return model


def one_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
