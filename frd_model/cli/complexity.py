"""`frd complexity`: parameters, multiply-accumulates, memory and time of a net, as in the paper's Table 2."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from frd_model.config import BASELINE_PREFIX, NAME_PREFIX, PRESETS

from .arguments import UsageError, add_device_argument, at_least, check_output_files, path

if TYPE_CHECKING:
    from torch import nn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model",
        metavar="NAME",
        help=f"{NAME_PREFIX}ENCODER or {BASELINE_PREFIX}ENCODER (default frdnet_mit_b2)",
    )
    which.add_argument("--checkpoint", metavar="demo|FILE|hf://OWNER/NAME", help="the net of a checkpoint")
    which.add_argument(
        "--module",
        metavar="MODULE:CALLABLE",
        help="any other network: what the callable returns, a torch.nn.Module that takes [1, 3, H, W]",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="of --model (default paper)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change an option of --model, for example --set icm=false",
    )
    parser.add_argument("--size", type=_size, default=(512, 512), metavar="N|HxW", help="default 512")
    parser.add_argument("--repeats", type=at_least(1), default=10, help="timed forward passes (default 10)")
    add_device_argument(parser)
    parser.add_argument("--name", help="name in the table (default: the model's)")
    parser.add_argument("--markdown", type=path, metavar="FILE", help="write the table")
    parser.add_argument("--json-out", type=path, metavar="FILE", help="write the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE of --markdown and --json-out")


def _size(text: str) -> tuple[int, int]:
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"must be a side or HEIGHTxWIDTH in pixels, got {text!r}")
    return sides[0], sides[-1]


def run(args: argparse.Namespace) -> int:
    check_output_files({"--markdown": args.markdown, "--json-out": args.json_out}, overwrite=args.overwrite)
    name, model = _net(args)

    from frd_model.complexity import measure, table2
    from frd_model.data.images import write_bytes, write_json

    height, width = args.size
    figures = measure(model, height, width, args.repeats)
    table = table2({name: figures})
    print(table, end="")
    if args.markdown:
        write_bytes(args.markdown, table.encode())
    if args.json_out:
        write_json(args.json_out, {"name": name, **figures})
    return 0


def _net(args: argparse.Namespace) -> tuple[str, nn.Module]:
    """The net and its name."""
    if args.model is None and (args.checkpoint or args.module) and (args.preset or args.set):
        raise UsageError("--preset and --set belong to --model, got another net")
    if args.module:
        return args.name or args.module, _load(args.module, args.device)
    from frd_model.device import parse_device

    device = parse_device(args.device)
    if args.checkpoint:
        from frd_model.weights import load_model

        return args.name or args.checkpoint, load_model(args.checkpoint, device)
    from frd_model.factory import create_model
    from frd_model.train.config import parse_override

    model, preset = args.model or "frdnet_mit_b2", args.preset or "paper"
    options: dict[str, Any] = dict(parse_override(text) for text in args.set)
    label = " ".join([f"{model}, {preset}", *args.set])
    return args.name or label, create_model(model, preset=preset, **options).to(device)


def _load(target: str, device: str) -> nn.Module:
    from torch import nn

    from frd_model.device import parse_device

    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise UsageError(f"--module must be MODULE:CALLABLE, such as mynet:build, got {target!r}")
    # As `python -m` does.
    sys.path.insert(0, os.getcwd())
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--module: {error}") from None
    net = build()
    if not isinstance(net, nn.Module):
        raise ValueError(f"--module must return a torch.nn.Module, got {type(net).__name__} of {target!r}")
    return net.to(parse_device(device))
