"""Which images a process takes in which step: a function of seed, epoch and step, so that runs can be resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """The indices of this process's share of each step's batch.

    The processes divide one batch, the same for any number of them: together they see each image of an epoch once.
    A set with a method `order(epoch)`, which returns the epoch's indices, is taken in that order; others are shuffled.

    Args:
        data: the training set. batch_size: images of a step over all processes. rank, world: this process of how many.
    """

    def __init__(self, data: Any, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = self.first = 0

    @property
    def steps(self) -> int:
        """Steps of an epoch; the last one may be smaller."""
        return math.ceil(len(self.data) / self.batch_size)

    def set_position(self, epoch: int, step: int) -> None:
        """The next iteration starts at a step of an epoch, both counted from 0."""
        self.epoch, self.first = epoch, step

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for step in range(self.first, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            start, end = self._share(len(batch))
            # A process that a small last batch has nothing for computes one image all the same, which counts for none.
            yield batch[start:end] or batch[:1]

    def is_spare(self, step: int) -> bool:
        """Whether this process's share of a step's batch is empty."""
        start, end = self._share(min(self.batch_size, len(self.data) - step * self.batch_size))
        return start == end

    def _share(self, count: int) -> tuple[int, int]:
        return count * self.rank // self.world, count * (self.rank + 1) // self.world

    def _order(self) -> list[int]:
        if hasattr(self.data, "order"):
            return list(self.data.order(self.epoch))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        # What a DataLoader draws before it shuffles: the order of runs of earlier versions, which may be resumed.
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        order: list[int] = torch.randperm(len(self.data), generator=generator).tolist()
        return order
