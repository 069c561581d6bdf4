"""Localization metrics over NumPy arrays, image scores, false alarms, and means with bootstrap intervals.

Per image: F1, permute-F1, IoU and MCC at a threshold; AUC and AP over all of them, ties exact; F1 at the best
threshold. A pixel counts as marked when its probability is strictly above the threshold. All counts are exact
integers, so the native module (`frd_kernels._C`) and the NumPy path give identical results.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Pixels that are looked at together where whole-image temporaries would cost too much.
BAND = 1 << 22
# The native AUC holds 4 bytes a pixel; above, the slower form that sorts only the rarer class takes over.
NATIVE_AUC_LIMIT = 1 << 22

# Where the one best threshold of a set is looked for: steps of 0.01.
THRESHOLDS = np.linspace(0.0, 1.0, 101)


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

    def mcc(self) -> float:
        """Matthews' correlation in [-1, 1]; 0 where the mask or the prediction is of one class."""
        tp, fp, fn, tn = self
        square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        return (tp * tn - fp * fn) / math.sqrt(square) if square else 0.0

    def balanced_accuracy(self) -> float:
        """Mean of the two classes' recall; NaN where the truth is of one class."""
        positives, negatives = self.tp + self.fn, self.tn + self.fp
        return (self.tp / positives + self.tn / negatives) / 2 if positives and negatives else math.nan


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
    missing = sum(int(np.count_nonzero(np.isnan(scores[band]))) for band in pixel_bands(scores.size))
    if missing:
        raise ValueError(f"probability must not hold NaN, got {missing} of them")
    if truth.dtype != np.bool_:
        if not ((truth == 0) | (truth == 1)).all():
            raise ValueError(f"mask must hold only 0 and 1, got values from {truth.min()} to {truth.max()}")
        truth = truth.astype(np.bool_)
    return scores, np.ascontiguousarray(truth).reshape(-1).view(np.uint8)


def pixel_bands(size: int) -> Iterator[slice]:
    """Slices over `size` flat pixels, of BAND each."""
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
    for band in pixel_bands(len(scores)):
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


class _Ranks(NamedTuple):
    """Distinct scores of the edited pixels, ascending, and for each how many pixels lie where, all [D].

    up_to, ties: edited pixels at or below it, and of that score. negatives_below, negatives_up_to: untouched pixels.
    negatives_above: untouched pixels above each of `THRESHOLDS`. negatives: all untouched pixels.
    """

    scores: Array
    ties: Array
    up_to: Array
    negatives_below: Array
    negatives_up_to: Array
    negatives_above: Array
    negatives: int


def _rank(scores: Array, truth: Array) -> _Ranks:
    """A sort of the edited pixels and of the others in bands; no order of the whole image."""
    positive = truth.view(np.bool_)
    grid = THRESHOLDS.astype(scores.dtype)
    values, ties = np.unique(scores[positive], return_counts=True)
    below, up_to = np.zeros((2, len(values)), np.int64)
    above, negatives = np.zeros(len(grid), np.int64), 0
    for band in pixel_bands(len(scores)):
        others = np.sort(scores[band][~positive[band]])
        below += np.searchsorted(others, values, "left")
        up_to += np.searchsorted(others, values, "right")
        above += len(others) - np.searchsorted(others, grid, "right")
        negatives += len(others)
    return _Ranks(values, ties, np.cumsum(ties), below, up_to, above, negatives)


def average_precision(probability: Array, mask: Array) -> float:
    """Area under the precision-recall curve as a sum of steps, equal scores as one step; NaN without an edited pixel.

    Not interpolated: the definition of scikit-learn's and torchmetrics' average precision.
    """
    return _average_precision(_rank(*_pair(probability, mask)))


def _average_precision(ranks: _Ranks) -> float:
    if not len(ranks.scores):
        return math.nan
    found = ranks.up_to[-1] - ranks.up_to + ranks.ties
    precision = found / (found + (ranks.negatives - ranks.negatives_below))
    return float((ranks.ties * precision).sum() / found[0])


def _auc(ranks: _Ranks) -> float:
    if not len(ranks.scores) or not ranks.negatives:
        return math.nan
    # an edited pixel wins against each untouched one below it, and half against its equals
    twice_u = int((ranks.ties * (ranks.negatives_below + ranks.negatives_up_to)).sum())
    return twice_u / (2 * int(ranks.up_to[-1]) * ranks.negatives)


