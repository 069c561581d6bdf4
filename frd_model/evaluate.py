"""Score maps of forged photos against known masks: metrics per image, their means, and two controls.

The controls are a mask that marks every pixel, and a map that knows only where the image's centre is.

The maps come from a network (`evaluate`) or from files that any method saved (`evaluate_saved`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from torch import nn

from frd_model.centre_control import Curves, score_centre, summarize_centre
from frd_model.data.dataset import PairDataset
from frd_model.data.files import PathLike, describe_skipped, name_bytes
from frd_model.data.forge import Forger
from frd_model.data.forge_options import KINDS
from frd_model.data.forged_folder import kind_of
from frd_model.data.images import write_bytes
from frd_model.data.photos import sample_files, sample_photos
from frd_model.evaluate_presets import EVAL_PRESETS, SAVED, SCALED, EvalPreset, eval_preset
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


@dataclass(frozen=True)
class Labelled:
    """image uint8 RGB [H, W, 3], mask bool [H, W] (all False: untouched).

    kind: of forgery, "authentic", or "" if not known. path: the photo's file, or None where it was made.
    """

    name: str
    kind: str
    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    path: Path | None = None


@dataclass(frozen=True)
class Unusable:
    """A pair that cannot be scored, and the one line that says why."""

    name: str
    error: str


@dataclass(frozen=True)
class Source:
    """Samples made or read one at a time, how many there are, and a line that says what they are.

    skipped: one line on what the folders hold beside images, inverted: one on masks that look inverted; "" for nothing.
    files: a hash of the names and sizes of the files; "" for images generated from the packaged photos.
    """

    samples: Iterator[Labelled | Unusable]
    length: int
    label: str
    skipped: str = ""
    inverted: str = ""
    files: str = ""


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
    lines.append(f"{'':<16} {'images':>6} " + " ".join(f"{c:>10}" for c in COLUMNS))
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
    lines += _image_lines(summary)
    lines += [f"skipped: {count} x {reason}" for reason, count in summary["skipped"].items()]
    lines += [f"note: {count} x {note}" for note, count in summary["notes"].items()]
    return "\n".join(lines)


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
        low, high = level["auc_interval"]
        lines.append(
            f"untouched photos: {clean['images']}; pixels falsely marked {100 * clean['pixel_false_alarm']:.2f} %, "
            f"photos with a score above {summary['threshold']:g}: {100 * clean['photo_false_alarm']:.1f} %, "
            f"AUC of the score: {clean['score_auc']:.4f}"
        )
        lines.append(
            f"photos by their score above {summary['threshold']:g}: F1 {level['f1']:.4f}, "
            f"balanced accuracy {level['balanced_accuracy']:.4f}; AUC's 95 % interval {low:.4f} to {high:.4f}"
        )
        found = ", ".join(
            f"{100 * level['found'][rate]:.1f} % at {100 * TARGETS[rate]:g} %" for rate in TARGETS
        )
        lines.append(f"forged photos found at so many false alarms among these untouched ones: {found}")
    for verdict, shares in level["verdicts"].items():
        lines.append(
            f"verdict {verdict}: {100 * shares['forged']:.1f} % of the forged, "
            f"{100 * shares['untouched']:.1f} % of the untouched photos"
        )
    if "shown" in clean:
        lines.append(f"pixels that predict marks in untouched photos: {100 * clean['shown']:.2f} %")
    return lines


def _means(rows: list[dict[str, Any]], prefix: str, columns: Sequence[str]) -> dict[str, float]:
    means = aggregate([{c: r.get(prefix + c, math.nan) for c in columns} for r in rows])
    return {c: float(means.get(c, math.nan)) for c in columns}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def forged_samples(split: str, repeats: int, seed: int, folder: PathLike | None = None) -> Source:
    """`repeats` forgeries of each kind and as many untouched versions of every photo of a split, at full size.

    folder: of the photos, see :func:`frd_model.data.sample_photos`.
    """
    photos = sample_photos(split, folder)
    length = len(photos) * repeats * (len(KINDS) + 1)
    names = ("" if folder is None else f"of {os.fspath(folder)} ") + f"({', '.join(photos)})"
    label = f"sample photos {split} {names}, {repeats} forgeries of each kind per photo, seed {seed}"
    found = sample_files(split, folder)
    files = "" if folder is None else _hash(f"{file.name}\0{_size(file)}" for file in found.images)
    return Source(_forge(photos, repeats, seed), length, label, describe_skipped(found.skipped), files=files)


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
    notes = describe_skipped(data.skipped), data.inverted_masks()
    return Source(_read(data), len(data), str(label), *notes, _digest(data))


def _digest(data: PairDataset) -> str:
    return _hash(
        f"{name}\0{_size(pair.image)}\0{_size(pair.mask)}"
        for name, pair in zip(data.names, data.pairs, strict=True)
    )


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256(name_bytes("\n".join(lines))).hexdigest()[:12]


def _size(file: Path | None) -> int | None:
    try:
        return None if file is None else file.stat().st_size
    except (OSError, ValueError):
        return None


def _read(data: PairDataset) -> Iterator[Labelled | Unusable]:
    for index, name in enumerate(data.names):
        try:
            image, mask = data.load(index)
        # A damaged or missing file, or one too large for the memory.
        except Exception as error:
            yield Unusable(name, one_line(error))
            continue
        yield Labelled(name, kind_of(name), image, mask, data.pairs[index].image)
