"""What `frd evaluate` shows and writes of a report: the summary as small tables, the images as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frd_model.data.images import write_bytes
from frd_model.evaluate import COLUMNS
from frd_model.evaluate_presets import EvalPreset
from frd_model.score import TARGETS


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One line per image; columns that do not apply to an image stay empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    # File names may hold bytes that are not text: they are written as they were read. Other surrogates
    # have no encoding.
    legible = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text.getvalue())
    write_bytes(path, legible.encode(errors="surrogateescape"))


def format_summary(summary: dict[str, Any]) -> str:
    """The means as small tables, the rules above them, and what they leave out below."""
    lines = [_rules(summary["preset"])] if "preset" in summary else []
    lines += (
        _pixel_lines(summary)
        if summary["forged"]["images"]
        else ["no forged photo was scored: no pixel metrics"]
    )
    lines += _image_lines(summary)
    lines += [f"skipped: {count} x {reason}" for reason, count in summary["skipped"].items()]
    lines += [f"note: {count} x {note}" for note, count in summary["notes"].items()]
    return "\n".join(lines)


def _pixel_lines(summary: dict[str, Any]) -> list[str]:
    """Pixel metrics, those of the two controls, and the means over the forged photos."""
    lines = [f"{'':<16} {'images':>6} " + " ".join(f"{c:>10}" for c in COLUMNS)]
    centre = summary["centre_control"]
    white = {"images": summary["forged"]["images"], **summary["white_mask"]}
    rows = [
        *_with_kinds("forged", summary["forged"], summary["by_kind"]),
        ("all-white mask", white),
        *_with_kinds("centre control", centre, centre["by_kind"]),
    ]
    for name, row in rows:
        lines.append(f"{name:<16} {row['images']:>6} " + " ".join(f"{row[c]:>10.4f}" for c in COLUMNS))
    lines += _above_centre(centre)
    lines.append(f"{'metric':<20} {'mean':>8} {'95 % interval':>18} {'images':>7}")
    for name, mean in summary["means"].items():
        interval = f"{mean['low']:.4f} to {mean['high']:.4f}"
        lines.append(f"{name:<20} {mean['mean']:>8.4f} {interval:>18} {mean['images']:>7}")
    for name, best in summary["best_threshold"].items():
        lines.append(
            f"{name:<20} {best['mean']:>8.4f} at {best['threshold']:.2f}, the best one threshold for the set"
        )
    return lines


def _with_kinds(name: str, total: Any, kinds: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, total), *((f"  {kind}", row) for kind, row in kinds.items())]


def _above_centre(centre: dict[str, Any]) -> list[str]:
    kinds = {"": centre, **{f" of {k}": v for k, v in centre["by_kind"].items()}}
    return [
        f"AUC above the centre control{name}: {v['above']['mean']:+.4f}, "
        f"95 % interval {v['above']['low']:+.4f} to {v['above']['high']:+.4f}"
        for name, v in kinds.items()
    ]


def _rules(preset: dict[str, Any]) -> str:
    return f"preset {EvalPreset(**preset).describe()}"


def _image_lines(summary: dict[str, Any]) -> list[str]:
    clean, level, lines = summary["authentic"], summary["image_level"], []
    if clean["images"]:
        lines.append(
            f"untouched photos: {clean['images']}; pixels falsely marked {100 * clean['pixel_false_alarm']:.2f} %, "
            f"photos with a score above {summary['threshold']:g}: {100 * clean['photo_false_alarm']:.1f} %"
        )
    if clean["images"] and summary["forged"]["images"]:
        low, high = level["auc_interval"]
        lines[-1] += f", AUC of the score: {clean['score_auc']:.4f}"
        lines.append(
            f"photos by their score above {summary['threshold']:g}: F1 {level['f1']:.4f}, "
            f"balanced accuracy {level['balanced_accuracy']:.4f}; AUC's 95 % interval {low:.4f} to {high:.4f}"
        )
        found = ", ".join(
            f"{100 * level['found'][rate]:.1f} % at {100 * TARGETS[rate]:g} %" for rate in TARGETS
        )
        lines.append(f"forged photos found at so many false alarms among these untouched ones: {found}")
    for verdict, shares in level["verdicts"].items():
        of = [f"{100 * v:.1f} % of the {name}" for name, v in shares.items() if not math.isnan(v)]
        lines.append(f"verdict {verdict}: {', '.join(of)} photos")
    if "shown" in clean:
        lines.append(f"pixels that predict marks in untouched photos: {100 * clean['shown']:.2f} %")
    return lines