class Optimum(NamedTuple):
    """The best F1 of one image, reached by `probability > threshold`, turned round where `inverted`."""

    f1: float
    threshold: float
    inverted: bool


def optimal_f1(probability: Array, mask: Array, permute: bool = True) -> Optimum:
    """The highest F1 over all distinct scores and, with `permute`, over the prediction and its inversion.

    Exact: pixels of equal score are marked together. Without an edited pixel F1 is 0 and the threshold NaN.
    """
    return _optimum(_rank(*_pair(probability, mask)), permute)


def _optimum(ranks: _Ranks, permute: bool) -> Optimum:
    # The best cut lies at an edited pixel's score: one that only untouched pixels pass lowers the F1.
    if not len(ranks.scores):
        return Optimum(0.0, math.nan, False)
    positives = int(ranks.up_to[-1])
    found = positives - ranks.up_to + ranks.ties
    direct = _f1_of(found, ranks.negatives - ranks.negatives_below, positives)
    best = int(direct.argmax())
    threshold = float(np.nextafter(ranks.scores[best], -np.inf, dtype=ranks.scores.dtype))
    optimum = Optimum(float(direct[best]), threshold, False)
    if permute:
        turned = _f1_of(ranks.up_to, ranks.negatives_up_to, positives)
        best = int(turned.argmax())
        if turned[best] > optimum.f1:
            optimum = Optimum(float(turned[best]), float(ranks.scores[best]), True)
    return optimum


def f1_curve(probability: Array, mask: Array, permute: bool = True) -> Array:
    """F1 (with `permute` permute-F1) of one image at each of `THRESHOLDS`: float64 [101]."""
    return _f1_curve(_rank(*_pair(probability, mask)), permute)


def _f1_curve(ranks: _Ranks, permute: bool) -> Array:
    if not len(ranks.scores):
        return np.zeros(len(THRESHOLDS))
    up_to = np.r_[0, ranks.up_to]
    passed = np.searchsorted(ranks.scores, THRESHOLDS.astype(ranks.scores.dtype), "right")
    positives = int(up_to[-1])
    found, fp = positives - up_to[passed], ranks.negatives_above
    direct = _f1_of(found, fp, positives)
    return np.maximum(direct, _f1_of(up_to[passed], ranks.negatives - fp, positives)) if permute else direct


def _f1_of(tp: Array, fp: Array, positives: int) -> Array:
    return 2 * tp / (tp + fp + positives)


def auc_and_curves(probability: Array, mask: Array) -> tuple[float, dict[str, Array]]:
    """AUC, and "f1" and "permute_f1" at each of `THRESHOLDS`, from one sort of the image's pixels."""
    return _auc_and_curves(_rank(*_pair(probability, mask)))


def _auc_and_curves(ranks: _Ranks) -> tuple[float, dict[str, Array]]:
    curves = {"f1": _f1_curve(ranks, permute=False), "permute_f1": _f1_curve(ranks, permute=True)}
    return _auc(ranks), curves


def border_band(mask: Array) -> tuple[Array, Array]:
    """TruFor's ground truth without the border: (edited, scored), both bool [H, W].

    edited: a 15 x 15 minimum filter of the mask. scored: edited, or untouched by the complement of its 11 x 11
    maximum filter; the band between the two is not scored. A region thinner than 15 pixels leaves nothing edited.
    """
    truth = np.asarray(mask, np.uint8)
    if truth.ndim != 2:
        raise ValueError(f"mask must be [H, W], got shape {truth.shape}")
    # OpenCV's default border takes no part in a minimum or maximum, which is what mirroring (SciPy's) comes to.
    edited = cv2.erode(truth, np.ones((15, 15), np.uint8)) != 0
    return edited, edited | (cv2.dilate(truth, np.ones((11, 11), np.uint8)) == 0)


class Localization(NamedTuple):
    """Of one image: `localization_metrics`, and "f1", "permute_f1" and "permute_f1_band" at each of `THRESHOLDS`.

    emptied: whether the border band leaves nothing edited.
    """

    metrics: dict[str, float]
    curves: dict[str, Array]
    emptied: bool


