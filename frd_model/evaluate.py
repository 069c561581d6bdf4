"""Score maps of forged photos against known masks: metrics per image, their means, and two controls.

The controls are a mask that marks every pixel, and a map that knows only where the image's centre is.

The maps come from a network (`evaluate`) or from files that any method saved (`evaluate_saved`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from torch import nn

from frd_model.centre_control import Curves, score_centre, summarize_centre
from frd_model.evaluate_presets import EVAL_PRESETS, SAVED, SCALED, EvalPreset, eval_preset
from frd_model.labelled import Labelled, Unusable
from frd_model.metrics import (
    THRESHOLDS,
    Confusion,
    aggregate,
    bootstrap_detection,
    bootstrap_means,
    detection_metrics,
    found_at,
    image_score,
    localization,
)
from frd_model.output import one_line
from frd_model.predict import Prediction, check_options, predict
from frd_model.saved_maps import SavedMaps
from frd_model.score import EDITED, NO_TRACE, TARGETS, UNCLEAR
from frd_model.tiling import OVERLAP, TILE

# The pixel metrics that a mean is taken of, and those that are given for the all-white mask too.
PIXEL_METRICS = (
    "f1",
    "permute_f1",
    "auc",
    "iou",
    "ap",
    "mcc",
    "permute_f1_opt",
    "permute_f1_band",
    "permute_f1_opt_band",
)
COLUMNS = PIXEL_METRICS[:4]

FloatMap = npt.NDArray[np.float32]


@dataclass
class Report:
    """Figures of one method on one set.

    Attributes:
        rows: one per image, in order: name, kind, edited (fraction of the pixels), score, seconds, alarm (fraction of
            the pixels above the threshold), and for forged images the metrics of `localization_metrics`, white_*,
            f1, permute_f1, auc and iou of a mask that marks every pixel, and centre_auc of `centre_map`.
        failed: name and error of each image that could not be scored, which no figure counts.
        notes: how many images something was done to that a reader of the means should know.
        curves: sums over the forged images of F1 at each of `metrics.THRESHOLDS`.
        centre: by kind of forgery, sums of the centre control's curves.
    """

    threshold: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    preset: EvalPreset = EVAL_PRESETS["original"]
    notes: Counter[str] = field(default_factory=Counter)
    curves: Curves = field(default_factory=dict)
    centre: dict[str, Curves] = field(default_factory=dict)

    def summary(self, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Every mean, what was skipped, and how it was done.

        "means": of each pixel metric over the forged images: mean, images for which it is defined, and the bootstrap's
        95 % interval "low" and "high". "forged": the means alone, as in "by_kind". "best_threshold": the one
        threshold, in steps of 0.01, at which the mean F1 of the forged images is highest. "centre_control": see
        `summarize_centre`. "authentic": false alarms on untouched photos, one where its score is above the report's
        threshold; with a score rule "shown", the fraction of their pixels that `predict` marks by default.
        "image_level": forged against untouched photos by their scores; "found": the share of the forged ones above the
        score that at most 1, 5 or 10 % of these untouched ones pass; with a rule "verdicts": shares of both.
        "skipped": images by the reason for which a mean leaves them out.
        """
        forged = [r for r in self.rows if r["edited"] > 0]
        clean = [r for r in self.rows if r["edited"] == 0]
        kinds = sorted({r["kind"] for r in forged if r["kind"]})
        level = self._image_level(resamples, seed)
        return {
            "preset": self.preset.to_dict() | {"threshold": self.threshold},
            "threshold": self.threshold,
            "means": self._means_with_intervals(forged, resamples, seed),
            "forged": {"images": len(forged), **_means(forged, "", PIXEL_METRICS)},
            "best_threshold": self._best_thresholds(len(forged)),
            "white_mask": _means(forged, "white_", COLUMNS),
            "centre_control": summarize_centre(forged, self.centre, resamples, seed),
            "by_kind": {
                k: {
                    "images": sum(r["kind"] == k for r in forged),
                    **_means([r for r in forged if r["kind"] == k], "", PIXEL_METRICS),
                }
                for k in kinds
            },
            # how well the scores tell forged from untouched photos, whatever the threshold
            "authentic": self._false_alarms(clean, resamples, seed) | {"score_auc": level["auc"]},
            "image_level": level,
            "skipped": self._skipped(forged, clean),
            "notes": dict(self.notes),
            "bootstrap": {"resamples": resamples, "seed": seed, "level": 0.95},
            "failed": self.failed,
        }

    def _means_with_intervals(
        self, forged: list[dict[str, Any]], resamples: int, seed: int
    ) -> dict[str, dict[str, float]]:
        columns = {c: [float(r.get(c, math.nan)) for r in forged] for c in PIXEL_METRICS}
        intervals = bootstrap_means(columns, resamples, seed)
        return {
            c: {
                "mean": _mean([v for v in values if not math.isnan(v)]),
                "low": intervals[c][0],
                "high": intervals[c][1],
                "images": sum(not math.isnan(v) for v in values),
            }
            for c, values in columns.items()
        }

    def _best_thresholds(self, forged: int) -> dict[str, dict[str, float]]:
        best = {c: int(total.argmax()) for c, total in self.curves.items()}
        return {
            c: {"threshold": float(THRESHOLDS[i]), "mean": float(self.curves[c][i]) / forged}
            for c, i in best.items()
        }

    def _false_alarms(self, clean: list[dict[str, Any]], resamples: int, seed: int) -> dict[str, Any]:
        columns = {
            "pixel_false_alarm": [r["alarm"] for r in clean],
            "photo_false_alarm": [float(r["score"] > self.threshold) for r in clean],
        }
        intervals = bootstrap_means(columns, resamples, seed)
        return {
            "images": len(clean),
            **{c: _mean(values) for c, values in columns.items()},
            **{f"{c}_interval": list(intervals[c]) for c in columns},
            "mean_score": _mean([r["score"] for r in clean]),
            **({"shown": _mean([r["shown"] for r in clean])} if clean and "shown" in clean[0] else {}),
        }

    def _image_level(self, resamples: int, seed: int) -> dict[str, Any]:
        """`detection_metrics` of the photos' scores, with their intervals."""
        scores = np.array([r["score"] for r in self.rows])
        forged = np.array([r["edited"] > 0 for r in self.rows], np.bool_)
        intervals = bootstrap_detection(scores, forged, self.threshold, resamples, seed)
        return {
            "images": len(self.rows),
            **detection_metrics(scores, forged, self.threshold),
            **{f"{name}_interval": list(interval) for name, interval in intervals.items()},
            "found": {name: found_at(scores, forged, rate) for name, rate in TARGETS.items()},
            "verdicts": self._verdicts(),
        }

    def _verdicts(self) -> dict[str, dict[str, float]]:
        """The shares of the forged and of the untouched photos that have each verdict; empty without a score rule."""
        groups = {
            "forged": [r["verdict"] for r in self.rows if "verdict" in r and r["edited"] > 0],
            "untouched": [r["verdict"] for r in self.rows if "verdict" in r and r["edited"] == 0],
        }
        return {
            verdict: {name: _mean([float(v == verdict) for v in given]) for name, given in groups.items()}
            for verdict in (EDITED, UNCLEAR, NO_TRACE)
            if any(groups.values())
        }

    def _skipped(self, forged: list[dict[str, Any]], clean: list[dict[str, Any]]) -> dict[str, int]:
        undefined = {c: sum(math.isnan(r[c]) for r in forged if c in r) for c in PIXEL_METRICS}
        reasons = {
            "untouched photo: no pixel metric": len(clean),
            "every pixel edited: no auc": undefined["auc"],
            "border band leaves no pixel: no permute_f1_opt_band": undefined["permute_f1_opt_band"],
            "border band leaves one class, which is what was marked: no permute_f1_band": undefined[
                "permute_f1_band"
            ],
            "could not be read or scored": len(self.failed),
        }
        return {reason: count for reason, count in reasons.items() if count}


