"""Per-image localization metrics over NumPy arrays: F1, permute-F1, AUC, IoU; image scores and false alarms.

A pixel counts as marked when its probability is strictly above the threshold. All counts are exact integers,
so the native module (`frd_kernels._C`) and the NumPy path give identical results.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Pixels that are looked at together where whole-image temporaries would cost too much.
BAND = 1 << 22
# The native AUC holds 4 bytes a pixel; above, the slower form that sorts only the rarer class takes over.
NATIVE_AUC_LIMIT = 1 << 22


def _load_native() -> Any:
    try:
        module = importlib.import_module("frd_kernels._C")
    except ImportError:
        return None
    return module if hasattr(module, "auc_counts") and hasattr(module, "confusion_counts") else None


_native: Any = _load_native()


class Confusion(NamedTuple):
    """Pixel counts of one image."""

    tp: int
    fp: int
    fn: int
    tn: int

    def complement(self) -> Confusion:
        """The counts of the inverted prediction against the same mask."""
        return Confusion(self.fn, self.tn, self.tp, self.fp)

    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); 0 without a true positive, so an untouched photo always scores 0."""
        return 2 * self.tp / (2 * self.tp + self.fp + self.fn) if self.tp else 0.0

    def iou(self) -> float:
        """TP / (TP + FP + FN); 0 without a true positive."""
        return self.tp / (self.tp + self.fp + self.fn) if self.tp else 0.0


def _pair(probability: Array, mask: Array) -> tuple[Array, Array]:
    """Flat contiguous scores (float32 or float64) and mask (uint8, 0 or 1); ValueError for a bad pair."""
    scores, truth = np.asarray(probability), np.asarray(mask)
    if scores.shape != truth.shape:
        raise ValueError(f"mask must have the shape of probability {scores.shape}, got {truth.shape}")
    if scores.size == 0:
        raise ValueError(f"probability must hold at least one pixel, got shape {scores.shape}")
    if scores.dtype != np.float64:
        scores = scores.astype(np.float32, copy=False)
    scores = np.ascontiguousarray(scores).reshape(-1)
    missing = sum(int(np.count_nonzero(np.isnan(scores[band]))) for band in _bands(scores.size))
    if missing:
        raise ValueError(f"probability must not hold NaN, got {missing} of them")
    if truth.dtype != np.bool_:
        if not ((truth == 0) | (truth == 1)).all():
            raise ValueError(f"mask must hold only 0 and 1, got values from {truth.min()} to {truth.max()}")
        truth = truth.astype(np.bool_)
    return scores, np.ascontiguousarray(truth).reshape(-1).view(np.uint8)


def _bands(size: int) -> Iterator[slice]:
    return (slice(start, start + BAND) for start in range(0, size, BAND))


def _counts_numpy(scores: Array, truth: Array, threshold: float) -> tuple[int, int, int, int]:
    marked = scores > scores.dtype.type(threshold)
    positive = truth.view(np.bool_)
    marked_total, positive_total = int(np.count_nonzero(marked)), int(np.count_nonzero(positive))
    marked &= positive
    tp = int(np.count_nonzero(marked))
    return tp, marked_total - tp, positive_total - tp, len(scores) - marked_total - positive_total + tp


def _auc_counts_numpy(scores: Array, truth: Array) -> tuple[int, int, int]:
    """(2 U, positives, negatives), U = pairs where the positive scores higher, ties counting one half."""
    positive = truth.view(np.bool_)
    positives = int(np.count_nonzero(positive))
    negatives = len(truth) - positives
    rarer = positives <= negatives  # the class whose scores are sorted
    ordered = np.sort(scores[positive == rarer])
    # Over the scores of the other class: twice the number of `ordered` below it, and once for each tie.
    twice = 0
    for band in _bands(len(scores)):
        others = np.sort(scores[band][positive[band] != rarer])
        for side in ("left", "right"):
            twice += int(np.searchsorted(ordered, others, side).sum(dtype=np.int64))
    return (2 * positives * negatives - twice if rarer else twice), positives, negatives


def confusion(probability: Array, mask: Array, threshold: float = 0.5) -> Confusion:
    """Counts of one image; probability is a score map or a binary mask, mask holds booleans or 0 and 1."""
    scores, truth = _pair(probability, mask)
    if _native is not None and scores.dtype == np.float32:
        return Confusion(*_native.confusion_counts(scores, truth, float(np.float32(threshold))))
    return Confusion(*_counts_numpy(scores, truth, threshold))


def f1(probability: Array, mask: Array, threshold: float = 0.5) -> float:
    """F1 of one image at a fixed threshold; 0 for an untouched photo (see `Confusion.f1`)."""
    return confusion(probability, mask, threshold).f1()


