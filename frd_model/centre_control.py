"""A control that looks at no pixel: how near each pixel is to the image's centre, scored as a map of edits is.

Edits lie near the centre more often than at the frame. A network whose AUC is not above the control's may have learned
no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from frd_model.metrics import THRESHOLDS, aggregate, auc_and_curves, bootstrap_means

Curves = dict[str, npt.NDArray[np.float64]]


def centre_map(height: int, width: int) -> npt.NDArray[np.float32]:
    """1 - distance to the image's centre / the largest distance: float32 [H, W], 0 in the corners."""
    y = np.arange(height, dtype=np.float32) - np.float32((height - 1) / 2)
    x = np.arange(width, dtype=np.float32) - np.float32((width - 1) / 2)
    distance = np.hypot(y[:, None], x)
    # one pixel is its own centre
    return 1 - distance / max(float(distance[0, 0]), 1.0)


def score_centre(mask: npt.NDArray[np.bool_]) -> tuple[float, Curves]:
    """The control's AUC, and its "f1", "permute_f1" and "iou" at each of `metrics.THRESHOLDS`, for a mask [H, W]."""
    auc, curves = auc_and_curves(centre_map(*mask.shape), mask)
    return auc, {**curves, "iou": curves["f1"] / (2 - curves["f1"])}


def summarize_centre(
    rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Curves], resamples: int, seed: int
) -> dict[str, Any]:
    """Means of the control over the forged images, and how far the maps' AUC lies above it.

    "f1", "permute_f1" and "iou" are each at the one threshold, in steps of 0.01, at which its mean over all images is
    highest ("thresholds"), the best that a fixed threshold can give it. "above": AUC of the maps minus the control's,
    image by image, with the bootstrap's 95 % interval. "by_kind": the same of each kind, at the same thresholds.

    Args:
        rows: "kind", "auc" and "centre_auc" of each forged image.
        curves: sums over the images of a kind of the curves of `score_centre`, by kind.
    """
    total: Curves = {}
    for sums in curves.values():
        for name, curve in sums.items():
            total[name] = total.get(name, 0.0) + curve
    best = {name: int(curve.argmax()) for name, curve in total.items()}

    def figures(chosen: Sequence[Mapping[str, Any]], sums: Curves) -> dict[str, Any]:
        means = {name: float(sums[name][i]) / len(chosen) for name, i in best.items()} if chosen else {}
        mean = aggregate({"auc": r.get("centre_auc", math.nan)} for r in chosen).get("auc", math.nan)
        return {
            "images": len(chosen),
            **{name: means.get(name, math.nan) for name in ("f1", "permute_f1", "iou")},
            "auc": mean,
            "above": _above(chosen, resamples, seed),
        }

    kinds = sorted(kind for kind in curves if kind)
    return {
        **figures(rows, total),
        "thresholds": {name: float(THRESHOLDS[i]) for name, i in best.items()},
        "by_kind": {k: figures([r for r in rows if r["kind"] == k], curves[k]) for k in kinds},
    }


def _above(rows: Sequence[Mapping[str, Any]], resamples: int, seed: int) -> dict[str, float]:
    differences = [float(r.get("auc", math.nan)) - float(r.get("centre_auc", math.nan)) for r in rows]
    low, high = bootstrap_means({"above": differences}, resamples, seed)["above"]
    defined = [d for d in differences if not math.isnan(d)]
    mean = math.fsum(defined) / len(defined) if defined else math.nan
    return {"mean": mean, "low": low, "high": high, "images": len(defined)}
