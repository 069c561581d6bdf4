"""Decode masks: what a mask file must contain, and which of its pixels are marked.

A mask is black where the photo is untouched and white where it was edited. The rule applies to the samples as
stored in the file: white is 255, or 65535 where 16-bit samples go beyond 255, 1.0 for floats up to 1; colours count
by their mean, transparent pixels as black. A sample within an eighth of white of black or white counts as that,
since JPEG changes samples, and a pixel is marked from half of white on. Grey is only allowed at soft edges, with black
and white within a few pixels. Other classes, colours, or labels that happen to be 0 or 255 are not a mask.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from .files import PathLike

Bool = npt.NDArray[np.bool_]

_INTEGER_WHITES = (255, 65535, 2**31 - 1, 2**32 - 1)
_FLOAT_WHITES = (1, 255, 65535, 2**32)
# Tolerated grey pixels away from edges: noise of strong compression, and dots too small to have a white core.
_STRAY_OF_MARKED = 0.1
_STRAY_OF_ALL = 0.002


class MaskError(ValueError):
    """A file whose samples are not a mask. The message, "must be ..., got ...", follows the file's name."""


class _Samples(NamedTuple):
    """values [H,W] or colours [H,W,3] as stored in the file, their grey [H,W], and the grey of white."""

    values: npt.NDArray[Any]
    grey: npt.NDArray[Any]
    white: float
    empty: bool


def marked_pixels(image: Image.Image) -> Bool:
    """The marked pixels [H,W] of a decoded mask.

    Raises:
        MaskError: the samples are not clearly those of a mask.
    """
    samples = _read_samples(image)
    grey, white = samples.grey, samples.white
    high = grey >= _level(grey, white * 7 / 8)
    if not high.any():
        if samples.empty:
            return high
        raise MaskError(_complaint(samples))
    low = grey < _level(grey, white / 8)
    # If white is exact, the file was not compressed lossily: a flat area near black is a label, as in 0, 1 and 255.
    if not (high & (grey < _level(grey, white))).any():
        labels = low & (grey != grey.min())
        if labels.any():
            low &= ~(labels & _flat(grey))
    stray = ~(high | low)
    if stray.any():
        stray &= ~(_near(high) & _near(low))
    count = int(stray.sum())
    if count > max(_STRAY_OF_MARKED * int(high.sum()), _STRAY_OF_ALL * grey.size):
        raise MaskError(_complaint(samples, f"{count / grey.size:.1%} grey away from edges among "))
    return np.asarray(grey >= _level(grey, white / 2))


def _level(grey: npt.NDArray[Any], value: float) -> float:
    """`value`, rounded up for integer samples, so that comparing needs no conversion."""
    return value if grey.dtype.kind == "f" else math.ceil(value)


def widen(image: Image.Image, raw_mode: str, path: PathLike) -> Image.Image:
    """The image with the full range of its samples, which Pillow loses for two kinds of file.

    Pillow drops the low bytes of 16-bit colours (255 becomes 0), so they are read again as 16-bit grey. It makes
    unsigned 32-bit samples signed. `raw_mode` is Pillow's name for the file's samples, which `Image.load` removes.
    """
    if ";16" in raw_mode and image.mode in ("RGB", "RGBA"):
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
        colours = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
        if colours is None or colours.dtype != np.uint16 or colours.ndim != 3:
            raise MaskError("must hold 16-bit colours that OpenCV reads, got a kind of file that is not")
        grey = colours[:, :, :3].mean(axis=2)
        if colours.shape[2] == 4:
            grey *= colours[:, :, 3] / _white(colours[:, :, 3])
        wide = Image.fromarray(np.rint(grey).astype(np.uint16))
    elif raw_mode.startswith("I;32") and not raw_mode.endswith("S"):
        wide = Image.fromarray(np.asarray(image).view(np.uint32).astype(np.float32))
        if float(np.asarray(wide).max()) <= _INTEGER_WHITES[-1] / 2:
            return image
    else:
        return image
    wide.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    return wide


def _read_samples(image: Image.Image) -> _Samples:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        values = values.astype(values.dtype.newbyteorder("="))
        return _Samples(values, values, _white(values), not values.any())
    if image.mode in ("1", "L") and not image.has_transparency_data:
        values = np.asarray(image.convert("L"))
        return _Samples(values, values, 255, not values.any())
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        colours, alpha = np.asarray(rgba)[:, :, :3], np.asarray(rgba)[:, :, 3]
        # Black on a transparent background, or fully transparent white, is not an empty mask.
        empty = not colours.any() and alpha.min() == alpha.max()
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
        colours = np.asarray(image.convert("RGB"))
    else:
        colours = np.asarray(image.convert("RGB"))
        empty = not colours.any()
    grey = colours[:, :, 0].astype(np.uint16)
    grey += colours[:, :, 1]
    grey += colours[:, :, 2]
    return _Samples(colours, grey, 3 * 255, empty)


def _white(values: npt.NDArray[Any]) -> float:
    """The value of white: the smallest usual full scale that contains the samples."""
    low, high = values.min(), values.max()
    whites = _FLOAT_WHITES if np.issubdtype(values.dtype, np.floating) else _INTEGER_WHITES
    if low >= 0:
        for white in whites:
            if high <= white:
                return float(white)
    raise MaskError(f"must hold samples in [0, {whites[-1]}], got {low} to {high}")


def _flat(grey: npt.NDArray[Any]) -> Bool:
    """Pixels that have the same value as their eight neighbours."""
    values, kernel = grey.astype(np.float32), np.ones((3, 3), np.uint8)
    return np.asarray(cv2.dilate(values, kernel) == cv2.erode(values, kernel))


def _near(marked: Bool) -> Bool:
    """Pixels within 3 to 8 pixels of marked ones, more in larger images."""
    reach = min(max(3, min(marked.shape) // 64), 8)
    kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    return np.asarray(cv2.dilate(marked.astype(np.uint8), kernel)).astype(np.bool_)


def _complaint(samples: _Samples, share: str = "") -> str:
    white = "white" if samples.values.ndim == 3 else f"white ({samples.white:g})"
    return (
        f"must be black where untouched and {white} where edited, with grey at soft edges alone, "
        f"got {share}{_describe_values(samples.values)}"
    )


def _describe_values(values: npt.NDArray[Any], limit: int = 6) -> str:
    """The distinct values or colours, or the first few of many."""
    noun, flat = "values", values.reshape(-1)
    if values.ndim == 3:
        noun = "colours"
        flat = (values.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(axis=2).reshape(-1)
    found = np.unique(flat)
    shown = [
        str((int(v) >> 16, int(v) >> 8 & 255, int(v) & 255)) if values.ndim == 3 else f"{v:g}"
        for v in found[:limit]
    ]
    if len(found) > limit:
        last = "" if values.ndim == 3 else f" up to {found[-1]:g}"
        return f"{len(found)} {noun}: {', '.join(shown)}, ...{last}"
    return f"the {noun if len(found) > 1 else noun[:-1]} {', '.join(shown)}"
