"""Which checkpoint a command uses: a file, or the demonstration one that ships with the package.

Without torch until one is opened, so that help and usage errors of the commands need no seconds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frd_model.config import NAME_PREFIX, PRESETS

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Checkpoint:
    """A loaded network and the name under which results mention it."""

    model: nn.Module
    label: str


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """--checkpoint demo|FILE, and --model and --preset for files that hold no configuration."""
    parser.add_argument(
        "--checkpoint",
        default=None,
        metavar="demo|FILE",
        help="weights: a safetensors file or last.pt of `frd train`, or any .pth or .safetensors of the net; "
        "`demo` (default) is the small one in the package",
    )
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model and --preset, for files that hold no configuration."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"{NAME_PREFIX}ENCODER, of a checkpoint without a configuration (default: the preset's)",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="of a checkpoint without a configuration (default: released, the authors')",
    )


def open_checkpoint(
    name: str | None, device: str, *, model: str | None = None, preset: str | None = None, quiet: bool = False
) -> Checkpoint:
    """Load a checkpoint for inference. None means the demo, and says on stderr that it is a demonstration.

    Args:
        model, preset: see :func:`frd_model.load_model`.
    """
    from frd_model.weights import load_model

    target = parse_device(device)
    if name is None and not quiet:
        print(
            "Using the demo checkpoint: a small network trained on a few sample photos, a demonstration only.",
            file=sys.stderr,
        )
    label = "demo" if name is None else name
    return Checkpoint(load_model(label, target, model=model, preset=preset), label)


def parse_device(name: str | torch.device) -> torch.device:
    """Raises ValueError for a name torch does not know, or a device that is not there or holds no data."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch finds no usable GPU")
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that torch can use here, got {name!r}: {reason}") from None
    return device
