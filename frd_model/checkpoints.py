"""Which checkpoint a command uses: a file, or the demonstration one that ships with the package."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from frd_model.weights import load_model

DEMO = Path(__file__).parent / "assets" / "demo.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded network and the name under which results mention it."""

    model: nn.Module
    label: str


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """--checkpoint demo|FILE."""
    parser.add_argument(
        "--checkpoint",
        default=None,
        metavar="demo|FILE",
        help="safetensors file written by `frd train`; `demo` (default) is the small one in the package",
    )


def open_checkpoint(name: str | None, device: str, *, quiet: bool = False) -> Checkpoint:
    """Load a checkpoint for inference. None means the demo, and says on stderr that it is a demonstration."""
    target = parse_device(device)
    if name is None and not quiet:
        print(
            "Using the demo checkpoint: a small network trained on a few sample photos, a demonstration only.",
            file=sys.stderr,
        )
    path = DEMO if name in (None, "demo") else Path(str(name))
    model = load_model(path)
    return Checkpoint(model.eval().to(target), "demo" if path == DEMO else str(path))


def parse_device(name: str) -> torch.device:
    """Raises ValueError for a name torch does not know, or a GPU that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch finds no usable GPU")
    return device
