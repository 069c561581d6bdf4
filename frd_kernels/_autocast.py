"""The autocast region around a call, in a form that torch.compile of every supported torch can trace."""

from __future__ import annotations

import torch

# Asked once: torch 2.11's compiler cannot trace the question.
_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia") if torch.amp.is_autocast_available(name)
)


def has_autocast(device: str) -> bool:
    """Whether a device type knows autocast regions; "meta" does not."""
    return device in _DEVICES


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of the autocast region for a device type; None outside one, and on devices without."""
    if device not in _DEVICES or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
