"""`frd robustness`: scores of a checkpoint as photos are distorted, as in the paper's Figure 3."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frd_model.evaluate_presets import EVAL_PRESETS, eval_preset
from frd_model.output import check_output_folder, say

from .arguments import add_checkpoint_argument, add_device_argument, at_least, open_checkpoint, path
from .evaluate import add_source_arguments, open_sources

if TYPE_CHECKING:
    from torch import nn

    from frd_model.evaluate import Report
    from frd_model.labelled import Source
    from frd_model.robustness import Condition

DISTORTIONS = ("noise", "blur", "jpeg", "gamma")
NOISES = {
    "variance": ("noise-variance",),
    "sigma": ("noise-sigma",),
    "both": ("noise-variance", "noise-sigma"),
}
RESULT = "robustness.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    add_checkpoint_argument(parser, "--model-preset")
    parser.add_argument(
        "--out",
        type=path,
        required=True,
        metavar="DIR",
        help=f"folder for {RESULT}, .csv, .md and .png; a run that was interrupted goes on there",
    )
    parser.add_argument(
        "--distortions", nargs="+", choices=DISTORTIONS, default=list(DISTORTIONS), help="default: all"
    )
    parser.add_argument(
        "--noise",
        choices=tuple(NOISES),
        default="variance",
        help="what the levels 3 to 23 of the noise are: its variance (default), as in the paper's code, its standard "
        "deviation, or one after the other",
    )
    parser.add_argument("--noise-seed", type=at_least(0), default=0, help="seed of the noise (default 0)")
    parser.add_argument(
        "--preset",
        choices=tuple(EVAL_PRESETS),
        default="benco-512",
        help="protocol, see `frd evaluate` (default benco-512)",
    )
    parser.add_argument(
        "--metric", help="of table and plot (default: the preset's at the optimal threshold, or its own)"
    )
    add_device_argument(parser)
    parser.add_argument("--method", help="name in the results (default: the checkpoint)")
    parser.add_argument(
        "--beside",
        type=path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"{RESULT} of another method, for the table and the plot; may be repeated",
    )
    parser.add_argument("--overwrite", action="store_true", help="measure again what the folder holds")


def run(args: argparse.Namespace) -> int:
    """Measure, write the results after each condition. Status 1 if a photo could not be scored."""
    from frd_model import robustness
    from frd_model.data.images import write_bytes, write_json

    check_output_folder("--out", args.out)
    others = [_beside(file, args.preset) for file in args.beside]
    metric = _metric(args)
    wanted = robustness.conditions(
        [name for kind in args.distortions for name in (NOISES[args.noise] if kind == "noise" else (kind,))]
    )
    sources = open_named(args)
    _warn(sources)
    checkpoint = open_checkpoint(args.checkpoint, args.device, model=args.model, preset=args.model_preset)
    settings = {
        "method": args.method or checkpoint.label,
        "checkpoint": checkpoint.label,
        "weights": _digest(checkpoint.model),
        "data": {name: f"{source.label}, {source.length} photos" for name, source in sources.items()},
        "files": {name: source.files for name, source in sources.items()},
        "preset": eval_preset(args.preset).to_dict(),
        "metric": metric,
        "noise_seed": args.noise_seed,
    }
    rows = _earlier(args, settings)
    done = sum((row["distortion"], row["level"]) in wanted for row in rows)
    if done:
        say(f"{done} of {len(wanted) * len(sources)} evaluations are done already", sys.stderr)
    result = {"settings": settings, "rows": rows}
    reported: set[str] = set()
    for row, report in robustness.measure(
        lambda: open_named(args),
        checkpoint.model,
        wanted,
        preset=args.preset,
        seed=args.noise_seed,
        done=rows,
        watch=_watch,
    ):
        _report_failed(report, reported)
        rows.append(row)
        write_json(args.out / RESULT, result)
    results = [result, *others]
    table = robustness.markdown(results)
    say_lines(table)
    write_json(args.out / RESULT, result)
    write_bytes(args.out / "robustness.md", table.encode(errors="surrogateescape"))
    write_bytes(args.out / "robustness.csv", robustness.csv_text(result).encode(errors="surrogateescape"))
    try:
        robustness.plot(results, args.out / "robustness.png")
    except ModuleNotFoundError as error:
        say(f"frd robustness: no plot: {error}", sys.stderr)
    return 1 if any(row["failed"] for row in rows) else 0


def open_named(args: argparse.Namespace) -> dict[str, Source]:
    """The sets that the arguments name; each of several has all of --data in its label, as a result must be one of
    them."""
    import dataclasses

    sources = open_sources(args)
    if len(sources) == 1:
        return sources
    given = ", ".join(args.data)
    return {n: dataclasses.replace(source, label=f"{n} of {given}") for n, source in sources.items()}


def say_lines(text: str) -> None:
    """Print a text of several lines that may hold file names."""
    for line in text.splitlines():
        say(line)


def _metric(args: argparse.Namespace) -> str:
    from frd_model.evaluate import PIXEL_METRICS

    preset = EVAL_PRESETS[args.preset]
    metric = args.metric or preset.table.get("optimal", preset.main)
    if metric not in PIXEL_METRICS:
        raise ValueError(f"--metric must be one of {', '.join(PIXEL_METRICS)}, got {metric!r}")
    return metric


def _read(file: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        keys = {"method", "metric", "preset", "data", "noise_seed"}
        if not keys <= result["settings"].keys() or not all("distortion" in row for row in result["rows"]):
            raise ValueError("other keys")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "another kind of file"
        raise ValueError(f"{str(file)!r} must be a {RESULT} of `frd robustness`, got {reason}") from None
    return result


def _beside(file: Path, preset: str) -> dict[str, Any]:
    result = _read(file)
    other = result["settings"]["preset"]["name"]
    if other != preset:
        raise ValueError(f"--beside {str(file)!r} must be of preset {preset}, got {other}")
    return result


def _earlier(args: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that an earlier run with the same settings has left in the folder."""
    file = args.out / RESULT
    if args.overwrite or not file.exists():
        return []
    found = _read(file)
    # How the result is called and shown changes no figure.
    free = ("method", "metric", "checkpoint")
    differing = [
        key
        for key, value in settings.items()
        if key not in free and found["settings"].get(key, value) != value
    ]
    if differing:
        raise ValueError(
            f"{str(file)!r} must be of the same {differing[0]} to go on with it, got another; choose another --out, or "
            "--overwrite to replace it"
        )
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def _digest(model: nn.Module) -> str:
    """Of the weights: whether a result belongs to them, wherever their file is now."""
    import hashlib

    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def _warn(sources: dict[str, Source]) -> None:
    for source in sources.values():
        if source.skipped:
            say(f"frd robustness: skipped {source.skipped}", sys.stderr)
        if source.inverted:
            say(f"frd robustness: warning: {source.inverted}; --invert-masks turns them round", sys.stderr)


def _watch(name: str, condition: Condition, source: Source) -> Any:
    from tqdm import tqdm

    title = f"{name}: {condition.distortion}" + (f" {condition.level}" if condition.level else "")
    return tqdm(source.samples, total=source.length, desc=title, disable=None)


def _report_failed(report: Report, reported: set[str]) -> None:
    """A line for each photo, not for each condition."""
    for failed in report.failed:
        name, error = failed["name"], failed["error"]
        line = error if name in error else f"{name}: {error}"
        if line not in reported:
            reported.add(line)
            say(f"frd robustness: {line}", sys.stderr)
