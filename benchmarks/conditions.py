"""The frame of a report file: when, on what, and what else the machine was doing."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from frd_kernels.info import collect

from .measure import load_limit
from .revision import revision


def report(
    records: list[dict[str, Any]],
    threads: int,
    load_before: Sequence[float],
    memory_kept: bool,
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """To be called with as many CPU threads set as were measured with."""
    found: dict[str, Any] = {
        "when": now(),
        "revision": revision(),
        "threads": threads,
        "load_before": list(load_before),
        "load_after": list(os.getloadavg()),
        "load_limit": load_limit(),
        "memory_kept": memory_kept,
        "quiet": all(record["quiet"] for record in records),
        "machine": collect(),
        "cases": records,
    }
    return found | ({} if calibration is None else {"calibration": calibration})


def origin(device: str) -> dict[str, Any]:
    """When, of which revision, on which GPU and with which libraries something was found."""
    return {
        "when": now(),
        "revision": revision(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": collect()["versions"],
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write(path: pathlib.Path, value: Any) -> None:
    """As JSON, the old file being there until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    draft.replace(path)
