"""Random regions for forgeries: polygons, ellipses, rectangles, smooth blobs, content-following parts."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from .forge_options import SHAPES

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Rng = np.random.Generator

# Random places tried for a region that the frame may cut.
_PLACES = 8
# Longer side of the copy that GrabCut works on, in pixels.
_THUMBNAIL = 64


def random_shape(
    rng: Rng,
    size: tuple[int, int],
    area: tuple[float, float],
    shape: str | None = None,
    cut_by_frame: bool = False,
) -> Bool:
    """A region as bool [H,W] for size (height, width); its fraction of the image is close to a random value in `area`.

    The fraction is drawn log-uniformly, since small edits are common. The region is inside the image if it fits. With
    `cut_by_frame` it is anywhere where at least half of the smallest area is in the image, so that a pixel at the
    frame is edited about as often as one in the middle; the part beyond the frame is lost.
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
    for _ in range(_PLACES if cut_by_frame else 1):
        mask = _draw(_moved(rng, outline, height, width, cut_by_frame), size)
        if mask.sum() >= 0.5 * area[0] * height * width:
            return mask.astype(np.bool_)
    # Thin, or by chance never far enough in.
    moved = _moved(rng, outline, height, width, False)
    mask = _draw(moved, size)
    if not mask.any():
        x, y = np.clip(np.rint(moved.mean(axis=0)).astype(int), 0, (width - 1, height - 1))
        mask[y, x] = 1
    return mask.astype(np.bool_)


def _moved(
    rng: Rng, outline: npt.NDArray[np.float64], height: int, width: int, cut_by_frame: bool
) -> npt.NDArray[np.float64]:
    """The outline at a random place: with its box inside the frame, or wherever the box meets the frame."""
    low, high = outline.min(axis=0), outline.max(axis=0)
    extent, frame = high - low, np.array([width - 1, height - 1])
    if cut_by_frame:
        return outline - low - extent + rng.uniform(0, 1, 2) * (frame + extent)
    return outline - low + rng.uniform(0, 1, 2) * np.maximum(frame - extent, 0)


def _draw(outline: npt.NDArray[np.float64], size: tuple[int, int]) -> UInt8:
    mask = np.zeros(size, np.uint8)
    cv2.fillPoly(mask, [np.rint(outline * 16).astype(np.int32)], 1, shift=4)
    return mask


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

    GrabCut or flood filling from a random point of the region finds the borders of objects, as a cut-out made by hand
    does. Accepted if it covers a quarter to nine tenths of the region.
    """
    points = np.flatnonzero(region)
    y, x = divmod(int(points[int(rng.integers(len(points)))]), region.shape[1])
    part = _grab(image, region, y, x) if rng.random() < 0.5 else _flood(rng, image, region, y, x)
    smoothed = cv2.medianBlur(part, 7).astype(np.bool_) & region
    share = smoothed.sum() / len(points)
    return smoothed if 0.25 <= share <= 0.9 else None


def _flood(rng: Rng, image: UInt8, region: Bool, y: int, x: int) -> UInt8:
    """The pixels of the region that are connected to (y, x) and alike in a smoothed copy."""
    smooth = cv2.blur(image, (5, 5))
    filled = np.ones((region.shape[0] + 2, region.shape[1] + 2), np.uint8)
    filled[1:-1, 1:-1] = ~region
    tolerance = (int(rng.integers(12, 45)),) * 3
    flags = 4 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | (2 << 8)
    cv2.floodFill(smooth, filled, (x, y), 0, tolerance, tolerance, flags)
    return (filled[1:-1, 1:-1] == 2).astype(np.uint8)


def _grab(image: UInt8, region: Bool, y: int, x: int) -> UInt8:
    """GrabCut (Rother et al., 2004) of the object at (y, x), with what is beyond the region as background.

    On a small copy: it has to look like a cut-out, and at full size it would be the slowest step.
    """
    height, width = region.shape
    factor = min(1.0, _THUMBNAIL / max(height, width))
    size = (max(8, round(width * factor)), max(8, round(height * factor)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    inside = cv2.resize(region.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    labels = np.where(inside > 0, cv2.GC_PR_BGD, cv2.GC_BGD).astype(np.uint8)
    centre = (min(round(x * factor), size[0] - 1), min(round(y * factor), size[1] - 1))
    cv2.circle(labels, centre, max(size) // 3, cv2.GC_PR_FGD, -1)
    labels[inside == 0] = cv2.GC_BGD
    labels[centre[1], centre[0]] = cv2.GC_FGD
    if not (labels == cv2.GC_BGD).any():
        labels[[0, -1]] = cv2.GC_BGD
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(small, labels, (0, 0, 1, 1), *models, 2, cv2.GC_INIT_WITH_MASK)
    object_ = ((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.float32)
    large = cv2.resize(
        cv2.GaussianBlur(object_, (0, 0), 0.8), (width, height), interpolation=cv2.INTER_LINEAR
    )
    return (large > 0.5).astype(np.uint8)
