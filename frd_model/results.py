"""The files that `frd predict` writes for a photo: which kinds there are, and how each is made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from frd_model.predict import Prediction

# What --save takes, and the ending of each file; run lengths and the record itself are in NAME.json.
KINDS = {
    "mask": "_mask.png",
    "overlay": "_overlay.png",
    "map": "_map.png",
    "npz": "_map.npz",
    "contour": "_contour.png",
    "sheet": "_sheet.png",
    "rle": ".json",
    "json": ".json",
}
DEFAULT_KINDS = ("mask", "overlay")
ENDINGS = tuple(dict.fromkeys(KINDS.values()))
# Of images.overlay; the first is the default.
COLOUR_MAPS = ("viridis", "cividis")


@dataclass(frozen=True)
class Job:
    """One photo, and the name of its results without their endings. `path` is "-" for one from standard input."""

    path: Path
    name: str
    standard_input: bool = False


def files_of(out: Path, name: str, endings: tuple[str, ...] = ENDINGS) -> list[Path]:
    """The files of a photo's results in `out`, there or not."""
    return [out / f"{name}{ending}" for ending in endings]


def record_of(file: Path) -> dict[str, Any] | None:
    """The record beside a file that `frd predict` wrote; None for any other file."""
    for ending in ENDINGS:
        if not file.name.endswith(ending):
            continue
        try:
            record = json.loads((file.parent / (file.name.removesuffix(ending) + ".json")).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and {"path", "score", "size", "threshold"} <= record.keys():
            return record
    return None


def save_prediction(
    out: Path,
    job: Job,
    pixels: npt.NDArray[np.uint8],
    result: Prediction,
    checkpoint: str,
    settings: dict[str, Any] | None = None,
    kinds: tuple[str, ...] = DEFAULT_KINDS,
    colour_map: str = COLOUR_MAPS[0],
) -> dict[str, Any]:
    """Write the `kinds` of results of one photo and NAME.json into `out`, each atomically, JSON last.

    A mask that the verdict has emptied leaves the overlay without heat; the probabilities of `map` and `npz` are
    always whole. `settings`, such as the size policy and what is known of the file, are stored in the JSON file.
    Returns its content.
    """
    import numpy as np

    from frd_model.data import images

    height, width = result.size
    raw = int(np.count_nonzero(result.probability > result.threshold))
    marked = int(np.count_nonzero(result.mask))
    record = {
        "name": job.name,
        "path": str(job.path),
        "score": round(result.score, 6),
        **_verdict(result),
        "edited_fraction": round(marked / result.mask.size, 6),
        "raw_edited_fraction": round(raw / result.mask.size, 6),
        "size": {"width": width, "height": height},
        "threshold": result.threshold,
        "checkpoint": checkpoint,
        **(settings or {}),
        "seconds": round(result.seconds, 4),
    }
    files = {kind: out / f"{job.name}{KINDS[kind]}" for kind in kinds}
    emptied = raw > 0 and not marked
    shown = np.broadcast_to(np.float32(0), result.size) if emptied else result.probability
    if "mask" in files:
        images.write_png(files["mask"], result.mask)
    if "overlay" in files:
        heat = images.overlay_bands(pixels, shown, colour_map=colour_map)
        images.write_png_bands(files["overlay"], height, width, 3, heat)
    if "contour" in files:
        images.write_png_bands(files["contour"], height, width, 3, images.contour_bands(pixels, result.mask))
    if "sheet" in files:
        images.write_png(files["sheet"], images.sheet(pixels, shown, result.mask, colour_map))
    if "map" in files:
        images.write_map(files["map"], result.probability)
    if "npz" in files:
        # TruFor's keys, which `frd evaluate --predictions` reads.
        size = np.array(result.size)
        images.write_npz(files["npz"], map=result.probability, score=np.float64(result.score), imgsize=size)
    if "rle" in files:
        record["rle"] = run_lengths(result.mask)
    images.write_json(out / f"{job.name}.json", record)
    return record


def _verdict(result: Prediction) -> dict[str, Any]:
    """What the checkpoint's rule says: nothing without one."""
    if result.rule is None:
        return {}
    return {
        "verdict": result.verdict,
        "false_alarm_rate": result.false_alarm_rate,
        "explanation": result.rule.explain(result.score),
        "statistic": {"name": result.rule.statistic, "value": result.statistic},
        "score_thresholds": result.rule.thresholds,
        "validation": {k: v for k, v in result.rule.validation.items() if k != "statistics"},
    }


def run_lengths(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """A mask [H, W] in COCO's compressed run-length encoding, as `pycocotools.mask.encode` gives it, counts as text."""
    import numpy as np

    # Column by column, from a run of unmarked pixels, which may be empty.
    pixels = np.asarray(mask, bool).ravel(order="F")
    edges = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts = [0, 0] if pixels[0] else [0]
    counts = np.diff(np.concatenate([starts, edges, [pixels.size]]))
    # From the fourth run on, COCO stores the difference to the run two before.
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    # Digits of five bits, lowest first; the sixth bit says that another one follows.
    text = np.zeros((len(rest), 7), np.uint8)
    more = np.ones(len(rest), bool)
    for k in range(text.shape[1]):
        digit, rest = rest & 31, rest >> 5
        follows = np.where(digit & 16, rest != -1, rest != 0)
        text[more, k] = (digit + 32 * follows + 48)[more]
        more &= follows
    return {"size": list(mask.shape), "counts": text[text > 0].tobytes().decode("ascii")}
