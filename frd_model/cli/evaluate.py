"""`frd evaluate`: score a checkpoint, or saved maps of any method, on images with known masks."""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from frd_model.config import PRESETS
from frd_model.data.photos import SPLITS
from frd_model.evaluate_presets import EVAL_PRESETS, eval_preset
from frd_model.output import one_line, say
from frd_model.tiling import POLICIES

from .arguments import (
    UsageError,
    add_checkpoint_argument,
    add_data_arguments,
    add_device_argument,
    add_engine_arguments,
    add_photos_dir,
    at_least,
    check_output_files,
    fraction,
    open_checkpoint,
    open_data_arguments,
    path,
    prepared,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from frd_model.evaluate import Report
    from frd_model.labelled import Source
    from frd_model.saved_maps import SavedMaps
    from frd_model.shift_test import Look, ShiftTest

    Scorer = Callable[[Any], Report]

_OUTPUTS = {"--csv": "csv", "--json-out": "json_out", "--table": "table"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    add_checkpoint_argument(parser, "--model-preset")
    parser.add_argument(
        "--predictions",
        type=path,
        metavar="DIR",
        help="score maps of any method instead of a checkpoint: NAME.png (8 or 16 bit), NAME.npy, or NAME.npz "
        "with the key map",
    )
    parser.add_argument(
        "--preset",
        type=_preset,
        default="original",
        metavar="{" + ",".join(EVAL_PRESETS) + "}",
        help="protocol: sizes, thresholds, what enters the means (default original)",
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        help="a pixel above it counts as edited, an untouched photo with a score above it as a false alarm "
        "(default: the preset's, 0.5)",
    )
    parser.add_argument(
        "--size", choices=POLICIES, help="see `frd predict`; default: the preset's, auto for original"
    )
    add_device_argument(parser)
    add_engine_arguments(parser, engine="torch", precision="float32")
    parser.add_argument(
        "--method", help="name in the results (default: the checkpoint or DIR of --predictions)"
    )
    parser.add_argument(
        "--resamples",
        type=at_least(0),
        default=1000,
        help="draws of the bootstrap for the 95 %% intervals (default 1000; 0: none)",
    )
    parser.add_argument(
        "--shift-test",
        type=_side,
        nargs="?",
        const=256,
        metavar="SIDE",
        help="also compare the maps of the same pixels in the middle of crops of SIDE x SIDE pixels and beside their "
        "border (default 256)",
    )
    parser.add_argument("--csv", type=path, metavar="FILE", help="write the figures of every image")
    parser.add_argument(
        "--json-out", type=path, metavar="FILE", help="write the means, how they were made, and what failed"
    )
    parser.add_argument(
        "--table", type=path, metavar="FILE", help="write the paper's Table 1 with this row, in Markdown"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace FILE of --csv, --json-out and --table"
    )


def _preset(text: str) -> str:
    if text in EVAL_PRESETS:
        return text
    known = ", ".join(EVAL_PRESETS)
    hint = f"; a net's preset goes with --model-preset {text}" if text in PRESETS else ""
    raise argparse.ArgumentTypeError(f"must be one of {known}, got {text!r}{hint}")


def _side(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) >= 128 and int(text) % 32 == 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a multiple of 32 from 128, got {text!r}")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the means, write the files asked for. Status 1 if an image could not be scored."""
    _check_outputs(args)
    eval_preset(args.preset, size=args.size, threshold=args.threshold)
    _check_predictions(args)
    sources = open_sources(args)
    maps = _open_maps(args, list(sources))
    for source in sources.values():
        if source.skipped:
            say(f"frd evaluate: skipped {source.skipped}", sys.stderr)
        if source.inverted:
            say(f"frd evaluate: warning: {source.inverted}; --invert-masks turns them round", sys.stderr)
    label, score, look = _scorer(args, maps)
    reports: dict[str, Report] = {}
    summaries: list[dict[str, Any]] = []
    for name, source in sources.items():
        start = time.perf_counter()
        shift_test = _shift_test(args, look)
        reports[name] = _evaluate(source, score(name), shift_test)
        if not reports[name].rows and not reports[name].failed:
            say(f"frd evaluate: no images in {source.label}", sys.stderr)
            return 1
        summary = {
            "set": name,
            "method": args.method or label,
            "checkpoint": None if maps else label,
            "predictions": str(maps[name].folder) if maps else None,
            "data": source.label,
            "size_policy": reports[name].preset.size,
            **reports[name].summary(args.resamples),
            **({"shift_test": shift_test.summary(args.resamples)} if shift_test else {}),
            "seconds": round(time.perf_counter() - start, 2),
        }
        summaries.append(summary)
        _print(summary, reports[name], titled=len(sources) > 1)
    _say_about(maps, summaries)
    written = _write_outputs(args, reports, summaries)
    return 0 if written and not any(report.failed for report in reports.values()) else 1


def _check_predictions(args: argparse.Namespace) -> None:
    flags = {"--checkpoint": args.checkpoint, "--model": args.model, "--model-preset": args.model_preset}
    flags |= {"--size": args.size, "--shift-test": args.shift_test}
    given = [flag for flag, value in flags.items() if value is not None]
    if args.predictions is not None and given:
        raise UsageError(f"--predictions takes maps as they are and no {given[0]}: leave one of the two out")


def _open_maps(args: argparse.Namespace, names: list[str]) -> dict[str, SavedMaps]:
    """The maps of each set: those in DIR/SET where all of these folders are there. Empty without --predictions."""
    if args.predictions is None:
        return {}
    from frd_model.saved_maps import SavedMaps

    folders = {name: args.predictions / name for name in names}
    if len(names) == 1 or not all(folder.is_dir() for folder in folders.values()):
        return dict.fromkeys(names, SavedMaps(args.predictions))
    return {name: SavedMaps(folder) for name, folder in folders.items()}


def _scorer(
    args: argparse.Namespace, maps: dict[str, SavedMaps]
) -> tuple[str, Callable[[str], Scorer], Look | None]:
    """The method's name, what makes a report of the samples of a set by the set's name, and the net's maps of crops."""
    from frd_model.evaluate import evaluate, evaluate_saved
    from frd_model.shift_test import look_with

    if maps:
        options = {"preset": args.preset, "threshold": args.threshold}
        name = args.predictions.resolve().name
        return name, lambda name: partial(evaluate_saved, maps=maps[name], **options), None
    opened = open_checkpoint(args.checkpoint, args.device, model=args.model, preset=args.model_preset)
    checkpoint = prepared(opened, args)
    score = partial(
        evaluate,
        model=checkpoint.model,
        preset=args.preset,
        size=args.size,
        threshold=args.threshold,
    )
    return checkpoint.label, lambda _: score, look_with(checkpoint.model)


def _shift_test(args: argparse.Namespace, look: Look | None) -> ShiftTest | None:
    from frd_model.shift_test import ShiftTest

    return ShiftTest(look, args.shift_test) if look and args.shift_test else None


def _evaluate(source: Source, score: Scorer, shift_test: ShiftTest | None) -> Report:
    from tqdm import tqdm

    samples = shift_test.watch(source.samples) if shift_test else source.samples
    report = score(tqdm(samples, total=source.length, desc="evaluate", disable=None))
    for failed in report.failed:
        name, error = failed["name"], failed["error"]
        say(f"frd evaluate: {error if name in error else f'{name}: {error}'}", sys.stderr)
    return report


def _print(summary: dict[str, Any], report: Report, *, titled: bool) -> None:
    from frd_model.evaluate_output import format_summary
    from frd_model.shift_test import format_shift_test

    if titled:
        print()
        say(f"{summary['set']}: {summary['data']}")
    print(format_summary(summary))
    if "shift_test" in summary:
        print(format_shift_test(summary["shift_test"]))
    if report.failed:
        total = len(report.rows) + len(report.failed)
        say(f"frd evaluate: {len(report.failed)} of {total} images could not be scored", sys.stderr)


def _say_about(maps: dict[str, SavedMaps], summaries: list[dict[str, Any]]) -> None:
    """What folders of maps may not have been meant to hold."""
    for folder in dict.fromkeys(maps.values()):
        unused = folder.unused()
        if unused:
            say(
                f"frd evaluate: {len(unused)} maps belong to no photo, the first {str(unused[0])!r}",
                sys.stderr,
            )
        if folder.others:
            say(f"frd evaluate: {folder.others} files in {str(folder.folder)!r} are not maps", sys.stderr)
        if folder.too_dark():
            say(f"frd evaluate: warning: {folder.too_dark()}", sys.stderr)
    for summary in summaries:
        mean = summary["forged"]["auc"]
        if maps and mean < 0.4:
            say(
                f"frd evaluate: warning: the maps' AUC on {summary['set']} must be above 0.5 where edited pixels are "
                f"bright, got {mean:.3f}: inverted maps?",
                sys.stderr,
            )


def _check_outputs(args: argparse.Namespace) -> None:
    """What would fail, or destroy something, after hours of work."""
    files = {flag: getattr(args, name) for flag, name in _OUTPUTS.items()}
    check_output_files(files, overwrite=args.overwrite)


def _write_outputs(
    args: argparse.Namespace, reports: dict[str, Report], summaries: list[dict[str, Any]]
) -> bool:
    """Each file is written even where another cannot be."""
    from frd_model.data.images import write_bytes, write_json
    from frd_model.evaluate_output import write_csv

    several = len(summaries) > 1
    content = _nan_as_none({"sets": summaries} if several else summaries[0])
    rows = [
        {"set": name, **row} if several else row
        for name, report in reports.items()
        for row in (*report.rows, *report.failed)
    ]
    written = True
    for file, write in (
        (args.csv, lambda file: write_csv(file, rows)),
        (args.json_out, lambda file: write_json(file, content)),
        (args.table, lambda file: write_bytes(file, _table(content).encode(errors="surrogateescape"))),
    ):
        try:
            if file is not None:
                write(file)
        except OSError as error:
            say(f"frd evaluate: {str(file)!r} cannot be written: {one_line(error)}", sys.stderr)
            written = False
    return written


def _table(content: dict[str, Any]) -> str:
    from frd_model.evaluate_table import Table1

    table = Table1()
    for summary in content.get("sets", [content]):
        table.add(summary)
    return table.markdown()


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The data sets, or --sample."""
    add_data_arguments(parser).add_argument(
        "--sample", choices=sorted(SPLITS), help="seeded forgeries of the sample photos of a split"
    )
    add_photos_dir(parser)
    parser.add_argument(
        "--repeats", type=int, default=5, help="--sample: forgeries of each kind per photo (default 5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="--sample: seed of the forgeries (default 0)")


def open_sources(args: argparse.Namespace) -> dict[str, Source]:
    """The sets that the arguments name, by name. Raises ValueError where the arguments do not fit together."""
    from frd_model.labelled import forged_samples, labelled_pairs

    if not args.sample:
        if args.photos_dir:
            raise UsageError("--photos-dir goes with --sample, got none")
        given = ", ".join(args.data) if args.data else args.images or args.json or args.mani
        sets = open_data_arguments(args)
        return {name: labelled_pairs(data, given if len(sets) == 1 else name) for name, data in sets.items()}
    if args.masks is not None:
        raise UsageError("--masks needs --images, got none")
    if args.recursive:
        raise UsageError("--recursive goes with folders, got --sample")
    if args.repeats < 1:
        raise UsageError(f"--repeats must be at least 1, got {args.repeats}")
    if args.seed < 0:
        raise UsageError(f"--seed must be at least 0, got {args.seed}")
    if args.invert_masks:
        raise UsageError("--invert-masks needs masks in files, got --sample")
    return {args.sample: forged_samples(args.sample, args.repeats, args.seed, args.photos_dir)}


def _nan_as_none(value: Any) -> Any:
    """JSON has no NaN: a figure that is not defined on these images becomes null."""
    if isinstance(value, dict):
        return {k: _nan_as_none(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nan_as_none(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
