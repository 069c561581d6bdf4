"""Statistics of a map of logits, each one number that tells edited from untouched photos more or less well."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from frd_model.metrics import image_score

# The network's own image-level logit, which is no statistic of the map.
HEAD = "head"


class _Map:
    """A map of logits [H, W] float32, and what several statistics need of it."""

    def __init__(self, logits: npt.NDArray[Any]) -> None:
        self.logits = np.ascontiguousarray(logits, np.float32)
        if self.logits.ndim != 2 or not self.logits.size:
            raise ValueError(f"logits must be [H, W] with at least one pixel, got shape {np.shape(logits)}")
        self._windows: dict[int, float] = {}

    @cached_property
    def median(self) -> float:
        return float(np.median(self.logits))

    @cached_property
    def highest(self) -> float:
        return float(self.logits.max())

    @cached_property
    def top(self) -> float:
        return image_score(self.logits)

    def window(self, side: int) -> float:
        if side not in self._windows:
            height, width = (min(side, length) for length in self.logits.shape)
            means = cv2.boxFilter(self.logits, cv2.CV_32F, (width, height), anchor=(0, 0))
            rows, columns = self.logits.shape
            self._windows[side] = float(means[: rows - height + 1, : columns - width + 1].max())
        return self._windows[side]


def _window(side: int) -> Callable[[_Map], float]:
    return lambda m: m.window(side)


def _window_contrast(side: int) -> Callable[[_Map], float]:
    return lambda m: m.window(side) - m.median


def _component(m: _Map) -> float:
    sizes = cv2.connectedComponentsWithStats((m.logits > 0).view(np.uint8))[2][1:, cv2.CC_STAT_AREA]
    return math.log1p(int(sizes.max())) if len(sizes) else 0.0


def _mean_marked(m: _Map) -> float:
    return float(m.logits[m.logits > 0].mean(dtype=np.float64)) if m.highest > 0 else m.highest


#: Statistics of a map of logits z [H, W], H, W >= 1. Pixels with z > 0 have a probability above 0.5.
#:
#: - `max`: max z
#: - `top_0.1_percent`, `top_1_percent`: mean of the highest 0.1 % or 1 % of z, at least one pixel
#: - `top_1_percent_contrast`: the latter - median z
#: - `window_32`, `window_64`, `window_128`: the largest mean of z over a square of so many pixels that lies inside the
#:   photo, cut to a smaller photo
#: - `window_32_contrast`, ...: the same - median z
#: - `area`: number of z > 0 / (H W)
#: - `component`: log(1 + pixels of the largest 8-connected component of z > 0)
#: - `mean_marked`: mean of the z > 0; max z where there is none
#:
#: Statistics of a highest value (`max`, `window_*`) grow with the number of pixels that it is taken over, `component`
#: with the resolution at which a photo shows the same region. Shares of the pixels (`top_*`, `area`) do not change with
#: the photo's size as such, but an edit of so many pixels counts the less the larger the photo. `*_contrast` do not
#: change if a constant is added to the map, the others do.
STATISTICS: dict[str, Callable[[_Map], float]] = {
    "max": lambda m: m.highest,
    "top_0.1_percent": lambda m: image_score(m.logits, 0.001),
    "top_1_percent": lambda m: m.top,
    "top_1_percent_contrast": lambda m: m.top - m.median,
    "window_32": _window(32),
    "window_64": _window(64),
    "window_128": _window(128),
    "window_32_contrast": _window_contrast(32),
    "window_64_contrast": _window_contrast(64),
    "window_128_contrast": _window_contrast(128),
    "area": lambda m: float(np.count_nonzero(m.logits > 0) / m.logits.size),
    "component": _component,
    "mean_marked": _mean_marked,
}


def measure(logits: npt.NDArray[Any], head: float | None = None) -> dict[str, float]:
    """Every statistic of a map of logits [H, W], by name; with `head`, the network's image-level logit, that too."""
    prepared = _Map(logits)
    found = {name: compute(prepared) for name, compute in STATISTICS.items()}
    return found if head is None else found | {HEAD: head}


def statistic(name: str, logits: npt.NDArray[Any], head: float | None = None) -> float:
    """One of the statistics of `measure`. ValueError for "head" without the network's image-level logit."""
    if name != HEAD:
        return STATISTICS[name](_Map(logits))
    if head is None:
        raise ValueError("score_rule: the statistic 'head' needs a network with config.image_head, got none")
    return head
