"""`frd train`: a YAML configuration, flags that override it, and resuming."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

# The configuration's keys that have a flag of their own; --set reaches all others.
FLAGS: dict[str, tuple[str, type, str]] = {
    "--output": ("output", str, "directory for weights, state, configuration and TensorBoard events"),
    "--epochs": ("epochs", int, "epochs of the whole run"),
    "--batch-size": ("batch_size", int, "images of one step"),
    "--lr": ("optim.lr", float, "peak learning rate"),
    "--ema": ("optim.ema", float, "decay of the averaged weights; 0 switches averaging off"),
    "--seed": ("seed", int, "seed of weights, order and forgeries"),
    "--device": ("device", str, "cpu, cuda or cuda:N"),
    "--amp": ("amp", str, "none or bf16 (autocast)"),
    "--workers": ("workers", int, "processes that prepare images; 0: the training process itself"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file; without it the defaults hold")
    for flag, (key, kind, text) in FLAGS.items():
        parser.add_argument(flag, dest=key, type=kind, default=None, help=text)
    parser.add_argument(
        "--channels-last", action="store_true", default=None, help="channels_last memory format"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override any key of the configuration, for example --set data.crop=320",
    )
    parser.add_argument("--resume", action="store_true", help="continue from last.pt in the output directory")
    parser.add_argument(
        "--stop-after", type=int, metavar="N", help="end after N epochs of this call; resume later"
    )
    parser.add_argument(
        "--max-minutes", type=float, metavar="M", help="end after the epoch that passes M minutes"
    )


def run(args: argparse.Namespace) -> int:
    from frd_model.train_config import load_config

    config = load_config(args.config, overrides(args))
    # After the configuration has been read: a typing mistake in it should not wait for torch.
    from frd_model.train import Trainer

    trainer = Trainer(config)
    if args.resume:
        trainer.resume()
    trainer.fit(stop_after=args.stop_after, max_minutes=args.max_minutes)
    best = trainer.output / "best.safetensors"
    print(f"best weights by validation (mean of AUC and permute-F1 {trainer.best:.4f}): {best}")
    return 0


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags change, by dotted key; --set comes last."""
    from frd_model.train_config import parse_override

    found = {key: getattr(args, key) for key, _, _ in FLAGS.values() if getattr(args, key) is not None}
    if args.channels_last is not None:
        found["channels_last"] = args.channels_last
    return found | dict(parse_override(text) for text in args.set)
