"""Maps of the same pixels in the middle of a crop and beside its border: does a network see an edit wherever it lies?

A network that has learned where edits lie gives other maps to the same pixels once the crop moves; one that has learned
their traces does not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from frd_model.labelled import Labelled, Unusable
from frd_model.metrics import auc, bootstrap_means
from frd_model.output import one_line
from frd_model.predict import probability_map

#: Crops move by multiples of this many pixels: the encoder's strides and JPEG's blocks stay on the same pixels.
STEP = 32
#: How many pixels beside a crop's border are looked at in untouched photos.
STRIP = 16
SIDE = 256
MIN_SIDE, MAX_SIDE = 128, 512
EDGES = ("top", "bottom", "left", "right")

UInt8 = npt.NDArray[np.uint8]
FloatMap = npt.NDArray[np.float32]


class Window(NamedTuple):
    """Pixels [top, bottom) x [left, right) of a photo."""

    top: int
    left: int
    bottom: int
    right: int

    def of(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values[self.top : self.bottom, self.left : self.right]

    def within(self, other: Window) -> Window:
        """The same pixels, counted from the other window's corner."""
        return Window(
            self.top - other.top, self.left - other.left, self.bottom - other.top, self.right - other.left
        )

    def shared(self, other: Window) -> Window:
        return Window(*map(max, self[:2], other[:2]), *map(min, self[2:], other[2:]))


class Pair(NamedTuple):
    """Two square crops with the same box: in the middle of the one, at an edge of the other, where the box ends too."""

    middle: Window
    border: Window


#: The probability map [side, side] of a window of a photo.
Look = Callable[[UInt8, Window], FloatMap]


def crop_pair(box: Window, size: tuple[int, int], side: int, edge: str) -> Pair | None:
    """The pair of crops of a photo of `size` (H, W) for one of `EDGES`, or None where they do not fit into the photo.

    The crops are a multiple of `STEP` apart along one axis, and at the same place along the other. "Middle" means that
    `side // 4 - STEP // 2` pixels or more lie between the box and every border.
    """
    axis, mirrored = (0 if edge in ("top", "bottom") else 1), edge in ("bottom", "right")
    low, high, length = box[axis], box[axis + 2], size[axis]
    starts = (
        _moved(length - high, length - low, length, side) if mirrored else _moved(low, high, length, side)
    )
    beside = _centred(box[1 - axis], box[3 - axis], size[1 - axis], side)
    if starts is None or beside is None:
        return None
    if mirrored:
        starts = (length - side - starts[0], length - side - starts[1])
    corners = [(start, beside) if axis == 0 else (beside, start) for start in starts]
    return Pair(*(Window(top, left, top + side, left + side) for top, left in corners))


