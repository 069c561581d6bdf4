"""Recognises calls like those that have passed the checks before: they need no second look.

The checks read shapes, dtypes and devices one by one, which takes longer than a small kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from ._torch_internals import is_tracing

_MOST = 4096  # calls of different shapes; beyond, all are forgotten
_SEEN: dict[Any, Any] = {}


def key(name: str, *values: Any) -> tuple[Any, ...] | None:
    """What checks can see of the arguments of a call of `name`; None where they have to be made: while tracing, and
    for mixed dtypes, which autocast allows and nothing else does."""
    if torch.compiler.is_compiling():
        return None
    parts: list[Any] = [name]
    dtype = None
    for value in values:
        if isinstance(value, torch.Tensor):
            if dtype is None:
                dtype = value.dtype
            elif value.dtype != dtype:
                return None
            parts.append((value.shape, dtype, value.device))
        elif isinstance(value, tuple):  # (True, 1) and (1.0, 1) equal (1, 1), and are refused
            parts.append((*map(type, value), value))
        else:
            parts.append((type(value), value))
    return tuple(parts)


def get(key: tuple[Any, ...] | None) -> Any:
    """What `put` keeps for such a call, else None."""
    try:
        return None if key is None else _SEEN.get(key)
    except TypeError:  # a list, or a size that is still symbolic
        return None


def put(key: tuple[Any, ...] | None, value: Any) -> None:
    if key is None or is_tracing():  # the sizes in it are tensors
        return
    if len(_SEEN) >= _MOST:
        _SEEN.clear()
    try:
        _SEEN[key] = value
    except TypeError:
        return
