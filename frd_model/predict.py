"""Localize edits in photos of any size: a probability map of the photo's own size, a score and a verdict."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from frd_model.device import parse_device
from frd_model.eval_view import device_of, eval_view
from frd_model.logits import (
    FloatMap,
    LogitMap,
    PredictionError,
    check_options,
    crop_count,
    default_batch,
    has_image_head,
    logit_map,
    logit_maps,
    probability_map,
    sigmoid,
)
from frd_model.map_statistics import HEAD, statistic
from frd_model.metrics import image_score
from frd_model.pixels import Picture, UInt8, as_pixels
from frd_model.score import NO_TRACE, ScoreRule
from frd_model.tiling import OVERLAP, POLICIES, TILE, blend_windows, tile_starts

__all__ = [
    "OVERLAP",
    "POLICIES",
    "TILE",
    "LogitMap",
    "Prediction",
    "PredictionError",
    "blend_windows",
    "has_image_head",
    "logit_map",
    "logit_maps",
    "parse_device",
    "predict",
    "probability_map",
    "tile_starts",
]

# Photos that are predicted together may have so many pixels.
GROUP_PIXELS = 16 << 20


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
        seconds: time in the network and in blending, without reading the file; of photos that went through the network
            together, each one's share by its pixels.
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
    batch_size: int | None = None,
    progress: bool = False,
) -> Prediction | list[Prediction]:
    """Find the edited pixels of a photo, or of each photo in a list or tuple (which returns a list).

    Args:
        image: a file, or its bytes; a PIL image of any mode, converted as a file is, EXIF rotation included; a NumPy
            array [H, W] (grey), [H, W, 1], [H, W, 2] (grey and alpha), RGB [H, W, 3] or RGBA [H, W, 4]; or a torch
            tensor [H, W] or [C, H, W] with the same channels. Arrays and tensors are uint8, uint16 (0 to 65535) or
            float in [0, 1], not normalised; all become 8 bit, and alpha is composited over white.
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
        device: where to run, or "auto" for a GPU if there is one; None takes the model's. On another device a copy of
            the model runs, made at each call: for many photos, move the model first.
        batch_size: tiles, and photos of one size in a list, per forward pass; None is 1 on a CPU and 8 elsewhere. It
            changes results in their last bits.
        progress: show a progress bar for the tiles of a large photo on stderr.

    Raises ImageError for a file that cannot be read as an image, ValueError and TypeError for bad arguments,
    PredictionError if the network returns NaN, infinity or another shape.
    """
    check_options(size, tile, overlap, 0.5 if threshold is None else threshold, batch_size)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}; see create_model")
    view = eval_view(model, None if device is None else parse_device(device))
    batch_size = batch_size or default_batch(device_of(view))
    options = {"size": size, "tile": tile, "overlap": overlap, "batch_size": batch_size, "progress": progress}
    if not isinstance(image, (list, tuple)):
        return _predict_group([as_pixels(image)], view, threshold, raw, options)[0]
    photos = ((pixels, crop_count(pixels.shape, size, tile, overlap)) for pixels in map(as_pixels, image))
    found = (_predict_group(g, view, threshold, raw, options) for g in _groups(photos, batch_size))
    return list(itertools.chain.from_iterable(found))


def fits_group(crops: int, pixels: int, batch_size: int) -> bool:
    """Whether photos with so many crops and pixels in all may go through the network together."""
    return crops <= batch_size and pixels <= GROUP_PIXELS


def _groups(photos: Iterable[tuple[UInt8, int]], batch_size: int) -> Iterator[list[UInt8]]:
    """Photos, given with the number of their crops, in groups that fill a batch at most, or of one photo."""
    group: list[UInt8] = []
    crops = pixels = 0
    for photo, count in photos:
        crops, pixels = crops + count, pixels + photo.shape[0] * photo.shape[1]
        if group and not fits_group(crops, pixels, batch_size):
            yield group
            group, crops, pixels = [], count, photo.shape[0] * photo.shape[1]
        group.append(photo)
    if group:
        yield group


def _predict_group(
    photos: list[UInt8], view: nn.Module, threshold: float | None, raw: bool, options: dict[str, Any]
) -> list[Prediction]:
    rule: ScoreRule | None = getattr(view, "score_rule", None)
    if threshold is None:
        threshold = 0.5 if rule is None else rule.pixel_threshold
    start = time.perf_counter()
    maps = logit_maps(photos, view, head=rule is not None and rule.statistic == HEAD, **options)
    seconds = (time.perf_counter() - start) / sum(m.logits.size for m in maps)
    return [_prediction(m, rule, threshold, raw, seconds * m.logits.size) for m in maps]


def _prediction(
    found: LogitMap, rule: ScoreRule | None, threshold: float, raw: bool, seconds: float
) -> Prediction:
    judged = {} if rule is None else _judge(rule, statistic(rule.statistic, *found))
    height, width = found.logits.shape
    probability = sigmoid(found.logits)
    mask = probability > threshold
    if judged.get("verdict") == NO_TRACE and not raw:
        mask[:] = False
    return Prediction(
        probability=probability,
        mask=mask,
        size=(height, width),
        threshold=float(threshold),
        seconds=seconds,
        **(judged or {"score": image_score(probability)}),
    )


def _judge(rule: ScoreRule, value: float) -> dict[str, Any]:
    score = rule.score(value)
    verdict, rate = rule.judge(score)
    return {"score": score, "verdict": verdict, "false_alarm_rate": rate, "statistic": value, "rule": rule}
