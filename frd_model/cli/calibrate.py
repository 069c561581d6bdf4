"""`frd calibrate`: choose a checkpoint's score and its thresholds on photos with known masks."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from frd_model.output import one_line, say

from .arguments import (
    UsageError,
    add_checkpoint_argument,
    add_data_arguments,
    add_device_argument,
    at_least,
    check_output_files,
    open_checkpoint,
    open_data_arguments,
    path,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from frd_model.labelled import Labelled, Source, Unusable
    from frd_model.score import ScoreRule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser)
    parser.add_argument(
        "--untouched",
        type=path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of more photos that nobody edited: thresholds hold the better, the more different ones there are",
    )
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--out",
        type=path,
        required=True,
        metavar="FILE",
        help="where to write the checkpoint with its score rule (safetensors)",
    )
    parser.add_argument(
        "--statistic",
        default="auto",
        metavar="auto|NAME",
        help="statistic of the map that the score is made of; auto (default): the one of the highest AUC",
    )
    add_device_argument(parser)
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="predict in bfloat16 too and state what it changes, so that `--precision auto` may use it",
    )
    parser.add_argument(
        "--resamples",
        type=at_least(0),
        default=1000,
        help="draws of the bootstrap for the 95 %% intervals (default 1000; 0: none)",
    )
    parser.add_argument(
        "--json-out", type=path, metavar="FILE", help="write the rule and the statistics of every photo"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE of --out and --json-out")


def run(args: argparse.Namespace) -> int:
    """Calibrate, print the figures, write the checkpoint. Status 1 if a photo or an output could not be used."""
    from frd_model.calibrate import calibrate
    from frd_model.data.images import write_json
    from frd_model.labelled import labelled_pairs, untouched_photos
    from frd_model.weights import save_with_rule

    _check(args)
    sources = [labelled_pairs(data, name) for name, data in open_data_arguments(args).items()]
    sources += [untouched_photos(folder) for folder in args.untouched]
    for source in sources:
        if source.skipped:
            say(f"frd calibrate: skipped {source.skipped}", sys.stderr)
        if source.inverted:
            say(f"frd calibrate: warning: {source.inverted}; --invert-masks turns them round", sys.stderr)
    checkpoint = open_checkpoint(args.checkpoint, args.device, model=args.model, preset=args.preset)
    model = checkpoint.model
    found = calibrate(
        _samples(sources),
        model,
        statistic=args.statistic,
        bf16=args.bf16,
        resamples=args.resamples,
    )
    for failed in found.failed:
        name, error = failed["name"], failed["error"]
        say(f"frd calibrate: {error if name in error else f'{name}: {error}'}", sys.stderr)
    for line in describe(found.rule):
        say(line)
    errors = len(found.failed)
    errors += not _write(args.out, lambda: save_with_rule(model, found.rule, checkpoint.label, args.out))
    if args.json_out is not None:
        content = {
            "checkpoint": checkpoint.label,
            "data": [source.label for source in sources],
            "rule": found.rule.to_dict(),
            "photos": found.rows,
            "failed": found.failed,
        }
        errors += not _write(args.json_out, lambda: write_json(args.json_out, content))
    return 1 if errors else 0


def _write(file: Path, write: Callable[[], object]) -> bool:
    """Whether the file could be written: a full disk must not lose the other one too."""
    try:
        write()
    except OSError as error:
        say(f"frd calibrate: {str(file)!r} cannot be written: {one_line(error)}", sys.stderr)
        return False
    say(f"wrote {file}")
    return True


def _check(args: argparse.Namespace) -> None:
    """What would fail, or destroy something, after minutes of work."""
    from frd_model.exported import is_exported
    from frd_model.map_statistics import HEAD, STATISTICS

    if is_exported(args.checkpoint):
        raise UsageError(
            f"--checkpoint must be weights, got the exported file {args.checkpoint!r}; calibrate, then export"
        )
    if args.statistic not in ("auto", HEAD, *STATISTICS):
        names = ", ".join((*STATISTICS, HEAD))
        raise UsageError(f"--statistic must be auto or one of {names}, got {args.statistic!r}")
    if args.out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors, got {str(args.out)!r}")
    check_output_files({"--out": args.out, "--json-out": args.json_out}, overwrite=args.overwrite)


def _samples(sources: list[Source]) -> Iterator[Labelled | Unusable]:
    from tqdm import tqdm

    with tqdm(total=sum(source.length for source in sources), desc="calibrate", disable=None) as bar:
        for source in sources:
            for sample in source.samples:
                yield sample
                bar.update()


def describe(rule: ScoreRule) -> list[str]:
    """The statistics that were compared and the figures of the rule, as lines."""
    v = rule.validation
    hosts = "" if v["hosts"] is None else f", made from {v['hosts']} photos"
    lines = [f"{v['forged']} forged and {v['untouched']} untouched images{hosts}"]
    lines.append(f"{'statistic':<24} {'AUC':>7} {'95 % interval':>18} {'found at 5 %':>13}")
    for name, figures in v["statistics"].items():
        lines.append(
            f"{name:<24} {figures['auc']:>7.4f} {_interval(figures['auc_interval']):>18} "
            f"{100 * figures['found_0.05']:>11.1f} %" + ("  <- the score" if name == rule.statistic else "")
        )
    lines.append(f"score = sigmoid({rule.scale:.6g} * {rule.statistic} {rule.offset:+.6g})")
    lines.append(
        f"{'false alarms':<12} {'score above':>11} {'of untouched':>13} {'left out':>10} {'of forged':>10} "
        f"{'95 % interval':>18}"
    )
    for rate, limit in rule.thresholds.items():
        lines.append(
            f"{'at most ' + format(100 * float(rate), 'g') + ' %':<12} {limit:>11.4f} "
            f"{100 * v['false_alarms'][rate]:>11.2f} % {_percent(v['false_alarms_left_out'], rate):>10} "
            f"{100 * v['found'][rate]:>8.1f} % {_interval(v['found_interval'][rate]):>18}"
        )
    if v["false_alarms_left_out"]:
        lines.append("left out: untouched images above the threshold that those of the other photos give")
    lines.append(
        f"pixels above {rule.pixel_threshold:g}: mean F1 of the forged {v['pixel_f1']:.4f}, "
        f"marked in untouched {100 * v['pixel_false_alarm']:.2f} %"
    )
    if "bf16" in v:
        b = v["bf16"]
        lines.append(
            f"in bfloat16: AUC of the score {b['auc']:.4f}, mean F1 {b['pixel_f1']:.4f}, marked in untouched "
            f"{100 * b['pixel_false_alarm']:.2f} %; other than in float32: the score by {b['score_difference']:.4f}, "
            f"{100 * b['pixel_difference']:.2f} % of the pixels, {100 * b['verdict_difference']:.1f} % of the verdicts"
        )
    if not rule.scale:
        lines.append(f"note: {rule.statistic} does not rank forged images higher: all photos get one score")
    if v["untouched"] < 100:
        lines.append(
            f"note: {v['untouched']} untouched images are fewer than 100: none is above the 1 % threshold"
        )
    return lines


def _percent(shares: dict[str, float] | None, rate: str) -> str:
    return "-" if shares is None else f"{100 * shares[rate]:.2f} %"


def _interval(ends: list[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"
