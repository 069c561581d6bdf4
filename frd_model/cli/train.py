"""`frd train`: a YAML configuration, flags that override it, and resuming."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frd_model.output import say

from . import DEFECTS

if TYPE_CHECKING:
    from frd_model.train import TrainConfig

# The configuration's keys that have a flag of their own; --set reaches all others.
FLAGS: dict[str, tuple[str, type, str]] = {
    "--images": ("data.train_images", str, "folder of training photos; sets data.source to folder"),
    "--masks": (
        "data.train_masks",
        str,
        "folder of their masks, paired by name; a photo without one is untouched",
    ),
    "--val-images": (
        "data.val_images",
        str,
        "folder of validation photos; default: a held-out tenth of the others",
    ),
    "--val-masks": ("data.val_masks", str, "folder of their masks"),
    "--json": (
        "data.train_json",
        str,
        'list of [image, mask or "Negative"] to train on; sets data.source to json',
    ),
    "--photos-dir": (
        "data.photos",
        str,
        "folder whose photos in train and val are forged in the place of the packaged ones",
    ),
    "--val-json": ("data.val_json", str, "such a list to validate on"),
    "--protocol": (
        "data.protocol",
        str,
        "training lists made from the data sets: cat, benco, frdnet or mvss (docs/data.md)",
    ),
    "--per-set": (
        "data.per_set",
        int,
        "photos of each data set in an epoch; default: all, or the protocol's",
    ),
    "--resize": ("data.resize", int, "resize whole photos to squares of this side, in the place of the crop"),
    "--augment": ("data.augment", str, "own (default) or mvss: augmentation of own photos"),
    "--crop": ("data.crop", int, "side of the square training crops, cut at the photos' own scale"),
    "--model": ("model.name", str, "network, such as frdnet_mit_b2"),
    "--model-preset": ("model.preset", str, "its variant: paper, released or lite; --preset chooses one too"),
    "--encoder-weights": (
        "model.encoder_weights",
        str,
        "ImageNet weights of the encoder, such as mit_b2.pth or hf://nvidia/mit-b2",
    ),
    "--output": ("output", str, "directory for weights, state, configuration and TensorBoard events"),
    "--epochs": ("epochs", int, "epochs of the whole run"),
    "--batch-size": ("batch_size", int, "images of one step, over all processes and parts"),
    "--accumulate": ("accumulate", int, "parts that a process computes its batch in, to need less memory"),
    "--lr": ("optim.lr", float, "peak learning rate"),
    "--ema": ("optim.ema", float, "decay of the averaged weights; 0 switches averaging off"),
    "--seed": ("seed", int, "seed of weights, order and forgeries"),
    "--device": ("device", str, "cpu, cuda or cuda:N"),
    "--amp": ("amp", str, "none, bf16 or fp16 (autocast; fp16 with a gradient scaler)"),
    "--workers": ("workers", int, "processes that prepare images; 0: the training process itself"),
    "--save-every": ("save_every", int, "write last.pt every N steps too; always every 10 minutes"),
}
SETS = {
    "--data": ("data.train", "a data set to train on (docs/data.md lists the layouts)"),
    "--val-data": ("data.val", "a data set to validate on; default: held-out photos of the others"),
}
# What the flags call the ways to name data, and the keys of each, without data.train or data.val.
WAYS = {"--images and --masks": ("_images", "_masks"), "--json": ("_json",), "--data": ("",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Several processes, one per GPU: torchrun --nproc-per-node 2 -m frd_model train ... They divide each batch and "
        "compute the same steps as one process."
    )
    parser.add_argument(
        "--preset",
        choices=("paper", "released"),
        help="how to train, net included: the paper's text (Adam 5e-4, batch 16) or the authors' code "
        "(AdamW 5e-5, cosine, warm-up, batch 32, fp16); --config, the flags and --set change single settings of it",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file; without it and --preset the defaults hold, or those of the run that --resume continues",
    )
    for flag, (key, kind, text) in FLAGS.items():
        name = flag[2:].upper().replace("-", "_")
        parser.add_argument(flag, dest=key, type=kind, metavar=name, default=None, help=text)
    for flag, (key, text) in SETS.items():
        parser.add_argument(
            flag, dest=key, action="append", metavar="[NAME=]LAYOUT:PATH", help=f"{text}; may be repeated"
        )
    parser.add_argument(
        "--channels-last", action="store_true", default=None, help="channels_last memory format"
    )
    parser.add_argument(
        "--compile", action="store_true", default=None, help="compile the network with torch.compile"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override any key of the configuration (config.yaml in the output has all), as --set data.crop=320",
    )
    parser.add_argument(
        "--recursive", action="store_true", default=None, help="search the folders with their sub-folders"
    )
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument(
        "--resume",
        action="store_true",
        help="continue from last.pt in the output, in mid-epoch too, also with more --epochs",
    )
    earlier.add_argument("--overwrite", action="store_true", help="replace an earlier run in the output")
    parser.add_argument(
        "--stop-after", type=int, metavar="N", help="end after N epochs of this call; resume later"
    )
    parser.add_argument(
        "--max-minutes", type=float, metavar="M", help="end after the epoch that passes M minutes"
    )


def run(args: argparse.Namespace) -> int:
    from frd_model.train.config import load_config

    _check_limits(args)
    changes = overrides(args)
    earlier = None if args.config or args.preset else _saved_config(args.resume, changes)
    config = load_config(args.config or earlier, changes, args.preset)
    # After the configuration is read: its mistakes are reported before torch is imported.
    from frd_model.train import processes

    processes.join(config.device)
    try:
        _train(args, config)
    except Exception as error:
        if processes.world() == 1 or isinstance(error, DEFECTS):
            raise
        raise processes.ProcessError(processes.describe(error)) from error
    processes.leave()
    return 0


def _train(args: argparse.Namespace, config: TrainConfig) -> None:
    from frd_model.train import Trainer, processes

    trainer = Trainer(config)
    if args.resume:
        trainer.resume()
        if trainer.epoch == config.epochs and trainer.is_first:
            print(f"all {config.epochs} epochs are done; a larger --epochs extends the run")
    trainer.fit(stop_after=args.stop_after, max_minutes=args.max_minutes, overwrite=args.overwrite)
    bad = processes.gather(trainer.bad)
    if not trainer.is_first:
        return
    for part in trainer.bad:
        names = set().union(*(found[part] for found in bad))
        if names:
            print(f"{len(names)} {part} photos could not be used, see above", file=sys.stderr)
    best, last = (trainer.output / f"{name}.safetensors" for name in ("best", "last"))
    if best.exists():
        say(f"best weights by validation (mean of AUC and permute-F1 {trainer.best:.4f}): {best}")
    elif last.exists():
        say(f"weights of the last epoch, as validation could not choose a best one: {last}")


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags change, by dotted key; --set has the last word."""
    from frd_model.train.config import ConfigError, parse_override

    found = {key: getattr(args, key) for key, _, _ in FLAGS.values() if getattr(args, key) is not None}
    if args.channels_last is not None:
        found["channels_last"] = args.channels_last
    if args.compile is not None:
        found["compile"] = args.compile
    if args.recursive is not None:
        found["data.recursive"] = args.recursive
    if "data.crop" in found and "data.resize" in found:
        raise ConfigError("--crop and --resize exclude each other, got both")
    if "data.crop" in found:
        # The crop takes the place of a preset's or a file's resize.
        found["data.resize"] = None
    found |= {key: getattr(args, key) for key, _ in SETS.values() if getattr(args, key) is not None}
    # Data given by flags replaces the data of the configuration file.
    for part, prefix in (("train", "--"), ("val", "--val-")):
        keys = {way: [f"data.{part}{end}" for end in ends] for way, ends in WAYS.items()}
        given = [way for way in keys if any(key in found for key in keys[way])]
        if len(given) > 1:
            flags = (way.replace("--", prefix) for way in given[:2])
            raise ConfigError(f"{' and '.join(flags)} exclude each other, got both")
        if given:
            others = [key for way in keys if way != given[0] for key in keys[way]]
            found |= {key: () if key == f"data.{part}" else None for key in others}
            if part == "train":
                found.setdefault("data.photos", None)
                found["data.source"] = dict(zip(WAYS, ("folder", "json", "sets"), strict=True))[given[0]]
    return found | dict(parse_override(text) for text in args.set)


def _saved_config(resume: bool, changes: dict[str, Any]) -> Path | None:
    """The stored configuration of the run to resume, used without --config, so that flags need not be repeated."""
    from frd_model.train.config import TrainConfig

    path = Path(str(changes.get("output", TrainConfig.output))).expanduser() / "config.yaml"
    return path if resume and path.is_file() else None


def _check_limits(args: argparse.Namespace) -> None:
    from frd_model.train.config import ConfigError

    if args.stop_after is not None and args.stop_after < 1:
        raise ConfigError(f"--stop-after must be at least 1, got {args.stop_after}")
    if args.max_minutes is not None and not 0 < args.max_minutes < math.inf:
        raise ConfigError(f"--max-minutes must be positive and finite, got {args.max_minutes}")