def localization_metrics(probability: Array, mask: Array, threshold: float = 0.5) -> dict[str, float]:
    """Every metric of one image [H, W], those of `image_metrics` among them.

    "ap", "mcc"; "permute_f1_opt" at the image's best "threshold_opt"; and with TruFor's border band left out
    "permute_f1_band" at `threshold` and "permute_f1_opt_band" at "threshold_opt_band". These are what TruFor's code
    gives: where the band leaves nothing edited 0, and at `threshold` NaN if nothing is marked either (or everything is
    edited and marked); both NaN where it leaves no pixel to score.
    """
    return localization(probability, mask, threshold).metrics


def localization(probability: Array, mask: Array, threshold: float = 0.5) -> Localization:
    """`localization_metrics` and the curves of an image, from one sort of its pixels with the band and one without."""
    edited, scored = border_band(mask)
    scores, truth = _pair(probability, mask)
    ranks = _rank(scores, truth)
    best = _optimum(ranks, permute=True)
    area, curves = _auc_and_curves(ranks)
    counts = confusion(scores, truth, threshold)
    metrics = {
        "f1": counts.f1(),
        "permute_f1": max(counts.f1(), counts.complement().f1()),
        "iou": counts.iou(),
        "auc": area,
        "ap": _average_precision(ranks),
        "mcc": counts.mcc(),
        "permute_f1_opt": best.f1,
        "threshold_opt": best.threshold,
    }
    del ranks
    scored = scored.reshape(-1)
    inner, inner_truth = scores[scored], edited.reshape(-1)[scored].view(np.uint8)
    ranks = _rank(inner, inner_truth)
    best = _optimum(ranks, permute=True)
    metrics |= {
        "permute_f1_band": _fixed_f1_of_band(inner, inner_truth, threshold),
        "permute_f1_opt_band": best.f1 if len(inner) else math.nan,
        "threshold_opt_band": best.threshold,
    }
    curves["permute_f1_band"] = _f1_curve(ranks, permute=True)
    return Localization(metrics, curves, not len(ranks.scores))


def _fixed_f1_of_band(scores: Array, truth: Array, threshold: float) -> float:
    """Permute-F1; NaN where truth and prediction together are of one class, as TruFor's code has it, or no pixel is."""
    if not len(scores):
        return math.nan
    counts = confusion(scores, truth, threshold)
    if len(scores) in (counts.tn, counts.tp):
        return math.nan
    return max(counts.f1(), counts.complement().f1())


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
    for band in pixel_bands(values.size):
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
    score_threshold: float | None = None,
    scores: Sequence[float] | None = None,
) -> dict[str, float]:
    """False alarms on untouched photos.

    "pixel_rate": mean over photos of the share of pixels above `threshold`. "photo_rate": share of photos
    whose score (`scores`, or `image_score` of the map) is above `score_threshold`, by default `threshold` too.
    "photos": how many there were. NaN rates for none.
    """
    limit = threshold if score_threshold is None else score_threshold
    shares: list[float] = []
    alarms: list[bool] = []
    for index, probability in enumerate(probabilities):
        values = np.asarray(probability)
        score = image_score(values) if scores is None else scores[index]
        shares.append(float(np.count_nonzero(values > threshold)) / values.size)
        alarms.append(score > limit)
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


