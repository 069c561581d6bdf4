"""Localize edits in photos of any size: a probability map of the photo's own size.

Camera traces are at the scale of pixels, so nothing is resized by default: a photo of up to `WHOLE_LIMIT` pixels goes
through the network as a whole, a larger one as overlapping tiles whose maps are blended.
"""

from __future__ import annotations

import numbers
import operator
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from frd_model.data.transforms import to_tensor
from frd_model.eval_view import device_of, dtype_of, eval_view
from frd_model.map_statistics import HEAD, statistic
from frd_model.metrics import image_score
from frd_model.pixels import Picture, UInt8, as_pixels
from frd_model.score import NO_TRACE, ScoreRule
from frd_model.tiling import (
    MIN_SIDE,
    OVERLAP,
    POLICIES,
    RESIZE,
    TILE,
    WHOLE_LIMIT,
    blend_windows,
    tile_starts,
)

__all__ = [
    "OVERLAP",
    "POLICIES",
    "TILE",
    "LogitMap",
    "Prediction",
    "PredictionError",
    "blend_windows",
    "logit_map",
    "predict",
    "probability_map",
    "tile_starts",
]

FloatMap = npt.NDArray[np.float32]


class PredictionError(RuntimeError):
    """The network's output is not a map of logits: it has NaN, infinity or another shape."""


class LogitMap(NamedTuple):
    """logits [H, W] float32, and head, the image-level logit of a network with `config.image_head`, if asked for."""

    logits: FloatMap
    head: float | None


@dataclass(frozen=True)
class Prediction:
    """The network's result for one photo.

    Attributes:
        probability: [H, W] float32 in [0, 1], at the photo's own size.
        mask: [H, W] bool, probability > threshold; empty where the verdict is "no trace found", unless `raw` was given.
        score: float in [0, 1], how likely it is that the photo was edited anywhere: that of the network's `score_rule`,
            or without one `metrics.image_score`, which ranks photos but is no probability.
        size: (H, W) of the photo.
        threshold: the probability above which a pixel counts as edited.
        seconds: time in the network and in blending, without reading the file.
        verdict: "edited", "unclear" or "no trace found"; None without a rule, as the three that follow.
        false_alarm_rate: of the threshold that decided, on the untouched photos of the rule's validation: 0.01 for
            "edited", 0.05 or 0.1 for "unclear", 0.1 for "no trace found" (`ScoreRule.judge`).
        statistic: the value that the score was made from.
        rule: the network's rule, with all its thresholds and the figures of its validation.
    """

    probability: FloatMap
    mask: npt.NDArray[np.bool_]
    score: float
    size: tuple[int, int]
    threshold: float
    seconds: float
    verdict: str | None = None
    false_alarm_rate: float | None = None
    statistic: float | None = None
    rule: ScoreRule | None = None


@overload
def predict(image: Picture, model: nn.Module, **options: Any) -> Prediction: ...
@overload
def predict(image: list[Any] | tuple[Any, ...], model: nn.Module, **options: Any) -> list[Prediction]: ...
def predict(  # type: ignore[misc]  # the options are spelled out here alone
    image: Any,
    model: nn.Module,
    *,
    size: str = "auto",
    tile: int = TILE,
    overlap: int = OVERLAP,
    threshold: float | None = None,
    raw: bool = False,
    device: str | torch.device | None = None,
    batch_size: int = 2,
    progress: bool = False,
) -> Prediction | list[Prediction]:
    """Find the edited pixels of a photo, or of each photo in a list or tuple (which returns a list).

    Args:
        image: a file; a PIL image of any mode, converted as a file is, EXIF rotation included; a NumPy array [H, W]
            (grey), [H, W, 1], [H, W, 2] (grey and alpha), RGB [H, W, 3] or RGBA [H, W, 4]; or a torch tensor
            [H, W] or [C, H, W] with the same channels. Arrays and tensors are uint8, uint16 (0 to 65535) or float
            in [0, 1], not normalised; all become 8 bit, and alpha is composited over white.
        model: logits [B, 1, H, W] from normalised images [B, 3, H, W] of any size. It runs in eval mode, with inputs
            in its parameters' dtype; its own mode, device and attributes do not change (`eval_view`), so that
            several threads may share it.
        size: "auto" (whole photo up to one megapixel, tiles above), "whole", "tiles", or "resize": the photo is
            scaled to 512 x 512 by area averaging and the map scaled back to the photo's size. Evaluation protocols
            that resize use other filters and score at the small size: `frd evaluate --preset benco-512` follows one.
        tile, overlap: side of a tile and the width over which neighbours are blended, in pixels.
        threshold: a pixel of a higher probability counts as edited. None takes that of the model's `score_rule`, or
            0.5 without one.
        raw: keep the marked pixels of a photo with the verdict "no trace found".
        device: where to run; None takes the model's. On another device a copy of the model runs, made at each call:
            for many photos, move the model first.
        batch_size: tiles per forward pass.
        progress: show a progress bar for the tiles of a large photo on stderr.

    Raises ImageError for a file that cannot be read as an image, ValueError and TypeError for bad arguments,
    PredictionError if the network returns NaN, infinity or another shape.
    """
    options = {"size": size, "tile": tile, "overlap": overlap, "batch_size": batch_size, "progress": progress}
    check_options(size, tile, overlap, 0.5 if threshold is None else threshold, batch_size)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}; see create_model")
    view = eval_view(model, None if device is None else parse_device(device))
    if isinstance(image, (list, tuple)):
        return [_predict_one(as_pixels(item), view, threshold, raw, options) for item in image]
    return _predict_one(as_pixels(image), view, threshold, raw, options)


