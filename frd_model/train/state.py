"""State of a training run beside the model: averaged weights, random states, and checks of a resumed run."""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from frd_model.data.files import real_path

from .config import ConfigError, TrainConfig, flatten
from .data import files_of

# What may differ in a resumed run: where it runs, what it logs, how long it goes on. Steps depend on none of it.
FREE = (
    *("output", "device", "workers", "images_logged", "backend", "epochs", "data.max_bad"),
    *("accumulate", "compile", "max_nonfinite", "log_every", "save_every", "save_minutes"),
)


class TrainingError(RuntimeError):
    """Training cannot continue: a non-finite loss, too many bad files, or the state or output of another run."""


@dataclass
class Tally:
    """Sums over the steps of an epoch that were taken, and the number of skipped ones; row: the last ones in a row."""

    loss: float = 0.0
    norm: float = 0.0
    steps: int = 0
    skipped: int = 0
    row: int = 0

    def add(self, loss: float, norm: float) -> bool:
        """Count a step; False where it was skipped, its loss or gradient not being finite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped, self.row = self.skipped + 1, self.row + 1
            return False
        self.loss, self.norm, self.steps, self.row = self.loss + loss, self.norm + norm, self.steps + 1, 0
        return True

    def figures(self) -> dict[str, float]:
        """Means over the steps that were taken."""
        return {
            "train/loss": self.loss / self.steps,
            "train/grad_norm": self.norm / self.steps,
            "train/skipped": float(self.skipped),
        }


class Ema:
    """Exponential moving average of a model's parameters and buffers.

    The decay rises from a low value to its full one, so that the random initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update every average with the model's current value."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1.0 - decay)
            else:
                self.values[name].copy_(value)

    @contextlib.contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has the averaged values, afterwards its own again."""
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.values)
        try:
            yield
        finally:
            model.load_state_dict(own)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; seed in [0, 2**32)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def get_rng() -> dict[str, Any]:
    """RNG states as tensors and plain values, which torch.load reads with weights_only=True."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": (version, list(internal), gauss_next),
    }


def set_rng(state: dict[str, Any]) -> None:
    """Restore what `get_rng` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def write_state(state: dict[str, Any], path: Path) -> None:
    """torch.save that leaves the earlier file where it fails or is killed; OSError where the file cannot be written."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = " ".join(str(error.__context__ or error).split())[:200]
        raise OSError(f"{str(path)!r} cannot be written, what it held stays: {reason}") from None


def check_same_run(saved: TrainConfig, wanted: TrainConfig) -> None:
    """TrainingError that names the settings, except FREE, in which two runs differ."""
    theirs, ours = flatten(saved.to_dict()), flatten(wanted.to_dict())
    changed = [
        f"{key} was {theirs.get(key)!r} in the saved run, now {ours.get(key)!r}"
        for key in theirs | ours
        if key not in FREE and theirs.get(key) != ours.get(key)
    ]
    if changed:
        raise TrainingError(f"cannot resume: {'; '.join(changed)}")


def check_same_data(saved: dict[str, str], found: dict[str, str]) -> None:
    """TrainingError if a set does not have the files of the saved run."""
    for part, files in found.items():
        if saved.get(part, files) != files:
            raise TrainingError(
                f"cannot resume: the {part} set must hold the files of the saved run, {saved[part]}, got {files}"
            )


def shared_photos(one: Any, other: Any) -> list[str]:
    """The files of photos that are in both sets; none where one of them is made of the packaged photos."""
    first, second = ({real_path(file) for file in files_of(data) or ()} for data in (one, other))
    return sorted(first & second)


def check_apart(training: Any, validation: Any) -> None:
    """ConfigError where a photo is in both sets: the best checkpoint would be chosen by what it was taught."""
    shared = shared_photos(training, validation)
    if shared:
        raise ConfigError(
            f"training and validation set must not share photos, got {len(shared)} in both, the first {shared[0]!r}"
        )
