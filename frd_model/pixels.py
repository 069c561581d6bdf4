"""Convert any kind of image to the uint8 RGB array that the network's input is made from."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from frd_model.data.images import from_pillow, read_image

UInt8 = npt.NDArray[np.uint8]
Picture = str | os.PathLike[str] | bytes | npt.NDArray[Any] | Image.Image | torch.Tensor

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# Rounding in other programs may leave values this far outside [0, 1].
_SLACK = 1e-5


def as_pixels(image: Any) -> UInt8:
    """uint8 RGB [H, W, 3] of a file or its bytes, a NumPy array, a PIL image or a tensor; see `frd_model.predict`.

    Raises ImageError for a file that cannot be read, TypeError and ValueError for anything that is not an image.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, bytes):
        return read_image("bytes", data=image)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"image must have at least one pixel, got {image.width} x {image.height}")
        return from_pillow(image)
    if isinstance(image, torch.Tensor):
        return _from_array(_channels_last(image))
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise TypeError(
        f"image must be a path, a NumPy array, a PIL image or a torch tensor, got {type(image).__name__}"
    )


def _channels_last(tensor: torch.Tensor) -> npt.NDArray[Any]:
    if tensor.ndim not in (2, 3):
        raise ValueError(
            f"image must be a tensor [C, H, W] or [H, W], got shape {list(tensor.shape)}; pass a batch as list(batch)"
        )
    tensor = tensor.detach().cpu()
    values = (tensor.float() if tensor.is_floating_point() else tensor).resolve_conj().resolve_neg().numpy()
    if values.ndim == 3:
        if values.shape[0] not in _MODES:
            raise ValueError(
                f"image must be a tensor [C, H, W] with C from 1 to 4, got shape {list(tensor.shape)}"
            )
        values = values.transpose(1, 2, 0)
    return values


def _from_array(values: npt.NDArray[Any]) -> UInt8:
    if values.ndim not in (2, 3) or 0 in values.shape or (values.ndim == 3 and values.shape[2] not in _MODES):
        raise ValueError(
            f"image must be [H, W] or [H, W, C] with C from 1 to 4 and at least one pixel, got shape {values.shape}"
        )
    pixels = _to_8_bit(values)
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if channels == 3:
        return pixels
    if channels == 1:
        return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    # Alpha is composited as for a file.
    return from_pillow(Image.fromarray(np.ascontiguousarray(pixels), _MODES[channels]))


def _to_8_bit(values: npt.NDArray[Any]) -> UInt8:
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "u" and size == 1:
        return values
    if kind == "u" and size == 2:
        return np.rint(values * np.float32(255 / 65535)).astype(np.uint8)
    if kind != "f":
        raise TypeError(f"image must be uint8, uint16 or float in [0, 1], got {values.dtype}")
    low, high = float(values.min()), float(values.max())
    # False for NaN too.
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise ValueError(
            f"image of floats must lie in [0, 1] (neither 0 to 255 nor normalised), got {low:g} to {high:g}"
        )
    return np.clip(np.rint(values * np.float32(255)), 0, 255).astype(np.uint8)
