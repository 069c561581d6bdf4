"""Names of the pixel difference convolutions, and the integers that stand for them in the ops' schemas."""

from __future__ import annotations

import enum


class Kind(enum.IntEnum):
    """How a 3x3 weight meets the pixels; `csrc/pdc/taps.h` holds the same numbers."""

    VANILLA = 0
    CENTRAL = 1
    ANGULAR = 2
    RADIAL = 3


def plain_side(kind: int) -> int:
    """Side of the plain kernel that equals a 3x3 weight of this kind: 5 for radial, else 3."""
    return 5 if kind == Kind.RADIAL else 3


_SHORT = {"cv": Kind.VANILLA, "cd": Kind.CENTRAL, "ad": Kind.ANGULAR, "rd": Kind.RADIAL}
_NAMES = {kind.name.lower(): kind for kind in Kind} | _SHORT


def parse_kind(kind: str) -> Kind:
    """`"angular"` or PiDiNet's `"ad"` -> `Kind.ANGULAR`; raises ValueError for a name that is none."""
    try:
        return _NAMES[kind]
    except (KeyError, TypeError):
        names = ", ".join(repr(name) for name in _NAMES)
        raise ValueError(f"kind must be one of {names}, got {kind!r}") from None
