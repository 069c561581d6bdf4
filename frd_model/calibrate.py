"""Make a network's score rule from photos with known masks: one prediction of each, then `fit_rule`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from frd_model.engines import prepare
from frd_model.eval_view import eval_view
from frd_model.labelled import Labelled, Unusable
from frd_model.logits import has_image_head, logit_map, sigmoid
from frd_model.map_statistics import HEAD, measure
from frd_model.metrics import auc
from frd_model.output import one_line
from frd_model.score import PIXEL_THRESHOLDS, ScoreRule, choose_pixel_threshold, fit_rule, pixel_curve

# The size policy of the predictions, which is the default of `predict`.
POLICY = "auto"


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        rule: beside the figures of `fit_rule` its validation has "pixel_f1", the mean F1 of the forged photos at the
            pixel threshold, "pixel_false_alarm", the mean share of the pixels that it marks in untouched ones, whatever
            the verdict, and "size_policy". With `bf16` also "bf16": `auc` of the score, `pixel_f1` and
            `pixel_false_alarm` of the network in bfloat16 under the same rule, and what differs from float32: means of
            `score_difference` and of `pixel_difference`, the share of a photo's pixels that are marked in one only, and
            `verdict_difference`, the share of the photos with another verdict.
        rows: one per photo: name, kind, host (None: not known), edited (share of its pixels) and every statistic.
        failed: name and error of each photo that could not be used.
    """

    rule: ScoreRule
    rows: list[dict[str, Any]]
    failed: list[dict[str, str]]


