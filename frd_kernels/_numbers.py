"""Checks of numeric arguments: Python and NumPy numbers, and symbolic or traced sizes; a bool is not a number."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any, TypeGuard, cast

import torch


def is_integer(value: object) -> TypeGuard[int]:
    """Whether the value is an integer."""
    # The common case, without a function call.
    if type(value) is int:
        return True
    if isinstance(value, (int, torch.SymInt)):
        return not isinstance(value, bool)
    if isinstance(value, torch.Tensor):
        # While torch.jit.trace runs, sizes are tensors.
        return torch.jit.is_tracing() and value.dim() == 0
    return isinstance(value, numbers.Integral)


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is a real number."""
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return isinstance(value, numbers.Real)


def as_int(value: Any) -> int:
    """The integer as a Python int; a symbolic or traced size is returned as it is."""
    return cast(int, value) if isinstance(value, (int, torch.SymInt, torch.Tensor)) else int(value)


def as_ints(values: Iterable[Any]) -> list[int]:
    """The integers as Python ints, whose products, unlike NumPy's, do not overflow."""
    return [value if type(value) is int else as_int(value) for value in values]


def parse_count(value: Any, name: str) -> int:
    """A positive int; raises ValueError."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return as_int(value)
