"""Localize edits in one photo: any size in, a probability map of the same size out.

Camera traces live at the pixel scale, so nothing is resized unless asked for: a photo of up to `WHOLE_LIMIT`
pixels goes through the network in one piece, a larger one as overlapping tiles whose maps are blended.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from frd_model.data.images import read_image
from frd_model.data.transforms import to_tensor
from frd_model.metrics import image_score

POLICIES = ("auto", "whole", "tiles", "resize")
WHOLE_LIMIT = 1024 * 1024
TILE = 512
OVERLAP = 64
RESIZE = 512
MIN_SIDE = 32

Image = npt.NDArray[np.uint8]
FloatMap = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """What the network says of one photo.

    probability: [H, W] float32 in [0, 1], at the photo's own size.
    mask: [H, W] bool, probability > threshold.
    score: float in [0, 1], how likely the photo was edited anywhere (`metrics.image_score`).
    size: (H, W) of the photo.
    seconds: time spent in the network and the blending, without reading the file.
    """

    probability: FloatMap
    mask: npt.NDArray[np.bool_]
    score: float
    size: tuple[int, int]
    threshold: float
    seconds: float


def predict(
    image: str | os.PathLike[str] | Image,
    model: nn.Module,
    *,
    size: str = "auto",
    tile: int = TILE,
    overlap: int = OVERLAP,
    threshold: float = 0.5,
    device: str | torch.device | None = None,
    batch_size: int = 2,
) -> Prediction:
    """Find the edited pixels of one photo.

    image: a file, or uint8 RGB [H, W, 3].
    model: logits [B, 1, H, W] from normalised images [B, 3, H, W] of any size.
    size: "auto" (whole photo up to one megapixel, tiles above), "whole", "tiles", or "resize": the photo is
        scaled to 512 x 512 and the map scaled back, the protocol that the paper evaluates with.
    tile, overlap: side of a tile and the width over which neighbours are blended, in pixels.
    device: where to run; None takes the device of the model's parameters. The model is moved there.

    Raises ImageError for a file that cannot be read as an image, ValueError and TypeError for bad arguments.
    """
    _check_arguments(size, tile, overlap, threshold, batch_size)
    pixels = _as_pixels(image)
    target = _device_of(model) if device is None else torch.device(device)
    start = time.perf_counter()
    was_training = model.training
    model.eval().to(target)
    try:
        probability = _probability(pixels, model, size, tile, overlap, target, batch_size)
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - start
    return Prediction(
        probability=probability,
        mask=probability > threshold,
        score=float(image_score(probability)),
        size=(pixels.shape[0], pixels.shape[1]),
        threshold=float(threshold),
        seconds=seconds,
    )


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of evenly spaced tiles that cover `length` and overlap by at least `overlap`."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def blend_windows(length: int, tile: int, overlap: int) -> list[tuple[int, FloatMap]]:
    """(start, weights) of each tile along one axis; the weights of all tiles sum to one at every pixel.

    Ramps across the overlap; the product of a row's and a column's weights is the weight of a 2-D tile, so no
    image of weights is ever held.
    """
    starts = tile_starts(length, tile, overlap)
    extent = min(tile, length)
    distance = np.minimum(np.arange(extent), np.arange(extent)[::-1]) + 1.0
    ramp = np.minimum(distance / (overlap + 1.0), 1.0)
    total = np.zeros(length)
    for start in starts:
        total[start : start + extent] += ramp
    return [(s, (ramp / total[s : s + extent]).astype(np.float32)) for s in starts]


def _check_arguments(size: str, tile: int, overlap: int, threshold: float, batch_size: int) -> None:
    if size not in POLICIES:
        raise ValueError(f"size must be one of {', '.join(POLICIES)}, got {size!r}")
    if tile < MIN_SIDE:
        raise ValueError(f"tile must be at least {MIN_SIDE} pixels, got {tile}")
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f"overlap must lie between 0 and half the tile ({tile // 2}), got {overlap}")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _as_pixels(image: Any) -> Image:
    if isinstance(image, (str, os.PathLike)):
        return read_image(Path(image))
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image must be a path or a NumPy array, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"image must be uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image must be RGB [H, W, 3] with at least one pixel, got shape {image.shape}")
    return image


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@torch.inference_mode()
def _probability(
    pixels: Image, model: nn.Module, size: str, tile: int, overlap: int, device: torch.device, batch_size: int
) -> FloatMap:
    height, width = pixels.shape[:2]
    if size == "resize":
        scaled = np.asarray(
            cv2.resize(pixels, (RESIZE, RESIZE), interpolation=cv2.INTER_AREA), dtype=np.uint8
        )
        small = _forward(model, [scaled], device)[0]
        return np.clip(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), 0.0, 1.0)
    if size == "whole" or (size == "auto" and height * width <= WHOLE_LIMIT):
        return _forward(model, [pixels], device)[0]
    return _tiled(pixels, model, tile, overlap, device, batch_size)


def _tiled(
    pixels: Image, model: nn.Module, tile: int, overlap: int, device: torch.device, batch_size: int
) -> FloatMap:
    height, width = pixels.shape[:2]
    result = np.zeros((height, width), dtype=np.float32)
    for batch in _batches(_tiles(height, width, tile, overlap), batch_size):
        crops = [pixels[y : y + len(wy), x : x + len(wx)] for y, wy, x, wx in batch]
        for (y, wy, x, wx), probability in zip(batch, _forward(model, crops, device), strict=True):
            result[y : y + len(wy), x : x + len(wx)] += probability * wy[:, None] * wx[None, :]
    # The weights sum to one up to rounding, which must not push a probability above one.
    return np.clip(result, 0.0, 1.0, out=result)


Tile = tuple[int, FloatMap, int, FloatMap]


def _tiles(height: int, width: int, tile: int, overlap: int) -> Iterator[Tile]:
    columns = blend_windows(width, tile, overlap)
    for y, wy in blend_windows(height, tile, overlap):
        for x, wx in columns:
            yield y, wy, x, wx


def _batches(tiles: Iterator[Tile], batch_size: int) -> Iterator[list[Tile]]:
    batch: list[Tile] = []
    for item in tiles:
        batch.append(item)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _forward(model: nn.Module, crops: list[Image], device: torch.device) -> list[FloatMap]:
    """Probabilities of crops of one size; sides below MIN_SIDE are padded by repeating the border."""
    height, width = crops[0].shape[:2]
    bottom, right = max(0, MIN_SIDE - height), max(0, MIN_SIDE - width)
    if bottom or right:
        crops = [np.pad(c, ((0, bottom), (0, right), (0, 0)), mode="edge") for c in crops]
    logits = model(torch.stack([to_tensor(c) for c in crops]).to(device))
    probability = logits.float().sigmoid()[:, 0, :height, :width].cpu().numpy()
    return list(np.ascontiguousarray(probability))
