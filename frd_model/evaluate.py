"""Score a network on images with known masks: per-image figures, their means, and an all-white mask beside them."""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from frd_model.arguments import check_output_file, fraction, one_line, path, say
from frd_model.checkpoints import add_checkpoint_argument
from frd_model.evaluate_data import Labelled, Unusable, add_source_arguments, open_source
from frd_model.tiling import OVERLAP, POLICIES, TILE

if TYPE_CHECKING:
    from torch import nn

COLUMNS = ("f1", "permute_f1", "auc", "iou")


@dataclass
class Report:
    """Figures of one network on one set.

    rows: one per image, in order: name, kind, edited (fraction of the pixels), score, seconds, alarm (fraction of the
        pixels above the threshold), and for forged images f1, permute_f1, auc, iou and white_*, the same of a mask
        that marks every pixel.
    failed: name and error of each image that could not be scored, which no figure counts.
    """

    threshold: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Means over the forged images, false alarms on the untouched ones, and the means by kind of forgery.

        An untouched photo counts as a false alarm where its score is above the report's threshold.
        """
        from frd_model.metrics import auc

        forged = [r for r in self.rows if r["edited"] > 0]
        clean = [r for r in self.rows if r["edited"] == 0]
        kinds = sorted({r["kind"] for r in forged if r["kind"]})
        scores = np.array([r["score"] for r in (*forged, *clean)])
        edited = np.array([r["edited"] > 0 for r in (*forged, *clean)])
        return {
            "threshold": self.threshold,
            "forged": {"images": len(forged), **_means(forged, "")},
            "white_mask": _means(forged, "white_"),
            "by_kind": {
                k: {
                    "images": sum(r["kind"] == k for r in forged),
                    **_means([r for r in forged if r["kind"] == k], ""),
                }
                for k in kinds
            },
            "authentic": {
                "images": len(clean),
                "pixel_false_alarm": _mean([r["alarm"] for r in clean]),
                "photo_false_alarm": _mean([float(r["score"] > self.threshold) for r in clean]),
                "mean_score": _mean([r["score"] for r in clean]),
                # how well the scores tell forged from untouched photos, whatever the threshold
                "score_auc": auc(scores, edited) if self.rows else math.nan,
            },
            "failed": self.failed,
        }


def evaluate(
    samples: Iterable[Labelled | Unusable],
    model: nn.Module,
    *,
    size: str = "auto",
    threshold: float = 0.5,
    device: str | None = None,
) -> Report:
    """Predict every sample at its own size, as `predict` does, and compare with its mask.

    F1, AUC and IoU are not defined on an untouched image: such images count only in the false-alarm rate. A
    sample that cannot be read or scored (NaN from the network, too large for the memory) goes to `failed` and
    the others are scored. Raises ValueError for bad arguments.
    """
    from frd_model.predict import check_options

    check_options(size, TILE, OVERLAP, threshold, 1)
    report = Report(threshold)
    for sample in samples:
        if isinstance(sample, Unusable):
            report.failed.append({"name": sample.name, "error": sample.error})
            continue
        try:
            report.rows.append(_score(sample, model, size, threshold, device))
        except Exception as error:  # one image's trouble, whatever it is, is not the others'
            report.failed.append({"name": sample.name, "error": one_line(error)})
    return report


def _score(
    sample: Labelled, model: nn.Module, size: str, threshold: float, device: str | None
) -> dict[str, Any]:
    from frd_model.metrics import image_metrics
    from frd_model.predict import predict

    result = predict(sample.image, model, size=size, threshold=threshold, device=device, progress=True)
    row: dict[str, Any] = {
        "name": sample.name,
        "kind": sample.kind,
        "edited": float(sample.mask.mean()),
        "score": result.score,
        "alarm": float(result.mask.mean()),
        "seconds": result.seconds,
    }
    probability = result.probability
    del result  # its mask is no longer needed, and the AUC takes memory
    if sample.mask.any():
        figures = image_metrics(probability, sample.mask, threshold)
        row |= {k: figures[k] for k in COLUMNS}
        row |= {f"white_{k}": v for k, v in _white_figures(sample.mask).items()}
    return row


def _white_figures(mask: npt.NDArray[np.bool_]) -> dict[str, float]:
    """The figures of a prediction that marks every pixel."""
    from frd_model.metrics import Confusion

    edited = int(np.count_nonzero(mask))
    counts = Confusion(edited, mask.size - edited, 0, 0)
    return {
        "f1": counts.f1(),
        "permute_f1": max(counts.f1(), counts.complement().f1()),
        "auc": 0.5 if 0 < edited < mask.size else math.nan,
        "iou": counts.iou(),
    }


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One line per image; columns that do not apply to an image stay empty."""
    from frd_model.data.images import write_bytes

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    # File names may hold bytes that are no text, which come out as they went in, and lists what no name can hold.
    legible = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text.getvalue())
    write_bytes(path, legible.encode(errors="surrogateescape"))


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

    from frd_model.checkpoints import open_checkpoint

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


def format_summary(summary: dict[str, Any]) -> str:
    """The means as a small table."""
    lines = [f"{'':<16} {'images':>6} " + " ".join(f"{c:>10}" for c in COLUMNS)]
    rows = {"forged": summary["forged"], **{f"  {k}": v for k, v in summary["by_kind"].items()}}
    rows["all-white mask"] = {"images": summary["forged"]["images"], **summary["white_mask"]}
    for name, row in rows.items():
        lines.append(f"{name:<16} {row['images']:>6} " + " ".join(f"{row[c]:>10.4f}" for c in COLUMNS))
    clean = summary["authentic"]
    if clean["images"]:
        lines.append(
            f"untouched photos: {clean['images']}; pixels falsely marked {100 * clean['pixel_false_alarm']:.2f} %, "
            f"photos with a score above {summary['threshold']:g}: {100 * clean['photo_false_alarm']:.1f} %, "
            f"AUC of the score: {clean['score_auc']:.4f}"
        )
    return "\n".join(lines)


def _nan_as_none(value: Any) -> Any:
    """JSON has no NaN: a figure that is not defined on these images becomes null."""
    if isinstance(value, dict):
        return {k: _nan_as_none(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _means(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    from frd_model.metrics import aggregate

    means = aggregate([{c: r[prefix + c] for c in COLUMNS} for r in rows])
    return {c: float(means.get(c, math.nan)) for c in COLUMNS}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