class _Map(NamedTuple):
    """A probability map [H, W], the photo's score if it comes with one, seconds of the network.

    judged: with a score rule, "verdict" and "shown", the fraction of the pixels that `predict` marks by default.
    """

    probability: FloatMap
    score: float | None
    seconds: float
    judged: dict[str, Any] | None = None


def evaluate(
    samples: Iterable[Labelled | Unusable],
    model: nn.Module,
    *,
    preset: str = "original",
    size: str | None = None,
    threshold: float | None = None,
    device: str | None = None,
) -> Report:
    """Predict every sample as the preset has it and compare with its mask.

    Args:
        preset: one of `EVAL_PRESETS`; `original` predicts and scores each photo at its own size, as `predict` does.
        size, threshold: instead of the preset's own; a preset that scores at a size of its own takes no `size`.

    Pixel metrics are not defined on an untouched image: such images count in the false-alarm rates alone. A sample that
    cannot be read or scored (NaN from the network, too large for the memory) goes to `failed` and the others are
    scored. Raises ValueError for bad arguments.
    """
    rules = eval_preset(preset, size=size, threshold=threshold)
    policy = "whole" if rules.size == SCALED else rules.size
    check_options(policy, TILE, OVERLAP, rules.threshold, 1)

    def predicted(sample: Labelled, _: Report) -> _Map:
        image = sample.image
        if rules.scored_at is not None:
            image = _resize(image, (rules.scored_at, rules.scored_at), cv2.INTER_LINEAR)
        result = predict(image, model, size=policy, threshold=rules.threshold, device=device, progress=True)
        return _Map(result.probability, result.score, result.seconds, _judged(result))

    return _evaluate(samples, predicted, rules)