def permute_f1(probability: Array, mask: Array, threshold: float = 0.5) -> float:
    """max(F1(P, G), F1(1 - P, G)), the inverted prediction taken from the counts."""
    counts = confusion(probability, mask, threshold)
    return max(counts.f1(), counts.complement().f1())


def iou(probability: Array, mask: Array, threshold: float = 0.5) -> float:
    """Intersection over union of one image; 0 when there is no intersection, even where both are empty."""
    return confusion(probability, mask, threshold).iou()


def auc(probability: Array, mask: Array) -> float:
    """Area under the pixel ROC curve with exact ties (Mann-Whitney); NaN for a one-class mask."""
    scores, truth = _pair(probability, mask)
    native = _native is not None and scores.dtype == np.float32 and scores.size <= NATIVE_AUC_LIMIT
    counts = _native.auc_counts(scores, truth) if native else _auc_counts_numpy(scores, truth)
    twice_u, positives, negatives = counts
    return twice_u / (2 * positives * negatives) if positives and negatives else math.nan


def image_metrics(probability: Array, mask: Array, threshold: float = 0.5) -> dict[str, float]:
    """All pixel metrics of one image: "f1", "permute_f1", "iou", "auc" (NaN for a one-class mask)."""
    counts = confusion(probability, mask, threshold)
    return {
        "f1": counts.f1(),
        "permute_f1": max(counts.f1(), counts.complement().f1()),
        "iou": counts.iou(),
        "auc": auc(probability, mask),
    }


def image_score(probability: Array, share: float = 0.01) -> float:
    """One score for a photo: the mean of its highest `share` of pixels (at least one), 1 % by default.

    Less brittle than the maximum, which a single pixel decides, and unlike the mean not diluted by a small
    edit.
    """
    values = np.asarray(probability).ravel(order="K")
    if values.size == 0:
        raise ValueError(f"probability must hold at least one pixel, got shape {np.shape(probability)}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    return float(_highest(values, max(1, round(values.size * share))).mean(dtype=np.float64))


def _highest(values: Array, count: int) -> Array:
    """The `count` highest of flat values, unordered, NaN above all, without a copy of the values."""
    best = values[:0]
    for band in _bands(values.size):
        new = values[band]
        if len(best) == count:
            # not `new > lowest`: NaN must stay
            new = new[~(new <= best.min())]
        best = np.concatenate((best, new))
        if len(best) > count:
            best = np.partition(best, len(best) - count)[-count:]
    return best


def false_alarms(
    probabilities: Iterable[Array],
    threshold: float = 0.5,
    score_threshold: float = 0.5,
    scores: Sequence[float] | None = None,
) -> dict[str, float]:
    """False alarms on untouched photos.

    "pixel_rate": mean over photos of the share of pixels above `threshold`. "photo_rate": share of photos
    whose score (`scores`, or `image_score` of the map) is above `score_threshold`. "photos": how many there
    were. NaN rates for none.
    """
    shares: list[float] = []
    alarms: list[bool] = []
    for index, probability in enumerate(probabilities):
        values = np.asarray(probability)
        score = image_score(values) if scores is None else scores[index]
        shares.append(float(np.count_nonzero(values > threshold)) / values.size)
        alarms.append(score > score_threshold)
    return {
        "pixel_rate": sum(shares) / len(shares) if shares else math.nan,
        "photo_rate": sum(alarms) / len(alarms) if alarms else math.nan,
        "photos": len(shares),
    }


@dataclass
class MetricTable:
    """Rows of per-image metrics and their means; every row must have the same columns."""

    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, name: str, metrics: Mapping[str, float]) -> None:
        if name in self.rows:
            raise ValueError(f"name must be new to the table, got {name!r} twice")
        first = next(iter(self.rows.values()), None)
        if first is not None and first.keys() != metrics.keys():
            raise ValueError(f"metrics must have the columns {list(first)}, got {list(metrics)}")
        self.rows[name] = dict(metrics)

    def summary(self) -> dict[str, float]:
        """See `aggregate`."""
        return aggregate(self.rows.values())


def aggregate(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every column over the images; NaN entries (AUC of a one-class mask) are skipped and counted.

    Beside the means: "images", the number of rows, and "COLUMN_skipped" for each column that holds a NaN. A
    column of NaN only has a NaN mean.
    """
    table = [dict(row) for row in rows]
    result: dict[str, float] = {"images": len(table)}
    for column in table[0] if table else ():
        values = [row[column] for row in table if not math.isnan(row[column])]
        result[column] = math.fsum(values) / len(values) if values else math.nan
        if len(values) < len(table):
            result[f"{column}_skipped"] = len(table) - len(values)
    return result
