"""Remembers calls that have passed the argument checks, so that calls of the same shapes, dtypes and options skip them.

The checks read every argument one by one, which takes longer than a small kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from ._torch_internals import is_tracing

# The cache is emptied when it holds this many distinct calls.
_MAX_CALLS = 4096
_SEEN: dict[Any, Any] = {}


def key(name: str, *values: Any) -> tuple[Any, ...] | None:
    """Everything that the checks of a call of `name` depend on. None where they must run: under torch.compile, and for
    mixed dtypes, which are valid under autocast only."""
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
        elif isinstance(value, tuple):
            # With the types: (True, 1) and (1.0, 1) equal (1, 1), but are invalid.
            parts.append((*map(type, value), value))
        else:
            parts.append((type(value), value))
    return tuple(parts)


def get(key: tuple[Any, ...] | None) -> Any:
    """The value that `store` was given for this key, else None."""
    try:
        return None if key is None else _SEEN.get(key)
    except TypeError:
        # The key is not hashable: it holds a list or a symbolic size.
        return None


def store(key: tuple[Any, ...] | None, value: Any) -> None:
    """Keeps the result of the checks of a call."""
    # While torch.jit.trace records, the sizes in the key are tensors.
    if key is None or is_tracing():
        return
    if len(_SEEN) >= _MAX_CALLS:
        _SEEN.clear()
    try:
        _SEEN[key] = value
    except TypeError:
        return
