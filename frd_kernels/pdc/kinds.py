"""The kinds of pixel difference convolution: their names, and their integers in the schemas of the operators."""

from __future__ import annotations

import enum


class Kind(enum.IntEnum):
    """The pixels that a 3x3 weight takes differences of: `taps.pairs`. `csrc/pdc/taps.h` has the same numbers."""

    VANILLA = 0
    CENTRAL = 1
    ANGULAR = 2
    RADIAL = 3


def plain_size(kind: int) -> int:
    """Kernel size of the plain convolution that equals this kind: 5 for radial, else 3."""
    return 5 if kind == Kind.RADIAL else 3


_SHORT = {"cv": Kind.VANILLA, "cd": Kind.CENTRAL, "ad": Kind.ANGULAR, "rd": Kind.RADIAL}
_NAMES = {kind.name.lower(): kind for kind in Kind} | _SHORT


def parse_kind(kind: str) -> Kind:
    """`"angular"` or PiDiNet's `"ad"` -> `Kind.ANGULAR`; raises ValueError for an unknown name."""
    try:
        return _NAMES[kind]
    except (KeyError, TypeError):
        names = ", ".join(repr(name) for name in _NAMES)
        raise ValueError(f"kind must be one of {names}, got {kind!r}") from None
