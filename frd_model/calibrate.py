"""Make a network's score rule from photos with known masks: one prediction of each, then `fit_rule`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from frd_model.eval_view import eval_view
from frd_model.labelled import Labelled, Unusable
from frd_model.logits import has_image_head, logit_map, sigmoid
from frd_model.map_statistics import HEAD, measure
from frd_model.output import one_line
from frd_model.score import ScoreRule, choose_pixel_threshold, fit_rule, pixel_curve

# The size policy of the predictions, which is the default of `predict`.
POLICY = "auto"


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        rule: beside the figures of `fit_rule` its validation has "pixel_f1", the mean F1 of the forged photos at the
            pixel threshold, "pixel_false_alarm", the mean share of the pixels that it marks in untouched ones, whatever
            the verdict, and "size_policy".
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
    resamples: int = 1000,
    seed: int = 0,
) -> Calibration:
    """Predict every sample once at its own size and fit the rule; see `fit_rule` for `statistic` and the bootstrap.

    A photo in a folder that `frd forge` made has the host that the manifest names. The model does not change: assign
    the rule to its `score_rule`.

    Raises ValueError where forged or untouched photos are missing, or for a statistic that is unknown or needs an image
    head that the model does not have.
    """
    view = eval_view(model, device)
    head = has_image_head(view)
    if statistic == HEAD and not head:
        raise ValueError("statistic 'head' needs a network with config.image_head, got one without")
    hosts = _Hosts()
    rows, failed, curves = [], [], []
    for sample in samples:
        if isinstance(sample, Unusable):
            failed.append({"name": sample.name, "error": sample.error})
            continue
        try:
            if sample.mask.shape != sample.image.shape[:2]:
                raise ValueError(
                    f"mask must have the photo's size {sample.image.shape[:2]}, got {sample.mask.shape}"
                )
            logits, score = logit_map(sample.image, view, size=POLICY, head=head, progress=True)
            values = measure(logits, score)
            curve = pixel_curve(sigmoid(logits), sample.mask)
        # Any error of one photo must not stop the others.
        except Exception as error:
            failed.append({"name": sample.name, "error": one_line(error)})
            continue
        row = {"name": sample.name, "kind": sample.kind, "host": hosts.of(sample.path)}
        rows.append({**row, "edited": float(sample.mask.mean()), "statistics": values})
        curves.append(curve)
    if not rows:
        first = f", the first: {failed[0]['name']}: {failed[0]['error']}" if failed else ""
        raise ValueError(
            f"photos must be forged and untouched ones, got none ({len(failed)} could not be used{first})"
        )
    return Calibration(_fit(rows, curves, statistic, resamples, seed), rows, failed)


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
