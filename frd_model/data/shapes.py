"""Random regions for forgeries: polygons, ellipses, rectangles, smooth blobs, content-following parts."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from .forge_options import SHAPES

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Rng = np.random.Generator


def random_shape(
    rng: Rng, size: tuple[int, int], area: tuple[float, float], shape: str | None = None
) -> Bool:
    """A region as bool [H,W] for size (height, width); its fraction of the image is close to a random value in `area`.

    The region is inside the image if it fits. The fraction is drawn log-uniformly, since small edits are common.
    """
    height, width = size
    share = float(np.exp(rng.uniform(np.log(area[0]), np.log(area[1]))))
    if shape is None:
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    pixels = share * height * width
    aspect = float(np.exp(rng.uniform(-0.7, 0.7)))
    outline = _blob(rng) if shape == "blob" else _outline(rng, shape)
    outline = _fit(outline, pixels, aspect, rng.uniform(0, 2 * np.pi), height, width)
    low, high = outline.min(axis=0), outline.max(axis=0)
    room = np.maximum(np.array([width - 1, height - 1]) - (high - low), 0)
    outline = outline - low + rng.uniform(0, 1, 2) * room
    mask = np.zeros(size, np.uint8)
    cv2.fillPoly(mask, [np.rint(outline * 16).astype(np.int32)], 1, shift=4)
    if not mask.any():
        x, y = np.clip(np.rint(outline.mean(axis=0)).astype(int), 0, (width - 1, height - 1))
        mask[y, x] = 1
    return mask.astype(np.bool_)


def _outline(rng: Rng, shape: str) -> npt.NDArray[np.float64]:
    """Corner points [K,2] of a polygon, ellipse or rectangle about the origin."""
    if shape == "rectangle":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    if shape == "ellipse":
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)
    corners = int(rng.integers(4, 12))
    angle = (np.arange(corners) + rng.uniform(-0.4, 0.4, corners)) * (2 * np.pi / corners)
    radius = rng.uniform(0.45, 1, corners)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _blob(rng: Rng) -> npt.NDArray[np.float64]:
    """A smooth closed curve [K,2]: a circle whose log-radius is a random Fourier series of low order."""
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    order = np.arange(1, 7)
    waves = rng.normal(size=(2, 6)) * (0.45 / order)
    series = waves[0] @ np.cos(np.outer(order, angle)) + waves[1] @ np.sin(np.outer(order, angle))
    radius = np.exp(np.clip(series, -1.2, 1.2))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _fit(
    outline: npt.NDArray[np.float64], pixels: float, aspect: float, turn: float, height: int, width: int
) -> npt.NDArray[np.float64]:
    """Stretch, rotate and scale an outline to an area in pixels, and shrink it if it does not fit."""
    outline = outline * (aspect**0.5, aspect**-0.5)
    cos, sin = np.cos(turn), np.sin(turn)
    outline = outline @ np.array([[cos, -sin], [sin, cos]])
    x, y = outline[:, 0], outline[:, 1]
    area = 0.5 * abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1)))
    outline = outline * (pixels / area) ** 0.5
    extent = outline.max(axis=0) - outline.min(axis=0)
    room = np.array([width - 1, height - 1])
    return outline * np.minimum(1.0, room / np.maximum(extent, 1e-9))


def follow_content(rng: Rng, image: UInt8, region: Bool) -> Bool | None:
    """A part of `region` [H,W] that follows the content of image [H,W,3]; None if no good part is found.

    Flood filling a smoothed copy from a random point of the region follows the borders of objects, as a cut-out made
    by hand does. Accepted if it covers a quarter to nine tenths of the region.
    """
    points = np.flatnonzero(region)
    y, x = divmod(int(points[int(rng.integers(len(points)))]), region.shape[1])
    smooth = cv2.blur(image, (5, 5))
    filled = np.ones((region.shape[0] + 2, region.shape[1] + 2), np.uint8)
    filled[1:-1, 1:-1] = ~region
    tolerance = (int(rng.integers(12, 45)),) * 3
    flags = 4 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | (2 << 8)
    cv2.floodFill(smooth, filled, (x, y), 0, tolerance, tolerance, flags)
    part = (filled[1:-1, 1:-1] == 2).astype(np.uint8)
    part = cv2.medianBlur(part, 7).astype(np.bool_) & region
    share = part.sum() / len(points)
    return part if 0.25 <= share <= 0.9 else None
