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
from typing import TYPE_CHECKING, Any

from frd_model.config import ENGINES, NAME_PREFIX, PRECISIONS, PRESETS
from frd_model.output import check_output_file

if TYPE_CHECKING:
    from torch import nn

    from frd_model.data.dataset import PairDataset


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


def add_photos_dir(parser: argparse.ArgumentParser) -> None:
    """--photos-dir, beside --sample."""
    parser.add_argument(
        "--photos-dir",
        type=path,
        metavar="DIR",
        help="--sample: the photos of DIR/train, DIR/val and DIR/heldout (tools/fetch_photos.py makes such a folder)",
    )


@dataclass(frozen=True)
class Checkpoint:
    """A loaded network and its name in results."""

    model: nn.Module
    label: str


def add_checkpoint_argument(parser: argparse.ArgumentParser, preset_flag: str = "--preset") -> None:
    """--checkpoint, and --model and `preset_flag` for files that hold no configuration."""
    parser.add_argument(
        "--checkpoint",
        default=None,
        metavar="demo|FILE|hf://OWNER/NAME",
        help="weights: a safetensors file or last.pt of `frd train`, or any .pth or .safetensors of the net, or a "
        "repository on the Hugging Face Hub, or a file of `frd export`; `demo` (default) is the small one in the "
        "package",
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
    """Load a checkpoint or an exported file for inference. None loads the demo and says on stderr that it is one.

    Args:
        model, preset: see :func:`frd_model.load_model`; not for exported files, which run on the CPU.
    """
    from frd_model.device import parse_device, to_first_device
    from frd_model.exported import is_exported, load_exported
    from frd_model.weights import load_model

    automatic = device == "auto"
    target = parse_device("cpu" if automatic else device)
    if name is None and not quiet:
        print(
            "Using the demo checkpoint: a small network trained on forgeries of 43 photos, no forensic proof.",
            file=sys.stderr,
        )
    label = "demo" if name is None else name
    if is_exported(label):
        if model or preset:
            raise UsageError(f"{label}: an exported file holds its network; leave out model and preset")
        if target.type != "cpu":
            raise UsageError(f"{label}: an exported file runs on the CPU; --device must be cpu, got {device}")
        return Checkpoint(load_exported(label), label)
    net = load_model(label, target, model=model, preset=preset)
    return Checkpoint(to_first_device(net) if automatic else net, label)


def add_device_argument(parser: argparse.ArgumentParser, default: str = "cpu") -> None:
    """--device: cpu, cuda, cuda:N, mps, or auto."""
    parser.add_argument(
        "--device",
        default=default,
        help=f"cpu, cuda, cuda:N, mps, or auto: a GPU if there is one (default {default})",
    )


def add_engine_arguments(
    parser: argparse.ArgumentParser, engine: str = "auto", precision: str = "auto"
) -> None:
    """--engine and --precision, which `prepared` reads, with these defaults; an exported file has its own engine."""
    # Not the default itself, so that it is known what was asked for.
    parser.set_defaults(default_engine=engine)
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help=f"what runs the network; auto: torch (default {engine})",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=precision,
        help=f"of the network; auto: bf16 where the hardware has it and the checkpoint says that it changes little "
        f"(default {precision})",
    )


def prepared(checkpoint: Checkpoint, args: argparse.Namespace) -> Checkpoint:
    """The checkpoint in the engine and precision that the arguments ask for."""
    from frd_model.engines import prepare
    from frd_model.exported import is_exported
    from frd_model.output import say

    default = "auto" if is_exported(checkpoint.label) else args.default_engine
    model = prepare(
        checkpoint.model,
        args.engine or default,
        args.precision,
        notify=lambda text: say(f"frd {args.command}: {text}", sys.stderr),
    )
    return Checkpoint(model, checkpoint.label)


def runs_in(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a record says of a prepared checkpoint: the engine, and the precision where it is not float32."""
    engine, precision = checkpoint.model.engine, checkpoint.model.precision
    return {"engine": engine} | ({} if precision == "float32" else {"precision": precision})


class UsageError(ValueError):
    """Arguments that do not fit together."""


def check_output_files(files: dict[str, Path | None], *, overwrite: bool) -> None:
    """`check_output_file` of each flag's file, where one is given; UsageError if two flags name one file."""
    seen: dict[str, str] = {}
    for flag, file in files.items():
        if file is None:
            continue
        other = seen.setdefault(os.path.realpath(file), flag)
        if other != flag:
            raise UsageError(f"{other} and {flag} must be two files, got {str(file)!r} twice")
        check_output_file(flag, file, overwrite=overwrite)


def add_data_arguments(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """--data, or --images with --masks, --json or --mani. Returns the group, for what a command takes beside them."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--data",
        action="append",
        metavar="[NAME=]LAYOUT:PATH",
        help="a data set, such as casia1:data/CASIA1, cover:DIR, json:FILE or collection:FILE; may be repeated "
        "(docs/data.md lists the layouts)",
    )
    which.add_argument("--images", metavar="DIR", help="folder of photos; needs --masks")
    which.add_argument("--json", metavar="FILE", help='list of [image, mask or "Negative"]')
    which.add_argument("--mani", metavar="DIR", help="folder with Tp (photos) and Gt (masks)")
    parser.add_argument("--masks", metavar="DIR", help="folder of masks, paired with the photos by name")
    parser.add_argument("--recursive", action="store_true", help="read the folders inside folders too")
    parser.add_argument(
        "--invert-masks", action="store_true", help="the masks are the other way round: black where edited"
    )
    return which


def open_data_arguments(args: argparse.Namespace, *, allow_authentic: bool = True) -> dict[str, PairDataset]:
    """The data sets that the arguments name, by name. `allow_authentic`: a photo of --images may have no mask.

    Raises:
        UsageError: arguments that do not fit together.
        DatasetError: a data set that cannot be used.
    """
    from frd_model.data.dataset import FolderDataset
    from frd_model.data.sets import open_sets

    if (args.masks is None) != (args.images is None):
        given, other = ("--masks", "--images") if args.images is None else ("--images", "--masks")
        raise UsageError(f"{given} needs {other}, got none")
    if args.recursive and args.json is not None:
        raise UsageError("--recursive goes with folders, got --json")
    invert, recursive = args.invert_masks, args.recursive
    if args.images is None:
        specs = args.data or [f"json:{args.json}" if args.json is not None else f"mani:{args.mani}"]
        return open_sets(specs, invert_masks=invert, recursive=recursive)
    folders = FolderDataset(
        args.images, args.masks, allow_authentic=allow_authentic, invert_masks=invert, recursive=recursive
    )
    return {_common_name(Path(args.images), Path(args.masks)): folders}


def _common_name(images: Path, masks: Path) -> str:
    """SET of SET/images and SET/masks, else the name of the photos' folder."""
    images, masks = images.resolve(), masks.resolve()
    return images.parent.name if images.parent == masks.parent else images.name