def _moved(low: int, high: int, length: int, side: int) -> tuple[int, int] | None:
    """Starts along an axis of a crop with [low, high) in its middle, and of one that starts at low."""
    steps = min(round((side - (high - low)) / (2 * STEP)), low // STEP)
    middle = low - steps * STEP
    fits = low + side <= length and _is_far(low - middle, middle + side - high, side)
    return (middle, low) if fits else None


def _centred(low: int, high: int, length: int, side: int) -> int | None:
    start = min(max((low + high - side) // 2, 0), length - side)
    return start if start >= 0 and _is_far(low - start, start + side - high, side) else None


def _is_far(before: int, after: int, side: int) -> bool:
    return min(before, after) >= side // 4 - STEP // 2


def border_strips(size: tuple[int, int], side: int) -> dict[str, Window]:
    """For each of `EDGES`, pixels near the middle of a photo that a crop's border can be moved to: `STRIP` deep."""
    strips = {}
    for edge in EDGES:
        axis = 0 if edge in ("top", "bottom") else 1
        length, beside = size[axis], (size[1 - axis] - side // 2) // 2
        shift = STEP * max(0, min(round((side - STRIP) / (2 * STEP)), (length - side) // STEP))
        low = (length - side - shift) // 2 + shift
        if edge in ("bottom", "right"):
            low = length - low - STRIP
        box = (low, beside, low + STRIP, beside + side // 2)
        strips[edge] = Window(*box) if axis == 0 else Window(box[1], box[0], box[3], box[2])
    return strips


def box_of(mask: npt.NDArray[np.bool_]) -> Window:
    """The smallest window with all edited pixels of a mask that has one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Window(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


def look_with(model: nn.Module, device: str | None = None) -> Look:
    """Each window goes through the network as an image of its own."""
    forward = partial(probability_map, model=model, size="whole", device=device)
    return lambda photo, window: forward(np.ascontiguousarray(window.of(photo)))


@dataclass
class ShiftTest:
    """Figures of one network on one set; one or two crops are in memory at a time.

    Attributes:
        look: the maps of crops, as by `look_with`.
        side: of the crops, a multiple of 32 from 128; an edit larger than half of it gets crops of twice its own size.
        forged: for each forged image the AUC over the pixels that both crops hold, with the edit in the "middle" and at
            the "border", and over all pixels of each crop, "crop_middle" and "crop_border": means over its pairs.
        untouched: for each untouched photo the mean probability of the same pixels in the "middle" of a crop and within
            16 pixels of its "border".
        skipped: images that are not used, by the reason. failed: those that the network failed on.
    """

    look: Look
    side: int = SIDE
    forged: list[dict[str, Any]] = field(default_factory=list)
    untouched: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    failed: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.side < MIN_SIDE or self.side % STEP:
            raise ValueError(f"side must be a multiple of {STEP} from {MIN_SIDE}, got {self.side}")

    def watch(self, samples: Iterable[Labelled | Unusable]) -> Iterator[Labelled | Unusable]:
        """Pass samples on, and test those that can be used."""
        for sample in samples:
            if isinstance(sample, Labelled):
                self.add(sample)
            yield sample

    def add(self, sample: Labelled) -> None:
        """Test one sample. One that cannot be used is counted; an error of the network goes to `failed`."""
        try:
            self._add(sample)
        # Any error of one image must not stop the others.
        except Exception as error:
            self.failed.append({"name": sample.name, "error": one_line(error)})

    def _add(self, sample: Labelled) -> None:
        edited = bool(sample.mask.any())
        side, boxes = self._boxes(sample.mask) if edited else (self.side, {})
        height, width = sample.mask.shape
        if side > max(MAX_SIDE, self.side):
            self.skipped[f"edit larger than {MAX_SIDE // 2} pixels"] += 1
            return
        if side > min(height, width):
            small = "edit larger than half the photo" if side > self.side else "photo smaller than a crop"
            self.skipped[small] += 1
            return
        boxes = boxes or border_strips((height, width), side)
        found = [(box, crop_pair(box, (height, width), side, edge)) for edge, box in boxes.items()]
        pairs = [(box, pair) for box, pair in found if pair is not None]
        if not pairs:
            self.skipped["edit too near the frame" if edited else "no room to move a crop"] += 1
            return
        figures = [
            self._edit(sample, pair) if edited else self._strip(sample, box, pair) for box, pair in pairs
        ]
        means = {name: math.fsum(f[name] for f in figures) / len(figures) for name in figures[0]}
        row = {"name": sample.name, "kind": sample.kind, "side": side, "pairs": len(pairs), **means}
        (self.forged if edited else self.untouched).append(row)

    def _boxes(self, mask: npt.NDArray[np.bool_]) -> tuple[int, dict[str, Window]]:
        """The side of the crops for an edit, and its box for each edge."""
        box = box_of(mask)
        extent = max(box.bottom - box.top, box.right - box.left)
        return max(self.side, math.ceil(2 * extent / STEP) * STEP), dict.fromkeys(EDGES, box)

    def _edit(self, sample: Labelled, pair: Pair) -> dict[str, float]:
        shared = pair.middle.shared(pair.border)
        truth, figures = shared.of(sample.mask), {}
        for name, crop in pair._asdict().items():
            found = self.look(sample.image, crop)
            figures[name] = auc(shared.within(crop).of(found), truth)
            figures[f"crop_{name}"] = auc(found, crop.of(sample.mask))
        return figures

    def _strip(self, sample: Labelled, box: Window, pair: Pair) -> dict[str, float]:
        return {
            name: float(box.within(crop).of(self.look(sample.image, crop)).mean(dtype=np.float64))
            for name, crop in pair._asdict().items()
        }

    def summary(self, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Means over images of the figures and of "difference", middle minus border, with 95 % bootstrap intervals.

        The difference is paired: each draw of images gives a mean of the images' own differences.
        """
        intervals = partial(_paired, resamples=resamples, seed=seed)
        return {
            "side": self.side,
            "forged": {
                "images": len(self.forged),
                "auc": intervals(self.forged, "middle", "border"),
                "crop_auc": intervals(self.forged, "crop_middle", "crop_border"),
            },
            "untouched": {
                "images": len(self.untouched),
                "probability": intervals(self.untouched, "middle", "border"),
                "lower_at_border": sum(r["border"] < r["middle"] for r in self.untouched),
            },
            "skipped": dict(self.skipped),
            "failed": self.failed,
        }


def _paired(
    rows: Sequence[dict[str, Any]], middle: str, border: str, resamples: int, seed: int
) -> dict[str, dict[str, float]]:
    columns = {
        "middle": [float(r[middle]) for r in rows],
        "border": [float(r[border]) for r in rows],
        "difference": [float(r[middle]) - float(r[border]) for r in rows],
    }
    intervals = bootstrap_means(columns, resamples, seed)
    return {
        name: {
            "mean": math.fsum(values) / len(values) if values else math.nan,
            "low": intervals[name][0],
            "high": intervals[name][1],
        }
        for name, values in columns.items()
    }


def format_shift_test(summary: dict[str, Any]) -> str:
    """The summary as lines, and what they leave out."""
    forged, untouched = summary["forged"], summary["untouched"]
    lines = [
        f"shift test: crops of {summary['side']} x {summary['side']} pixels, or of twice the edit's size"
    ]
    if forged["images"]:
        edits = f"  AUC of {forged['images']} edits, "
        lines += [f"{edits}the same pixels: {_line(forged['auc'])}"]
        lines += [f"{edits}all pixels of a crop: {_line(forged['crop_auc'])}"]
    if untouched["images"]:
        lines.append(
            f"  mean probability of {untouched['images']} untouched photos, the same pixels: "
            f"{_line(untouched['probability'])}; lower beside the border in {untouched['lower_at_border']}"
        )
    if len(lines) == 1:
        lines.append("  no image could be tested")
    lines += [f"  skipped: {count} x {reason}" for reason, count in summary["skipped"].items()]
    if summary["failed"]:
        lines.append(f"  skipped: {len(summary['failed'])} x could not be predicted")
    return "\n".join(lines)


def _line(figures: dict[str, dict[str, float]]) -> str:
    gap = figures["difference"]
    return (
        f"{figures['middle']['mean']:.4f} in the middle, {figures['border']['mean']:.4f} beside a border, "
        f"difference {gap['mean']:+.4f} (95 % interval {gap['low']:+.4f} to {gap['high']:+.4f})"
    )