def probability_map(image: UInt8, model: Callable[[Tensor], Tensor], **options: Any) -> FloatMap:
    """The probability [H, W] float32 that each pixel was edited, the sigmoid of `logit_map`, with its arguments."""
    return sigmoid(logit_map(image, model, **options).logits)


def logit_map(
    image: UInt8,
    model: Callable[[Tensor], Tensor],
    *,
    size: str = "auto",
    tile: int = TILE,
    overlap: int = OVERLAP,
    device: str | torch.device | None = None,
    batch_size: int = 2,
    progress: bool = False,
    head: bool = False,
) -> LogitMap:
    """The logits [H, W] float32 of a uint8 RGB image [H, W, 3], and with `head` the network's image-level logit.

    `predict`, `evaluate` and the validation of a training run all use it. A module runs as described for `predict`.
    Any other callable gets float32 [B, 3, H, W] on `device` (None: the CPU), returns logits [B, 1, H, W] and sets its
    own mode. No gradients are recorded. Memory beyond the image: the map, and the network's own for `batch_size`
    tiles. Tiles are blended as logits; of their image-level logits the largest counts.

    Raises ValueError for bad arguments and for `head` where the network has none, PredictionError if the network
    returns NaN, infinity or another shape.
    """
    check_options(size, tile, overlap, 0.5, batch_size)
    if isinstance(model, nn.Module):
        model = eval_view(model, device)
        device, dtype = device_of(model) if device is None else device, dtype_of(model)
    else:
        device, dtype = "cpu" if device is None else device, torch.float32
    network = _scoring(model) if head else _plain(model)
    heads: list[float] = []

    def forward(crops: Sequence[UInt8]) -> FloatMap:
        logits, scores = _forward(network, crops, torch.device(device), dtype)
        heads.extend(scores)
        return logits

    with torch.no_grad():
        if size == "resize":
            logits = _resized(image, forward)
        elif size == "whole" or (size == "auto" and image.shape[0] * image.shape[1] <= WHOLE_LIMIT):
            logits = forward([image])[0]
        else:
            logits = _tiled(image, forward, tile, overlap, batch_size, progress)
    return LogitMap(logits, max(heads) if head else None)


Network = Callable[[Tensor], tuple[Any, Any]]


def _plain(model: Callable[[Tensor], Tensor]) -> Network:
    return lambda batch: (model(batch), None)


def _scoring(model: Any) -> Network:
    """The network with its image-level logits [B]."""
    if not has_image_head(model):
        raise ValueError("head: must be the logit of a network with config.image_head, got a network without")
    return lambda batch: model.with_score(batch)


def has_image_head(model: object) -> bool:
    """Whether the network gives an image-level logit."""
    return bool(getattr(getattr(model, "config", None), "image_head", False))


def check_options(size: str, tile: int, overlap: int, threshold: float, batch_size: int) -> None:
    """ValueError or TypeError for options that `predict` does not accept."""
    for name, value in (("tile", tile), ("overlap", overlap), ("batch_size", batch_size)):
        try:
            operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if size not in POLICIES:
        raise ValueError(f"size must be one of {', '.join(POLICIES)}, got {size!r}")
    if tile < MIN_SIDE:
        raise ValueError(f"tile must be at least {MIN_SIDE} pixels, got {tile}")
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f"overlap must lie between 0 and half the tile ({tile // 2}), got {overlap}")
    if not isinstance(threshold, numbers.Real):
        raise TypeError(f"threshold must be a number, got {threshold!r}")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _predict_one(
    pixels: UInt8, view: nn.Module, threshold: float | None, raw: bool, options: dict[str, Any]
) -> Prediction:
    rule: ScoreRule | None = getattr(view, "score_rule", None)
    if threshold is None:
        threshold = 0.5 if rule is None else rule.pixel_threshold
    start = time.perf_counter()
    logits, head = logit_map(pixels, view, head=rule is not None and rule.statistic == HEAD, **options)
    seconds = time.perf_counter() - start
    judged = {} if rule is None else _judge(rule, statistic(rule.statistic, logits, head))
    probability = sigmoid(logits)
    mask = probability > threshold
    if judged.get("verdict") == NO_TRACE and not raw:
        mask[:] = False
    return Prediction(
        probability=probability,
        mask=mask,
        size=(pixels.shape[0], pixels.shape[1]),
        threshold=float(threshold),
        seconds=seconds,
        **(judged or {"score": image_score(probability)}),
    )