def bootstrap_means(
    columns: Mapping[str, Sequence[float] | Array],
    resamples: int = 1000,
    seed: int = 0,
    *,
    clusters: Sequence[str] | None = None,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap 95 % intervals (low, high) of the columns' means.

    Images are resampled, one draw for all columns; with `clusters`, the label of each image's group, whole groups are
    drawn. NaN entries are left out of a mean. A column without a figure, or `resamples` of 0, gives NaN. The same seed
    gives the same intervals.
    """
    values = np.array([list(column) for column in columns.values()], np.float64)
    if not values.size or resamples < 1:
        return dict.fromkeys(columns, (math.nan, math.nan))
    defined = ~np.isnan(values)
    filled = np.where(defined, values, 0.0).T
    with np.errstate(invalid="ignore"):
        means = [
            (w @ filled) / (w @ defined.T) for w in _resampled(values.shape[1], resamples, seed, clusters)
        ]
    return _intervals(columns, np.concatenate(means).T)


def detection_metrics(scores: Array, forged: Array, threshold: float = 0.5) -> dict[str, float]:
    """Photos [N] as forged or not by their scores: "f1", "balanced_accuracy" and "auc", NaN where not defined."""
    marked = np.asarray(scores) > threshold
    forged = np.asarray(forged, np.bool_)
    parts = (marked & forged, marked & ~forged, ~marked & forged, ~marked & ~forged)
    counts = Confusion(*(int(np.count_nonzero(part)) for part in parts))
    return {
        "f1": counts.f1() if counts.tp + counts.fn else math.nan,
        "balanced_accuracy": counts.balanced_accuracy(),
        "auc": auc(np.asarray(scores), forged) if len(forged) else math.nan,
    }


def found_at(scores: Array, forged: Array, rate: float) -> float:
    """The share of the forged photos above the `alarm_threshold` of the untouched ones; NaN without either."""
    scores, forged = np.asarray(scores), np.asarray(forged, np.bool_)
    if not forged.any() or forged.all():
        return math.nan
    return float((scores[forged] > alarm_threshold(scores[~forged], rate)).mean())


def alarm_threshold(untouched: Array, rate: float) -> float:
    """The smallest value that at most a fraction `rate` of the scores of untouched photos [N] lie above, rate < 1."""
    return float(np.sort(untouched)[::-1][allowed_alarms(len(untouched), rate)])


def allowed_alarms(photos: int, rate: float) -> int:
    """How many of so many photos `rate` allows: 0.1 of 30 are 3, whatever the product's rounding."""
    return math.floor(photos * rate + 1e-9)


def bootstrap_detection(
    scores: Array,
    forged: Array,
    threshold: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
    *,
    clusters: Sequence[str] | None = None,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap 95 % intervals of `detection_metrics`; draws in which one is not defined are left out.

    `clusters`: as in `bootstrap_means`.
    """
    names = ("f1", "balanced_accuracy", "auc")
    scores, forged = np.asarray(scores, np.float64), np.asarray(forged, np.bool_)
    if not len(scores) or resamples < 1:
        return dict.fromkeys(names, (math.nan, math.nan))
    order = np.argsort(scores, kind="stable")
    scores, forged = scores[order], forged[order]
    clusters = None if clusters is None else [clusters[i] for i in order]
    groups = np.flatnonzero(np.r_[True, scores[1:] > scores[:-1]])
    marked = scores > threshold
    drawn = []
    for weights in _resampled(len(scores), resamples, seed, clusters):
        positives, negatives = weights * forged, weights * ~forged
        p, n = positives.sum(axis=1), negatives.sum(axis=1)
        tp, fp = positives @ marked, negatives @ marked
        tied = np.add.reduceat(negatives, groups, axis=1)
        below = np.cumsum(tied, axis=1) - tied / 2
        with np.errstate(invalid="ignore"):
            drawn.append(
                np.stack(
                    (
                        np.where(p > 0, 2 * tp / (tp + fp + p), math.nan),
                        (tp / p + (n - fp) / n) / 2,
                        (np.add.reduceat(positives, groups, axis=1) * below).sum(axis=1) / (p * n),
                    )
                )
            )
    return _intervals(names, np.concatenate(drawn, axis=1))


def _resampled(
    images: int, resamples: int, seed: int, clusters: Sequence[str] | None = None
) -> Iterator[Array]:
    """How often each image is in each draw of images, or of whole clusters: float64 [draws, images], in parts."""
    names, group = (range(images), None) if clusters is None else np.unique(clusters, return_inverse=True)
    units = len(names)
    rng = np.random.default_rng(seed)
    step = max(1, BAND // images)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(units, size=(rows, units)) + np.arange(rows)[:, None] * units
        counts = np.bincount(drawn.reshape(-1), minlength=rows * units)
        weights = counts.reshape(rows, units).astype(np.float64)
        yield weights if group is None else weights[:, group]


def _intervals(names: Iterable[str], draws: Array) -> dict[str, tuple[float, float]]:
    """The 2.5th and 97.5th percentile of each row of draws, NaN left out."""
    intervals = {}
    for name, row in zip(names, draws, strict=True):
        defined = row[~np.isnan(row)]
        low, high = np.quantile(defined, (0.025, 0.975)) if defined.size else (math.nan, math.nan)
        intervals[name] = (float(low), float(high))
    return intervals
