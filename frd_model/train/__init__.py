"""Training: the configuration of a run, and the trainer."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["ConfigError", "Ema", "TrainConfig", "Trainer", "TrainingError", "load_config"]

_HOME = {
    "ConfigError": ".config",
    "Ema": ".state",
    "TrainConfig": ".config",
    "Trainer": ".trainer",
    "TrainingError": ".state",
    "load_config": ".config",
}


def __getattr__(name: str) -> Any:
    # Lazy, as in frd_model: a mistake in a configuration is reported before torch is imported.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
