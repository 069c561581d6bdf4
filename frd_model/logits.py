"""The logits of photos of any size: what part of a photo the network sees at once, and how the parts become a map.

Camera traces are at the scale of pixels, so nothing is resized by default: a photo of up to `WHOLE_LIMIT` pixels goes
through the network as a whole, a larger one as overlapping tiles whose maps are blended.
"""

from __future__ import annotations

import itertools
import numbers
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from frd_model.data.transforms import to_tensor
from frd_model.eval_view import device_of, dtype_of, eval_view
from frd_model.pixels import UInt8
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

FloatMap = npt.NDArray[np.float32]

# Crops per forward pass. One is fastest on CPUs; a GPU waits for the host while it has few.
BATCH, GPU_BATCH = 1, 8


class PredictionError(RuntimeError):
    """The network's output is not a map of logits: it has NaN, infinity or another shape."""


class LogitMap(NamedTuple):
    """logits [H, W] float32, and head, the image-level logit of a network with `config.image_head`, if asked for."""

    logits: FloatMap
    head: float | None


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
    batch_size: int | None = None,
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
    (found,) = logit_maps(
        [image],
        model,
        size=size,
        tile=tile,
        overlap=overlap,
        device=device,
        batch_size=batch_size,
        progress=progress,
        head=head,
    )
    return found


def logit_maps(
    images: Sequence[UInt8],
    model: Callable[[Tensor], Tensor],
    *,
    size: str = "auto",
    tile: int = TILE,
    overlap: int = OVERLAP,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    head: bool = False,
) -> list[LogitMap]:
    """`logit_map` of several images, whose tiles share the batches; also those of whole images of one size."""
    check_options(size, tile, overlap, 0.5, batch_size)
    if isinstance(model, nn.Module):
        model = eval_view(model, device)
        device, dtype = device_of(model) if device is None else device, dtype_of(model)
    else:
        device, dtype = "cpu" if device is None else device, torch.float32
    network, target = _scoring(model) if head else _plain(model), torch.device(device)
    originals = images
    if size == "resize":
        images = [_scaled(image) for image in images]
    crops = [c for n, image in enumerate(images) for c in _crops(n, image.shape, size, tile, overlap)]
    maps = [np.zeros(image.shape[:2], dtype=np.float32) for image in images]
    heads: list[list[float]] = [[] for _ in images]
    with torch.no_grad(), _progress_bar(len(crops), progress) as bar:
        for batch in _batches(crops, batch_size or default_batch(target)):
            pixels = [c.of(images[c.image]) for c in batch]
            logits, scores = _forward_in_memory(network, pixels, target, dtype)
            for crop, values in zip(batch, logits, strict=True):
                crop.of(maps[crop.image])[...] += values * crop.rows[:, None] * crop.columns
            for crop, score in zip(batch, scores, strict=head):
                heads[crop.image].append(score)
            bar.update(len(batch))
    if size == "resize":
        maps = [_enlarged(small, image.shape) for small, image in zip(maps, originals, strict=True)]
    return [LogitMap(m, max(h) if head else None) for m, h in zip(maps, heads, strict=True)]


class _Crop(NamedTuple):
    """A part of one of several images: first row and column, and the weights of its rows and columns in the map."""

    image: int
    top: int
    rows: FloatMap
    left: int
    columns: FloatMap

    def of(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values[self.top : self.top + len(self.rows), self.left : self.left + len(self.columns)]

    @property
    def size(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)


def _crops(image: int, shape: Sequence[int], size: str, tile: int, overlap: int) -> list[_Crop]:
    """What the network sees of an image [H, W, 3], tile by tile or as a whole."""
    whole = _is_whole(shape, size)
    rows, columns = (blend_windows(n, max(n, 1) if whole else tile, overlap) for n in shape[:2])
    return [_Crop(image, top, wy, left, wx) for top, wy in rows for left, wx in columns]


def _is_whole(shape: Sequence[int], size: str) -> bool:
    return size in ("whole", "resize") or (size == "auto" and shape[0] * shape[1] <= WHOLE_LIMIT)


def crop_count(shape: Sequence[int], size: str, tile: int, overlap: int) -> int:
    """The number of crops in which an image [H, W, 3] goes through the network."""
    if _is_whole(shape, size):
        return 1
    return len(tile_starts(shape[0], tile, overlap)) * len(tile_starts(shape[1], tile, overlap))


def _batches(crops: list[_Crop], batch_size: int) -> Iterator[list[_Crop]]:
    """Crops of one size together. Those of one image keep their order, so that its map is always summed alike."""
    for _, same in itertools.groupby(sorted(crops, key=lambda c: c.size), key=lambda c: c.size):
        while batch := list(itertools.islice(same, batch_size)):
            yield batch


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


def sigmoid(logits: FloatMap) -> FloatMap:
    """In place: a large photo's map is not held twice."""
    torch.from_numpy(logits).sigmoid_()
    return logits


def check_options(size: str, tile: int, overlap: int, threshold: float, batch_size: int | None) -> None:
    """ValueError or TypeError for options that `predict` does not accept."""
    for name, value in (
        ("tile", tile),
        ("overlap", overlap),
        ("batch_size", 1 if batch_size is None else batch_size),
    ):
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
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def default_batch(device: torch.device) -> int:
    """Crops per forward pass on a device."""
    return BATCH if device.type == "cpu" else GPU_BATCH


def _scaled(pixels: UInt8) -> UInt8:
    return np.asarray(cv2.resize(pixels, (RESIZE, RESIZE), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _enlarged(logits: FloatMap, shape: Sequence[int]) -> FloatMap:
    return np.asarray(cv2.resize(logits, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR))


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


def _forward_in_memory(
    network: Network, crops: Sequence[UInt8], device: torch.device, dtype: torch.dtype
) -> tuple[FloatMap, list[float]]:
    """`_forward`, in smaller batches where a GPU's memory does not hold the whole one."""
    try:
        return _forward(network, crops, device, dtype)
    except torch.OutOfMemoryError:
        if len(crops) == 1:
            raise
    # Outside of the handler, whose traceback holds what the failed pass has allocated.
    half = len(crops) // 2
    parts = [_forward_in_memory(network, part, device, dtype) for part in (crops[:half], crops[half:])]
    return np.concatenate([logits for logits, _ in parts]), [s for _, scores in parts for s in scores]


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
    return cropped, [] if scores is None else scores.float().tolist()


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
