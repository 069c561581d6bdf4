"""Forged batches for the stage `training`, made beforehand in several processes: forging must not be what a step of
training waits for."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # images [B, 3, H, W], masks [B, 1, H, W]


class Forge:
    """Of one process, which inherits the data set with its photos."""

    dataset: Any
    batch: int

    @classmethod
    def start(cls, dataset: Any, batch: int) -> None:
        cls.dataset, cls.batch = dataset, batch
        cv2.setNumThreads(1)
        torch.set_num_threads(1)

    @classmethod
    def make(cls, number: int) -> tuple[Any, Any]:
        """As arrays, which need no shared memory to travel."""
        first = number * cls.batch
        samples = [cls.dataset[index] for index in range(first, first + cls.batch)]
        images, masks = zip(*samples, strict=True)
        return np.stack([image.numpy() for image in images]), np.stack([mask.numpy() for mask in masks])


def forge_batches(
    dataset: Any, batch: int, count: int, device: str, seconds: float, processes: int
) -> list[Batch]:
    """`count` batches on the device, or as many as there are when the seconds are over.

    Raises:
        RuntimeError: not even one was made in time.
    """
    end, batches = time.monotonic() + seconds, []
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, Forge.start, (dataset, batch)) as pool:
        made = pool.imap(Forge.make, range(count))
        with contextlib.suppress(multiprocessing.TimeoutError):
            for _ in range(count):
                arrays = made.next(timeout=max(0.0, end - time.monotonic()))
                images, masks = (torch.from_numpy(array).to(device) for array in arrays)
                batches.append((images, masks))
    if not batches:
        raise RuntimeError(f"forging must make a batch within its time, got none in {seconds:.1f} s")
    return batches
