"""Score a network on images with known masks: per-image figures, their means, and an all-white mask beside them."""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from frd_model.checkpoints import add_checkpoint_argument, open_checkpoint
from frd_model.data.images import write_json
from frd_model.evaluate_data import Labelled, add_source_arguments, open_source
from frd_model.metrics import aggregate, auc, image_metrics
from frd_model.predict import POLICIES, predict

COLUMNS = ("f1", "permute_f1", "auc", "iou")


@dataclass
class Report:
    """Figures of one network on one set.

    rows: one per image, in order: name, kind, edited (fraction of the pixels), score, seconds, alarm (fraction of the
        pixels above the threshold), and for forged images f1, permute_f1, auc, iou and white_*, the same of a mask
        that marks every pixel.
    """

    threshold: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Means over the forged images, false alarms on the untouched ones, and the means by kind of forgery."""
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
                "photo_false_alarm": _mean([float(r["score"] > 0.5) for r in clean]),
                "mean_score": _mean([r["score"] for r in clean]),
                # how well the scores tell forged from untouched photos, whatever the threshold
                "score_auc": auc(scores, edited) if self.rows else math.nan,
            },
        }


def evaluate(
    samples: Iterable[Labelled],
    model: nn.Module,
    *,
    size: str = "auto",
    threshold: float = 0.5,
    device: str = "cpu",
) -> Report:
    """Predict every sample at its own size and compare with its mask.

    F1, AUC and IoU are not defined on an untouched image: such images count only in the false-alarm rate.
    """
    report = Report(threshold)
    for sample in samples:
        result = predict(sample.image, model, size=size, threshold=threshold, device=device)
        row: dict[str, Any] = {
            "name": sample.name,
            "kind": sample.kind,
            "edited": float(sample.mask.mean()),
            "score": result.score,
            "alarm": float(result.mask.mean()),
            "seconds": result.seconds,
        }
        if sample.mask.any():
            row |= {
                k: v
                for k, v in image_metrics(result.probability, sample.mask, threshold).items()
                if k in COLUMNS
            }
            white = image_metrics(np.ones_like(result.probability), sample.mask, threshold)
            row |= {f"white_{k}": white[k] for k in COLUMNS}
        report.rows.append(row)
    return report


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One line per image; columns that do not apply to an untouched image stay empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="a pixel above it counts as edited (default 0.5)"
    )
    parser.add_argument("--size", choices=POLICIES, default="auto", help="see `frd predict`; default auto")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the figures of every image")
    parser.add_argument(
        "--json-out", type=Path, metavar="FILE", help="write the means and how they were made"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the means, write the files asked for."""
    source = open_source(args)
    checkpoint = open_checkpoint(args.checkpoint, args.device, model=args.model, preset=args.preset)
    start = time.perf_counter()
    bar = tqdm(source.samples, total=source.length, desc="evaluate", disable=None)
    report = evaluate(bar, checkpoint.model, size=args.size, threshold=args.threshold, device=args.device)
    if not report.rows:
        print(f"frd evaluate: no images in {source.label}", file=sys.stderr)
        return 1
    summary = {
        "checkpoint": checkpoint.label,
        "data": source.label,
        "size_policy": args.size,
        **report.summary(),
        "seconds": round(time.perf_counter() - start, 2),
    }
    print(format_summary(summary))
    if args.csv:
        write_csv(args.csv, report.rows)
    if args.json_out:
        write_json(args.json_out, _nan_as_none(summary))
    return 0


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
            f"photos with a score above 0.5: {100 * clean['photo_false_alarm']:.1f} %, "
            f"AUC of the score: {clean['score_auc']:.4f}"
        )
    return "\n".join(lines)


def _nan_as_none(value: Any) -> Any:
    """JSON has no NaN: a figure that is not defined on these images becomes null."""
    if isinstance(value, dict):
        return {k: _nan_as_none(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _means(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    means = aggregate([{c: r[prefix + c] for c in COLUMNS} for r in rows])
    return {c: float(means.get(c, math.nan)) for c in COLUMNS}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
