"""`frd evaluate`: score a checkpoint on images with known masks."""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from frd_model.data.photos import SPLITS
from frd_model.output import check_output_file, one_line, say
from frd_model.tiling import POLICIES

from .arguments import add_checkpoint_argument, fraction, open_checkpoint, path

if TYPE_CHECKING:
    from frd_model.evaluate import Report, Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--threshold",
        type=fraction,
        default=0.5,
        help="a pixel above it counts as edited, an untouched photo with a score above it as a false alarm "
        "(default 0.5)",
    )
    parser.add_argument("--size", choices=POLICIES, default="auto", help="see `frd predict`; default auto")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--csv", type=path, metavar="FILE", help="write the figures of every image")
    parser.add_argument(
        "--json-out", type=path, metavar="FILE", help="write the means, how they were made, and what failed"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE of --csv and --json-out")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the means, write the files asked for. Status 1 if an image could not be scored."""
    from tqdm import tqdm

    from frd_model.evaluate import evaluate, format_summary

    _check_outputs(args)
    source = open_source(args)
    if source.skipped:
        say(f"frd evaluate: skipped {source.skipped}", sys.stderr)
    if source.inverted:
        say(f"frd evaluate: warning: {source.inverted}; --invert-masks turns them round", sys.stderr)
    checkpoint = open_checkpoint(args.checkpoint, args.device, model=args.model, preset=args.preset)
    start = time.perf_counter()
    bar = tqdm(source.samples, total=source.length, desc="evaluate", disable=None)
    report = evaluate(bar, checkpoint.model, size=args.size, threshold=args.threshold, device=args.device)
    if not report.rows and not report.failed:
        say(f"frd evaluate: no images in {source.label}", sys.stderr)
        return 1
    for failed in report.failed:
        name, error = failed["name"], failed["error"]
        say(f"frd evaluate: {error if name in error else f'{name}: {error}'}", sys.stderr)
    summary = {
        "checkpoint": checkpoint.label,
        "data": source.label,
        "size_policy": args.size,
        **report.summary(),
        "seconds": round(time.perf_counter() - start, 2),
    }
    print(format_summary(summary))
    if report.failed:
        total = len(report.rows) + len(report.failed)
        say(f"frd evaluate: {len(report.failed)} of {total} images could not be scored", sys.stderr)
    written = _write_outputs(args, report, summary)
    return 0 if written and not report.failed else 1


def _check_outputs(args: argparse.Namespace) -> None:
    """What would fail, or destroy something, after hours of work."""
    if args.csv and args.json_out and args.csv.resolve() == args.json_out.resolve():
        raise ValueError(f"--csv and --json-out must be two files, got {str(args.csv)!r} twice")
    for flag, file in (("--csv", args.csv), ("--json-out", args.json_out)):
        if file is not None:
            check_output_file(flag, file, overwrite=args.overwrite)


def _write_outputs(args: argparse.Namespace, report: Report, summary: dict[str, Any]) -> bool:
    """Each file is written even where the other cannot be."""
    from frd_model.data.images import write_json
    from frd_model.evaluate import write_csv

    written = True
    for file, write in (
        (args.csv, lambda file: write_csv(file, [*report.rows, *report.failed])),
        (args.json_out, lambda file: write_json(file, _nan_as_none(summary))),
    ):
        try:
            if file is not None:
                write(file)
        except OSError as error:
            say(f"frd evaluate: {str(file)!r} cannot be written: {one_line(error)}", sys.stderr)
            written = False
    return written


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """--images with --masks, or --json, --mani or --sample."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--images", metavar="DIR", help="folder of photos; needs --masks")
    which.add_argument("--json", metavar="FILE", help='list of [image, mask or "Negative"]')
    which.add_argument("--mani", metavar="DIR", help="folder with Tp (photos) and Gt (masks)")
    which.add_argument(
        "--sample", choices=sorted(SPLITS), help="seeded forgeries of the sample photos of a split"
    )
    parser.add_argument("--masks", metavar="DIR", help="folder of masks, paired with photos by name")
    parser.add_argument("--recursive", action="store_true", help="read the folders inside folders too")
    parser.add_argument("--invert-masks", action="store_true", help="the masks are black where edited")
    parser.add_argument(
        "--repeats", type=int, default=5, help="--sample: forgeries of each kind per photo (default 5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="--sample: seed of the forgeries (default 0)")


def open_source(args: argparse.Namespace) -> Source:
    """The samples that the arguments name. Raises ValueError where they do not fit together."""
    from frd_model.data.dataset import FolderDataset, JsonDataset, ManiDataset
    from frd_model.evaluate import forged_samples, labelled_pairs

    if args.masks is not None and args.images is None:
        raise ValueError("--masks needs --images, got none")
    if args.recursive and args.images is None and args.mani is None:
        raise ValueError("--recursive needs --images or --mani, got neither")
    if args.sample:
        if args.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
        if args.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {args.seed}")
        if args.invert_masks:
            raise ValueError("--invert-masks needs masks in files, got --sample")
        return forged_samples(args.sample, args.repeats, args.seed)
    if args.json is not None:
        return labelled_pairs(JsonDataset(args.json, invert_masks=args.invert_masks), args.json)
    if args.mani is not None:
        mani = ManiDataset(args.mani, invert_masks=args.invert_masks, recursive=args.recursive)
        return labelled_pairs(mani, args.mani)
    if args.masks is None:
        raise ValueError("--images needs --masks, got none")
    folders = FolderDataset(
        args.images,
        args.masks,
        allow_authentic=True,
        invert_masks=args.invert_masks,
        recursive=args.recursive,
    )
    return labelled_pairs(folders, args.images)


def _nan_as_none(value: Any) -> Any:
    """JSON has no NaN: a figure that is not defined on these images becomes null."""
    if isinstance(value, dict):
        return {k: _nan_as_none(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
