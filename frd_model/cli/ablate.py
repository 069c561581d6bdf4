"""`frd ablate`: train and evaluate the six rows of the paper's Table 3."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frd_model.evaluate_presets import EVAL_PRESETS
from frd_model.output import check_output_folder, say

from .arguments import at_least, open_data_arguments, path
from .evaluate import add_source_arguments
from .robustness import open_named, say_lines

if TYPE_CHECKING:
    from frd_model.train import TrainConfig

# As in frd_model.ablate, which needs torch.
ROWS = ("baseline", "icm-one-round", "icm", "dpm-central", "dpm", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    parser.add_argument(
        "--out",
        type=path,
        required=True,
        metavar="DIR",
        help="folder for a run in ROW/seed-N each, ablation.json and ablation.md; what is done there is not done again",
    )
    parser.add_argument(
        "--train-preset", choices=("paper", "released"), help="how to train, see `frd train --preset`"
    )
    parser.add_argument(
        "--config", type=path, metavar="FILE", help="YAML file as of `frd train`, its net being the full row"
    )
    parser.add_argument(
        "--train-data",
        action="append",
        metavar="[NAME=]LAYOUT:PATH",
        help="a data set to train on; may be repeated (default: the configuration's)",
    )
    parser.add_argument(
        "--val-data",
        action="append",
        metavar="[NAME=]LAYOUT:PATH",
        help="a data set to choose the best weights on; may be repeated",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change any key of the configuration"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all six")
    parser.add_argument(
        "--seeds", nargs="+", type=at_least(0), metavar="N", help="default: the configuration's one"
    )
    parser.add_argument(
        "--eval-preset",
        choices=tuple(EVAL_PRESETS),
        default="benco-512",
        help="protocol, see `frd evaluate --preset` (default benco-512)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the configuration's)")
    parser.add_argument("--overwrite", action="store_true", help="train the rows anew")


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, print the table. Status 1 if a photo could not be scored."""
    from frd_model.ablate import is_done, net_config, row_config, run_row, table3
    from frd_model.data.images import write_bytes, write_json

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "frd ablate must run in one process, got several of torchrun; start it once for each GPU"
        )
    check_output_folder("--out", args.out)
    base = _base(args)
    # Before hours of work: every row's configuration, and the data.
    runs = [
        (row, row_config(base, row, seed, args.out / row / f"seed-{seed}"))
        for seed in dict.fromkeys(args.seeds or [base.seed])
        for row in dict.fromkeys(args.rows)
    ]
    for _, config in runs:
        net_config(config)
    for source in open_named(args).values():
        if source.skipped:
            say(f"frd ablate: skipped {source.skipped}", sys.stderr)
        if source.inverted:
            say(f"frd ablate: warning: {source.inverted}; --invert-masks turns them round", sys.stderr)
    if args.overwrite or not all(is_done(config) for _, config in runs):
        _check_apart(args, base)
    results = []
    for number, (row, config) in enumerate(runs, 1):
        done = is_done(config) and not args.overwrite
        say(
            f"{number} of {len(runs)}: {row}, seed {config.seed}, {'is trained' if done else 'train'}: {config.output}"
        )
        results.append(
            run_row(
                config,
                row,
                sources=lambda: open_named(args),
                preset=args.eval_preset,
                overwrite=args.overwrite,
            )
        )
        write_json(args.out / "ablation.json", {"runs": results})
        write_bytes(
            args.out / "ablation.md", table3(results, args.eval_preset).encode(errors="surrogateescape")
        )
    say_lines(table3(results, args.eval_preset))
    failed = [
        failure for result in results for found in result["sets"].values() for failure in found["failed"]
    ]
    for failure in {f["name"]: f for f in failed}.values():
        say(f"frd ablate: {failure['name']}: {failure['error']}", sys.stderr)
    return 1 if failed else 0


def _check_apart(args: argparse.Namespace, base: TrainConfig) -> None:
    """ValueError where a photo of the test sets is one that the nets would be trained or chosen on."""
    from frd_model.train.data import open_data
    from frd_model.train.state import shared_photos

    if args.sample:
        return
    for part, own in zip(("training", "validation"), open_data(base), strict=True):
        for name, test in open_data_arguments(args).items():
            shared = shared_photos(own, test)
            if shared:
                raise ValueError(
                    f"test set {name!r} and the {part} set must not share photos, got {len(shared)} in both, the first "
                    f"{shared[0]!r}"
                )


def _base(args: argparse.Namespace) -> TrainConfig:
    from frd_model.train.config import load_config, parse_override

    changes: dict[str, Any] = {}
    if args.train_data:
        changes |= {"data.source": "sets", "data.train": args.train_data, "data.photos": None}
        changes |= dict.fromkeys(("data.train_images", "data.train_masks", "data.train_json"))
    if args.val_data:
        changes |= {"data.val": args.val_data}
        changes |= dict.fromkeys(("data.val_images", "data.val_masks", "data.val_json"))
    if args.device:
        changes["device"] = args.device
    config: Path | None = args.config
    return load_config(config, changes | dict(parse_override(text) for text in args.set), args.train_preset)