def evaluate_saved(
    samples: Iterable[Labelled | Unusable],
    maps: SavedMaps,
    *,
    preset: str = "original",
    threshold: float | None = None,
) -> Report:
    """`evaluate` with maps from files instead of a network: see `SavedMaps` for their kinds and names.

    A map of another size than the mask's is resized bilinearly and noted. A missing or bad map goes to `failed`.
    """
    rules = replace(eval_preset(preset, threshold=threshold), size=SAVED)
    check_options("whole", TILE, OVERLAP, rules.threshold, 1)

    def saved(sample: Labelled, report: Report) -> _Map:
        start = time.perf_counter()
        height, width = sample.mask.shape
        probability, score = maps.load(sample.name, sample.path, (height, width))
        side = rules.scored_at
        size = (side, side) if side else (height, width)
        if probability.shape != size:
            report.notes["map resized to the size that is scored (bilinear)"] += 1
            probability = _resize(probability, size, cv2.INTER_LINEAR)
        return _Map(probability, score, time.perf_counter() - start)

    return _evaluate(samples, saved, rules)


def _evaluate(
    samples: Iterable[Labelled | Unusable], source: Callable[[Labelled, Report], _Map], rules: EvalPreset
) -> Report:
    report = Report(rules.threshold, preset=rules)
    for sample in samples:
        if isinstance(sample, Unusable):
            report.failed.append({"name": sample.name, "error": sample.error})
            continue
        try:
            _score(sample, source(sample, report), report)
        # Any error of one image must not stop the others.
        except Exception as error:
            report.failed.append({"name": sample.name, "error": one_line(error)})
    return report


def _resize(values: npt.NDArray[Any], size: tuple[int, int], interpolation: int) -> Any:
    """[H, W, ...] at `size` (H, W)."""
    return cv2.resize(values, size[::-1], interpolation=interpolation)


def _judged(result: Prediction) -> dict[str, Any] | None:
    if result.rule is None:
        return None
    marked = np.count_nonzero(result.probability > np.float32(result.rule.pixel_threshold))
    shown = 0.0 if result.verdict == NO_TRACE else float(marked / result.probability.size)
    return {"verdict": result.verdict, "shown": shown}


def _score(sample: Labelled, given: _Map, report: Report) -> None:
    mask, threshold = sample.mask, report.threshold
    probability, score, seconds, judged = given
    if mask.shape != probability.shape:
        small = _resize(mask.astype(np.uint8), probability.shape, cv2.INTER_NEAREST) != 0
        if mask.any() and not small.any():
            raise ValueError(
                f"mask must keep an edited pixel at {small.shape[1]} x {small.shape[0]}, got none"
            )
        mask = small
    row: dict[str, Any] = {
        "name": sample.name,
        "kind": sample.kind,
        "edited": float(mask.mean()),
        "score": image_score(probability) if score is None else score,
        "alarm": float(np.count_nonzero(probability > np.float32(threshold)) / mask.size),
        "seconds": seconds,
        **(judged or {}),
    }
    if mask.any():
        found = localization(probability, mask, threshold)
        row |= found.metrics
        row |= {f"white_{k}": v for k, v in _white_figures(mask).items()}
        row["centre_auc"], centre = score_centre(mask)
        _add_curves(report.curves, found.curves)
        _add_curves(report.centre.setdefault(sample.kind, {}), centre)
        if found.emptied and not math.isnan(row["permute_f1_opt_band"]):
            report.notes["border band leaves nothing edited: 0 in permute_f1_opt_band"] += 1
    report.rows.append(row)


def _add_curves(sums: Curves, curves: Curves) -> None:
    for name, curve in curves.items():
        sums[name] = sums.get(name, 0.0) + curve


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


def _means(rows: list[dict[str, Any]], prefix: str, columns: Sequence[str]) -> dict[str, float]:
    means = aggregate([{c: r.get(prefix + c, math.nan) for c in columns} for r in rows])
    return {c: float(means.get(c, math.nan)) for c in columns}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
