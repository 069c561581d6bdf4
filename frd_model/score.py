"""One score for a photo: the rule that makes a score and a verdict of a statistic of its map.

`fit_rule` makes the rule from the statistics of photos that are known to be forged or untouched (`frd calibrate`). It
is stored in the checkpoint; `load_model` puts it on the network as `score_rule`, and `predict` uses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from frd_model.map_statistics import HEAD, STATISTICS
from frd_model.metrics import (
    alarm_threshold,
    allowed_alarms,
    auc,
    bootstrap_detection,
    bootstrap_means,
    found_at,
    pixel_bands,
)

__all__ = [
    "EDITED",
    "NO_TRACE",
    "PIXEL_THRESHOLDS",
    "TARGETS",
    "UNCLEAR",
    "ScoreRule",
    "Verdict",
    "choose_pixel_threshold",
    "fit_rule",
    "pixel_curve",
]

Floats = npt.NDArray[np.float64]

EDITED, UNCLEAR, NO_TRACE = "edited", "unclear", "no trace found"
# The false-alarm rates that a rule has thresholds for, by their names in a checkpoint.
TARGETS = {"0.01": 0.01, "0.05": 0.05, "0.10": 0.10}
# Where the pixel threshold is looked for; the last one marks nothing.
PIXEL_THRESHOLDS = np.concatenate(
    [np.arange(1, 98) / 100, np.arange(980, 1000) / 1000, np.arange(9991, 10001) / 10000]
)
# The share of the pixels of untouched photos that the pixel threshold may mark.
PIXEL_ALARMS = 0.01


class Verdict(NamedTuple):
    """text: EDITED, UNCLEAR or NO_TRACE. false_alarm_rate: that of the threshold which decided, see `ScoreRule`."""

    text: str
    false_alarm_rate: float


@dataclass(frozen=True)
class ScoreRule:
    """How a score and a verdict are made of a statistic of the map.

    The score is sigmoid(scale * statistic + offset): the probability that the photo is forged, if it comes from a set
    with as many forged as untouched photos that are like those of the validation.

    Attributes:
        statistic: a key of `STATISTICS`, or "head".
        scale: of the statistic, at least 0.
        offset: see above.
        pixel_threshold: the probability above which a pixel counts as edited, unless another one is asked for.
        thresholds: of the score, by the rate of false alarms "0.01", "0.05", "0.10": at most so large a share of the
            untouched calibration photos scores above it.
        validation: figures of the photos that the rule was made from, see `fit_rule`.
    """

    statistic: str
    scale: float
    offset: float
    pixel_threshold: float
    thresholds: dict[str, float]
    validation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rule(self)

    def score(self, value: float) -> float:
        """The score, in [0, 1], of a value of the statistic."""
        return _sigmoid(self.scale * value + self.offset)

    def judge(self, score: float) -> Verdict:
        """The verdict on a score, and the false-alarm rate of the threshold that decided.

        "edited": above the threshold of 0.01. "unclear": above that of 0.05 or 0.10, whichever is given as the rate.
        "no trace found": not above that of 0.10, which is given; 90 % of the untouched calibration photos score as low.
        """
        passed = next((rate for rate in TARGETS if score > self.thresholds[rate]), None)
        if passed is None:
            return Verdict(NO_TRACE, TARGETS["0.10"])
        return Verdict(EDITED if passed == "0.01" else UNCLEAR, TARGETS[passed])

    def explain(self, score: float) -> str:
        """The verdict in words, with how often it was wrong on the validation photos."""
        verdict, rate = self.judge(score)
        return f"{verdict} (score {score:.2f}; {self._experience(verdict, rate)})"

    def _experience(self, verdict: str, rate: float) -> str:
        if verdict != NO_TRACE:
            untouched = self.validation.get("untouched")
            if untouched is not None and not allowed_alarms(untouched, rate):
                return f"none of the {untouched} untouched calibration photos scores as high"
            return f"1 in {round(1 / rate)} untouched calibration photos scores as high"
        as_low = 1.0 - self.validation.get("false_alarms", {}).get("0.10", rate)
        found = self.validation.get("found", {}).get("0.10")
        edited = "" if found is None else f" and {round(100 * (1 - found))} in 100 edited"
        return f"{round(100 * as_low)} in 100 untouched{edited} calibration photos score as low"

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScoreRule:
        """The rule that `to_dict` gave. ValueError for a value that is missing, unknown or out of its range."""
        names = {entry.name for entry in fields(cls)}
        missing, unknown = names - values.keys() - {"validation"}, values.keys() - names
        if missing or unknown:
            wrong = f"missing {sorted(missing)}" if missing else f"unknown {sorted(unknown)}"
            raise ValueError(f"score rule: must have the fields {', '.join(sorted(names))}, got {wrong}")
        return cls(**values)


def _check_rule(rule: ScoreRule) -> None:
    if rule.statistic not in (*STATISTICS, HEAD):
        raise ValueError(f"statistic must be one of {', '.join((*STATISTICS, HEAD))}, got {rule.statistic!r}")
    if not isinstance(rule.thresholds, Mapping) or rule.thresholds.keys() != TARGETS.keys():
        raise ValueError(
            f"thresholds must be a mapping with the keys {list(TARGETS)}, got {rule.thresholds!r}"
        )
    if not isinstance(rule.validation, Mapping):
        raise ValueError(f"validation must be a mapping, got {rule.validation!r}")
    thresholds = [rule.thresholds[rate] for rate in TARGETS]
    numbers = [rule.scale, rule.offset, rule.pixel_threshold, *thresholds]
    if not all(_is_number(value) and math.isfinite(value) for value in numbers):
        raise ValueError(f"scale, offset and thresholds must be finite numbers, got {numbers}")
    if rule.scale < 0:
        raise ValueError(f"scale must be at least 0, got {rule.scale}")
    if not 0 <= rule.pixel_threshold <= 1:
        raise ValueError(f"pixel_threshold must lie in [0, 1], got {rule.pixel_threshold}")
    if not 1 >= thresholds[0] >= thresholds[1] >= thresholds[2] >= 0:
        raise ValueError(f"thresholds must lie in [0, 1] and fall as the rate rises, got {rule.thresholds}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def fit_rule(
    statistics: Mapping[str, Sequence[float]],
    forged: npt.ArrayLike,
    *,
    name: str = "auto",
    hosts: Sequence[str] | None = None,
    pixel_threshold: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
) -> ScoreRule:
    """The rule that tells forged from untouched photos, from N photos of which that is known.

    scale and offset: Platt's, logistic regression on one statistic with his targets (N+ + 1) / (N+ + 2) and
    1 / (N- + 2), so that they are finite where the classes do not overlap. Both classes have the same weight, however
    many photos they have, and a statistic that ranks forged photos below untouched ones gets the scale 0.

    A threshold is the smallest value that at most the given share of the untouched photos scores above; photos of
    equal score are above it together or not at all. With fewer than 100 untouched photos the threshold for 1 % is the
    highest of their scores, so that none is above it; with fewer than 20 (10) that for 5 % (10 %) too. The rate on
    other photos is then known no better than so few photos allow.

    Args:
        statistics: values [N] of each statistic, as `measure` gives them for a photo.
        forged: bool [N].
        name: the statistic to use; "auto" takes the one of the highest AUC on these photos, the first of several.
            Chosen and judged on the same photos, the best of many is a little optimistic.
        hosts: [N], the photo that each image was made from. Images of one host are drawn together by the bootstrap.
        pixel_threshold: see `choose_pixel_threshold`.
        resamples, seed: of the bootstrap, for 95 % intervals. The rule itself is not fitted anew in its draws.

    Returns:
        The rule, with `validation`: photos, untouched, forged, hosts (how many; None: not known), auc, auc_interval; by
        rate found and false_alarms, the shares of the forged and untouched photos above each threshold, and their
        found_interval and false_alarms_interval; false_alarms_left_out: the same share of untouched photos where the
        threshold comes from those of the other hosts, which tells more of new photos (None for fewer than two hosts);
        statistics: auc, auc_interval and found_0.05 of every one.

    Raises:
        ValueError: photos of one class only, lengths that differ, a value that is not finite, an unknown name.
    """
    values, truth = _check_values(statistics, forged, hosts)
    if name != "auto" and name not in values:
        raise ValueError(f"statistic must be auto or one of {', '.join(values)}, got {name!r}")
    table = {key: _figures(column, truth, hosts, resamples, seed) for key, column in values.items()}
    chosen = max(table, key=lambda key: table[key]["auc"]) if name == "auto" else name
    scale, offset = _platt(values[chosen], truth)
    # One by one, as `ScoreRule.score` computes them, so that ties stay ties.
    scores = np.array([_sigmoid(scale * value + offset) for value in values[chosen].tolist()])
    thresholds = {rate: alarm_threshold(scores[~truth], target) for rate, target in TARGETS.items()}
    validation = {
        "photos": len(truth),
        "untouched": int((~truth).sum()),
        "forged": int(truth.sum()),
        "hosts": None if hosts is None else len(set(hosts)),
        "auc": table[chosen]["auc"],
        "auc_interval": table[chosen]["auc_interval"],
        **_shares_above(scores, truth, thresholds, hosts, resamples, seed),
        "false_alarms_left_out": None
        if hosts is None
        else _left_out(scores[~truth], np.array(hosts)[~truth]),
        "statistics": table,
    }
    return ScoreRule(chosen, scale, offset, pixel_threshold, thresholds, validation)


def _check_values(
    statistics: Mapping[str, Sequence[float]], forged: npt.ArrayLike, hosts: Sequence[str] | None
) -> tuple[dict[str, Floats], npt.NDArray[np.bool_]]:
    truth = np.asarray(forged)
    if truth.ndim != 1 or truth.dtype != np.bool_:
        raise ValueError(f"forged must be booleans [N], got {truth.dtype} {list(truth.shape)}")
    if not truth.any() or truth.all():
        counts = f"{int(truth.sum())} forged and {int((~truth).sum())} untouched"
        raise ValueError(f"photos must be forged and untouched ones, got {counts}")
    if not statistics:
        raise ValueError("statistics must be at least one, got none")
    if hosts is not None and len(hosts) != len(truth):
        raise ValueError(f"hosts must be as many as photos ({len(truth)}), got {len(hosts)}")
    values = {name: np.asarray(column, np.float64) for name, column in statistics.items()}
    for name, column in values.items():
        if column.shape != truth.shape:
            raise ValueError(f"statistic {name!r} must have {len(truth)} values, got {list(column.shape)}")
        if not np.isfinite(column).all():
            raise ValueError(f"statistic {name!r} must be finite, got NaN or infinity")
    return values, truth


def _figures(
    values: Floats, forged: npt.NDArray[np.bool_], hosts: Sequence[str] | None, resamples: int, seed: int
) -> dict[str, Any]:
    interval = bootstrap_detection(values, forged, 0.0, resamples, seed, clusters=hosts)["auc"]
    return {
        "auc": float(auc(values, forged)),
        "auc_interval": _interval(interval),
        "found_0.05": found_at(values, forged, TARGETS["0.05"]),
    }


def _shares_above(
    scores: Floats,
    forged: npt.NDArray[np.bool_],
    thresholds: Mapping[str, float],
    hosts: Sequence[str] | None,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for name, group in (("found", forged), ("false_alarms", ~forged)):
        above = {rate: np.where(group, scores > limit, np.nan) for rate, limit in thresholds.items()}
        intervals = bootstrap_means(above, resamples, seed, clusters=hosts)
        result[name] = {rate: float(np.nanmean(column)) for rate, column in above.items()}
        result[f"{name}_interval"] = {rate: _interval(intervals[rate]) for rate in above}
    return result


def _left_out(untouched: Floats, hosts: npt.NDArray[Any]) -> dict[str, float] | None:
    """The share of the untouched photos [N] above the threshold of the photos of other hosts, by rate."""
    names = set(hosts.tolist())
    if len(names) < 2:
        return None
    own = [hosts == name for name in names]
    return {
        rate: sum(int((untouched[mine] > alarm_threshold(untouched[~mine], target)).sum()) for mine in own)
        / len(untouched)
        for rate, target in TARGETS.items()
    }


def _interval(ends: tuple[float, float]) -> list[float] | None:
    """JSON has no NaN, which the bootstrap gives where it has no draw."""
    return None if math.isnan(ends[0]) else list(ends)


def _platt(values: Floats, forged: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and offset, by Newton's method on the values with mean 0 and deviation 1."""
    mean, deviation = float(values.mean()), float(values.std())
    positives = int(forged.sum())
    negatives = len(forged) - positives
    targets = np.where(forged, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    weights = np.where(forged, 0.5 / positives, 0.5 / negatives)
    middle = float(weights @ targets)
    flat = 0.0, math.log(middle / (1 - middle))
    if deviation <= 1e-12 * abs(mean):
        return flat
    design = np.stack([(values - mean) / deviation, np.ones(len(values))], axis=1)

    def loss(parameters: Floats) -> float:
        z = design @ parameters
        return float(weights @ (np.logaddexp(0, z) - targets * z))

    parameters = np.array(flat)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ parameters, -500, 500)))
        gradient = design.T @ (weights * (p - targets))
        if np.abs(gradient).max() < 1e-13:
            break
        hessian = design.T @ (design * (weights * p * (1 - p))[:, None])
        step = np.linalg.solve(hessian + 1e-15 * np.eye(2), gradient)
        size = 1.0
        # A full step may overshoot where the sigmoid is flat; the loss is convex, so that some smaller one descends.
        while size > 1e-9 and loss(parameters - size * step) > loss(parameters):
            size /= 2
        parameters = parameters - size * step
    slope = float(parameters[0]) / deviation
    return (slope, float(parameters[1]) - slope * mean) if slope > 0 else flat


