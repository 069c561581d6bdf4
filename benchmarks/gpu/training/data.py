"""Forged batches for the stage `training`, made beforehand: forging must not be what a step of training waits for."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # images [B, 3, H, W], masks [B, 1, H, W]


def forge_batches(dataset: Any, batch: int, count: int, device: str, seconds: float) -> list[Batch]:
    """`count` batches on the device, or as many as there are when the seconds are over.

    In threads: most of it is NumPy's and OpenCV's work, which holds no lock. Forked processes would stand still where
    torch has computed with threads before.

    Raises:
        RuntimeError: not even one was made in time.
    """
    end, batches = time.monotonic() + seconds, []
    with ThreadPoolExecutor() as pool:
        for first in range(0, count * batch, batch):
            if time.monotonic() > end:
                break
            samples = pool.map(dataset.__getitem__, range(first, first + batch))
            images, masks = (torch.stack(parts).to(device) for parts in zip(*samples, strict=True))
            batches.append((images, masks))
    if not batches:
        raise RuntimeError(f"forging must make a batch within its time, got none in {seconds:.1f} s")
    return batches
