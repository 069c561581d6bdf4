"""Arguments that several commands share: paths, numbers, and the checkpoint to use.

Imports neither torch nor OpenCV, so that `frd COMMAND --help` and usage errors are immediate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from frd_model.config import NAME_PREFIX, PRESETS

if TYPE_CHECKING:
    from torch import nn


def path(text: str) -> Path:
    """A path with ~ and ~user expanded (the shell does not expand --out=~/x)."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or directory, got an empty text")
    return Path(os.path.expanduser(text))


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1], got {text!r}")
    return value


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of a whole number with a lower bound."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
        return value

    return whole_number


def tile_side(text: str) -> int:
    """The side of a tile in pixels."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 64:
        raise argparse.ArgumentTypeError(f"must be at least 64 pixels, in whole numbers, got {text!r}")
    return value


@dataclass(frozen=True)
class Checkpoint:
    """A loaded network and its name in results."""

    model: nn.Module
    label: str


def add_checkpoint_argument(parser: argparse.ArgumentParser, preset_flag: str = "--preset") -> None:
    """--checkpoint demo|FILE, and --model and `preset_flag` for files that hold no configuration."""
    parser.add_argument(
        "--checkpoint",
        default=None,
        metavar="demo|FILE",
        help="weights: a safetensors file or last.pt of `frd train`, or any .pth or .safetensors of the net; "
        "`demo` (default) is the small one in the package",
    )
    add_model_arguments(parser, preset_flag)


def add_model_arguments(parser: argparse.ArgumentParser, preset_flag: str = "--preset") -> None:
    """--model and `preset_flag`, for files that hold no configuration."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"{NAME_PREFIX}ENCODER, of a checkpoint without a configuration (default: the preset's)",
    )
    parser.add_argument(
        preset_flag,
        choices=tuple(PRESETS),
        help="of a checkpoint without a configuration (default: released, the authors')",
    )


def open_checkpoint(
    name: str | None, device: str, *, model: str | None = None, preset: str | None = None, quiet: bool = False
) -> Checkpoint:
    """Load a checkpoint for inference. None loads the demo and says on stderr that it is one.

    Args:
        model, preset: see :func:`frd_model.load_model`.
    """
    from frd_model.predict import parse_device
    from frd_model.weights import load_model

    target = parse_device(device)
    if name is None and not quiet:
        print(
            "Using the demo checkpoint: a small network trained on a few sample photos, a demonstration only.",
            file=sys.stderr,
        )
    label = "demo" if name is None else name
    return Checkpoint(load_model(label, target, model=model, preset=preset), label)