def pixel_curve(probability: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> Floats:
    """F1 of a forged photo's map [H, W], or the share of pixels marked in an untouched one, at PIXEL_THRESHOLDS."""
    if probability.shape != mask.shape:
        raise ValueError(f"mask must have the shape of probability {probability.shape}, got {mask.shape}")
    grid = PIXEL_THRESHOLDS.astype(np.float32)
    scores, truth = probability.reshape(-1), mask.reshape(-1)
    # By how many thresholds each pixel is marked: [2, T + 1], untouched and edited pixels.
    counts = np.zeros((2, len(grid) + 1), np.int64)
    for band in pixel_bands(scores.size):
        passed = np.searchsorted(grid, scores[band], side="left")
        for edited in (False, True):
            counts[int(edited)] += np.bincount(passed[truth[band] == edited], minlength=len(grid) + 1)
    fp, tp = np.cumsum(counts[:, :0:-1], axis=1)[:, ::-1]
    edited_pixels = counts[1].sum()
    return 2 * tp / (tp + fp + edited_pixels) if edited_pixels else fp / scores.size


def choose_pixel_threshold(
    forged: Sequence[Floats], untouched: Sequence[Floats]
) -> tuple[float, float, float]:
    """The threshold with the highest mean F1 among those that mark at most 1 % of the untouched photos' pixels.

    Args:
        forged, untouched: `pixel_curve` of each photo.

    Returns:
        The threshold (of several with that F1 the highest), its mean F1, and the mean share of pixels of the untouched
        photos that it marks, with every photo's own mask, whatever the verdict on it.
    """
    scores, alarms = np.mean(forged, axis=0), np.mean(untouched, axis=0)
    allowed = np.where(alarms <= PIXEL_ALARMS, scores, -1.0)
    best = len(allowed) - 1 - int(allowed[::-1].argmax())
    return float(PIXEL_THRESHOLDS[best]), float(scores[best]), float(alarms[best])
