"""The enclosing autocast region, in a form that torch.compile of every supported torch can trace."""

from __future__ import annotations

from typing import Any

import torch

# At import: torch 2.11's compiler cannot trace is_autocast_available.
_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia") if torch.amp.is_autocast_available(name)
)


def has_autocast(device: str) -> bool:
    """Whether a device type knows autocast regions; "meta" does not."""
    return device in _DEVICES


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of the enclosing autocast region for a device type; None outside one, or if it has no autocast."""
    if device not in _DEVICES or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast_operands(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype of the enclosing autocast region; float64 stays, as for `F.conv2d`."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return tuple(cast(tensor) for tensor in (x, *others))