def calibrate(
    samples: Iterable[Labelled | Unusable],
    model: nn.Module,
    *,
    statistic: str = "auto",
    device: str | None = None,
    bf16: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Calibration:
    """Predict every sample once at its own size and fit the rule; see `fit_rule` for `statistic` and the bootstrap.

    bf16: predict in bfloat16 too and state what it changes, which lets `prepare` choose it.

    A photo in a folder that `frd forge` made has the host that the manifest names. The model does not change: assign
    the rule to its `score_rule`.

    Raises ValueError where forged or untouched photos are missing, or for a statistic that is unknown or needs an image
    head that the model does not have.
    """
    view = eval_view(model, device)
    head = has_image_head(view)
    if statistic == HEAD and not head:
        raise ValueError("statistic 'head' needs a network with config.image_head, got one without")
    half = prepare(view, "torch", "bf16") if bf16 else None
    hosts = _Hosts()
    rows: list[dict[str, Any]] = []
    failed, photos = [], []
    for sample in samples:
        if isinstance(sample, Unusable):
            failed.append({"name": sample.name, "error": sample.error})
            continue
        try:
            if sample.mask.shape != sample.image.shape[:2]:
                raise ValueError(
                    f"mask must have the photo's size {sample.image.shape[:2]}, got {sample.mask.shape}"
                )
            photo = _measure(sample, view, half, head)
        # Any error of one photo must not stop the others.
        except Exception as error:
            failed.append({"name": sample.name, "error": one_line(error)})
            continue
        row = {"name": sample.name, "kind": sample.kind, "host": hosts.of(sample.path)}
        rows.append({**row, "edited": float(sample.mask.mean()), "statistics": photo.statistics})
        photos.append(photo)
    if not rows:
        first = f", the first: {failed[0]['name']}: {failed[0]['error']}" if failed else ""
        raise ValueError(
            f"photos must be forged and untouched ones, got none ({len(failed)} could not be used{first})"
        )
    rule = _fit(rows, [photo.curve for photo in photos], statistic, resamples, seed)
    if bf16:
        forged = np.array([row["edited"] > 0 for row in rows])
        rule = replace(rule, validation=rule.validation | {"bf16": _compare(rule, forged, photos)})
    return Calibration(rule, rows, failed)


class _Photo(NamedTuple):
    """What is kept of a photo's prediction: every statistic and `pixel_curve`.

    half: the same of the network in bfloat16, and the share of the pixels that are marked in one only, at each of
    PIXEL_THRESHOLDS.
    """

    statistics: dict[str, float]
    curve: Any
    half: tuple[dict[str, float], Any, Any] | None = None


def _measure(sample: Labelled, net: nn.Module, half: nn.Module | None, head: bool) -> _Photo:
    def made(network: nn.Module) -> tuple[dict[str, float], Any, npt.NDArray[np.intp]]:
        logits, score = logit_map(sample.image, network, size=POLICY, head=head, progress=True)
        statistics = measure(logits, score)
        probability = sigmoid(logits)
        # By how many thresholds each pixel is marked.
        passed = np.searchsorted(grid, probability.reshape(-1))
        return statistics, pixel_curve(probability, sample.mask), passed

    grid = PIXEL_THRESHOLDS.astype(np.float32)
    statistics, curve, passed = made(net)
    if half is None:
        return _Photo(statistics, curve)
    half_statistics, half_curve, half_passed = made(half)
    ends = (np.minimum(passed, half_passed), np.maximum(passed, half_passed))
    first, last = (np.bincount(end, minlength=len(grid) + 1) for end in ends)
    different = np.cumsum(first - last)[:-1] / passed.size
    return _Photo(statistics, curve, (half_statistics, half_curve, different))


def _compare(rule: ScoreRule, forged: npt.NDArray[np.bool_], photos: list[_Photo]) -> dict[str, float]:
    """What bfloat16 changes, see `Calibration`."""
    halves = [photo.half for photo in photos if photo.half is not None]
    level = int(np.searchsorted(PIXEL_THRESHOLDS, rule.pixel_threshold))
    values = [[photo.statistics[rule.statistic] for photo in photos], [h[0][rule.statistic] for h in halves]]
    scores = np.array([[rule.score(value) for value in column] for column in values])
    verdicts = np.array([[rule.judge(score).text for score in column] for column in scores.tolist()])
    marked = np.array([h[1][level] for h in halves])
    return {
        "auc": float(auc(scores[1], forged)),
        "pixel_f1": float(marked[forged].mean()),
        "pixel_false_alarm": float(marked[~forged].mean()),
        "score_difference": float(np.abs(scores[0] - scores[1]).mean()),
        "pixel_difference": float(np.mean([h[2][level] for h in halves])),
        "verdict_difference": float((verdicts[0] != verdicts[1]).mean()),
    }


def _fit(
    rows: list[dict[str, Any]], curves: list[Any], statistic: str, resamples: int, seed: int
) -> ScoreRule:
    forged = [row["edited"] > 0 for row in rows]
    known = any(row["host"] is not None for row in rows)
    # A photo that no manifest knows is a host of its own.
    hosts = [row["host"] or f"\0{number}" for number, row in enumerate(rows)] if known else None
    table = {name: [row["statistics"][name] for row in rows] for name in rows[0]["statistics"]}
    rule = fit_rule(table, forged, name=statistic, hosts=hosts, resamples=resamples, seed=seed)
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for is_forged, curve in zip(forged, curves, strict=True):
        groups[is_forged].append(curve)
    threshold, f1, alarm = choose_pixel_threshold(groups[True], groups[False])
    figures = {"pixel_f1": f1, "pixel_false_alarm": alarm, "size_policy": POLICY}
    return replace(rule, pixel_threshold=threshold, validation=rule.validation | figures)


class _Hosts:
    """The photo that an image was made from, by the manifest of `frd forge` beside the image's folder."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, str]] = {}

    def of(self, image: Path | None) -> str | None:
        if image is None:
            return None
        folder = image.parent.parent
        if folder not in self._folders:
            self._folders[folder] = _read_manifest(folder / "manifest.json")
        return self._folders[folder].get(f"{image.parent.name}/{image.name}")


def _read_manifest(file: Path) -> dict[str, str]:
    """Host by image; nothing for a file that is none of `frd forge`."""
    try:
        items = json.loads(file.read_bytes())["items"]
        return {str(item["image"]): str(item["host"]) for item in items}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
