"""Score a network on images with known masks: per-image figures, their means, and an all-white mask beside them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from frd_model.data.dataset import PairDataset
from frd_model.data.files import describe_skipped
from frd_model.data.forge import Forger
from frd_model.data.forge_options import KINDS
from frd_model.data.images import write_bytes
from frd_model.data.photos import sample_photos
from frd_model.metrics import Confusion, aggregate, auc, image_metrics
from frd_model.output import one_line
from frd_model.predict import check_options, predict
from frd_model.tiling import OVERLAP, TILE

COLUMNS = ("f1", "permute_f1", "auc", "iou")


@dataclass(frozen=True)
class Labelled:
    """image uint8 RGB [H, W, 3], mask bool [H, W] (all False: untouched); kind of forgery, or "" if not known."""

    name: str
    kind: str
    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Unusable:
    """A pair that cannot be scored, and the one line that says why."""

    name: str
    error: str


@dataclass(frozen=True)
class Source:
    """Samples made or read one at a time, how many there are, and a line that says what they are.

    skipped: one line on what the folders hold beside images, inverted: one on masks that look inverted; "" for nothing.
    """

    samples: Iterator[Labelled | Unusable]
    length: int
    label: str
    skipped: str = ""
    inverted: str = ""


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
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    # File names may hold bytes that are no text, which come out as they went in, and lists what no name can hold.
    legible = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text.getvalue())
    write_bytes(path, legible.encode(errors="surrogateescape"))


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


def _means(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    means = aggregate([{c: r[prefix + c] for c in COLUMNS} for r in rows])
    return {c: float(means.get(c, math.nan)) for c in COLUMNS}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def forged_samples(split: str, repeats: int, seed: int) -> Source:
    """`repeats` forgeries of each kind and as many untouched versions of every photo of a split, at full size."""
    photos = sample_photos(split)
    length = len(photos) * repeats * (len(KINDS) + 1)
    label = f"sample photos {split} ({', '.join(photos)}), {repeats} forgeries of each kind per photo, seed {seed}"
    return Source(_forge(photos, repeats, seed), length, label)


def _forge(photos: dict[str, npt.NDArray[np.uint8]], repeats: int, seed: int) -> Iterator[Labelled]:
    names = sorted(photos)
    for number, name in enumerate(names):
        for repeat in range(repeats):
            for which, kind in enumerate((*KINDS, "authentic")):
                rng = np.random.default_rng([seed, number, repeat, which])
                forger = Forger(rng)
                if kind == "authentic":
                    made = forger.authentic(photos[name])
                else:
                    others = [n for n in names if n != name] or names
                    made = forger.forge(photos[name], photos[others[int(rng.integers(len(others)))]], kind)
                yield Labelled(f"{name}-{kind}-{repeat}", kind, made.image, made.mask)


def labelled_pairs(data: PairDataset, label: str) -> Source:
    return Source(_read(data), len(data), str(label), describe_skipped(data.skipped), data.inverted_masks())


def _read(data: PairDataset) -> Iterator[Labelled | Unusable]:
    for index, name in enumerate(data.names):
        try:
            image, mask = data.load(index)
        except Exception as error:  # a damaged or vanished file, or one too large for the memory
            yield Unusable(name, one_line(error))
            continue
        yield Labelled(name, "", image, mask)