def _judge(rule: ScoreRule, value: float) -> dict[str, Any]:
    score = rule.score(value)
    verdict, rate = rule.judge(score)
    return {"score": score, "verdict": verdict, "false_alarm_rate": rate, "statistic": value, "rule": rule}


def sigmoid(logits: FloatMap) -> FloatMap:
    """In place: a large photo's map is not held twice."""
    torch.from_numpy(logits).sigmoid_()
    return logits


Forward = Callable[[Sequence[UInt8]], FloatMap]


def _resized(pixels: UInt8, forward: Forward) -> FloatMap:
    height, width = pixels.shape[:2]
    scaled = np.asarray(cv2.resize(pixels, (RESIZE, RESIZE), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return np.asarray(cv2.resize(forward([scaled])[0], (width, height), interpolation=cv2.INTER_LINEAR))


def _tiled(
    pixels: UInt8, forward: Forward, tile: int, overlap: int, batch_size: int, progress: bool
) -> FloatMap:
    height, width = pixels.shape[:2]
    result = np.zeros((height, width), dtype=np.float32)
    columns = blend_windows(width, tile, overlap)
    tiles = [(y, wy, x, wx) for y, wy in blend_windows(height, tile, overlap) for x, wx in columns]
    with _progress_bar(len(tiles), progress) as bar:
        for first in range(0, len(tiles), batch_size):
            batch = tiles[first : first + batch_size]
            maps = forward([pixels[y : y + len(wy), x : x + len(wx)] for y, wy, x, wx in batch])
            for (y, wy, x, wx), logits in zip(batch, maps, strict=True):
                result[y : y + len(wy), x : x + len(wx)] += logits * wy[:, None] * wx
            bar.update(len(batch))
    return result


def _progress_bar(tiles: int, progress: bool) -> Any:
    """Shown on a terminal except for small photos; in a log for large photos only, and updated rarely."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    shown = progress and tiles >= (8 if terminal else 100)
    return tqdm(
        total=tiles,
        desc="tiles",
        unit="tile",
        disable=not shown,
        leave=False,
        mininterval=0.1 if terminal else 10,
    )


def _forward(
    network: Network, crops: Sequence[UInt8], device: torch.device, dtype: torch.dtype
) -> tuple[FloatMap, list[float]]:
    """Logits [B, H, W] of crops of one size, and their image-level logits [B] if the network gives them.

    Sides below MIN_SIDE are padded by repeating the border.
    """
    height, width = crops[0].shape[:2]
    bottom, right = max(0, MIN_SIDE - height), max(0, MIN_SIDE - width)
    if bottom or right:
        crops = [np.pad(c, ((0, bottom), (0, right), (0, 0)), mode="edge") for c in crops]
    batch = torch.stack([to_tensor(c) for c in crops]).to(device, dtype)
    logits, scores = network(batch)
    _check_output("logits", logits, (len(crops), 1, *batch.shape[2:]))
    if scores is not None:
        _check_output("image-level logits", scores, (len(crops),))
    cropped: FloatMap = logits.float()[:, 0, :height, :width].cpu().numpy()
    # A copy where the network has returned memory of its own: the caller writes into the map.
    return np.array(cropped, order="C"), [] if scores is None else scores.float().tolist()


def _check_output(name: str, values: Any, expected: tuple[int, ...]) -> None:
    if not isinstance(values, Tensor) or tuple(values.shape) != expected:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise PredictionError(f"the network must give {name} {list(expected)}, got {got}")
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        bad = int(finite.numel() - finite.sum())
        raise PredictionError(
            f"the network's {name} must be finite, got NaN or infinity in {bad} of {finite.numel()}"
        )


def parse_device(name: str | torch.device) -> torch.device:
    """A torch device. ValueError for an unknown name or a device that cannot be used here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch finds no usable GPU")
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that torch can use here, got {name!r}: {reason}") from None
    return device
