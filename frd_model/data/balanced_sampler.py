"""Balanced sampling: as many photos of each data set in an epoch, whatever the sizes of the sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class BalancedSampler(Sampler[int]):
    """`per_set` indices of each set in an epoch, shuffled; the order depends on (seed, epoch) only.

    Without replacement no photo of a set comes twice before each has come once, so that a set of fewer than `per_set`
    photos is gone through several times. Several processes take every `world`-th index, and each the same number: up
    to world - 1 of the last indices of an epoch are left out.

    Args:
        sets: the indices of each set's photos.
        per_set: indices of each set in an epoch.
        replacement: draw with replacement.
        rank, world: this process, of how many.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[int]],
        per_set: int,
        seed: int = 0,
        *,
        replacement: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not sets or not all(len(indices) for indices in sets):
            raise ValueError(f"sets must hold indices, got sizes {[len(indices) for indices in sets]}")
        if per_set < 1:
            raise ValueError(f"per_set must be at least 1, got {per_set}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in [0, {world}), the number of processes, got {rank}")
        self.sets, self.per_set, self.seed, self.replacement = sets, per_set, seed, replacement
        self.rank, self.world = rank, world
        self.epoch = self.start = 0

    @property
    def total(self) -> int:
        """Indices of an epoch, over all processes."""
        return self.per_set * len(self.sets)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The epoch of the next iteration, which leaves out the first `start` indices, counted over all processes."""
        if not 0 <= start <= self.total:
            raise ValueError(f"start must be in [0, {self.total}], the indices of an epoch, got {start}")
        self.epoch, self.start = epoch, start

    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch, of all processes."""
        rng = np.random.default_rng([self.seed, epoch])
        drawn = [indices[place] for indices in self.sets for place in self._places(rng, len(indices))]
        return [drawn[place] for place in rng.permutation(len(drawn))]

    def _places(self, rng: np.random.Generator, size: int) -> Sequence[int]:
        if self.replacement:
            return rng.integers(size, size=self.per_set).tolist()
        rounds = [rng.permutation(size) for _ in range(-(-self.per_set // size))]
        places: list[int] = np.concatenate(rounds)[: self.per_set].tolist()
        return places

    def __len__(self) -> int:
        return (self.total - self.start) // self.world

    def __iter__(self) -> Iterator[int]:
        own = self.order(self.epoch)[self.start :][self.rank :: self.world]
        return iter(own[: len(self)])
