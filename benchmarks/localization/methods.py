"""Classical localization without training: what a net has to beat.

Each method takes a photo, uint8 RGB [H, W, 3], and returns a map, float32 [H, W], larger where an edit is more likely.
All are deterministic and restate the cited papers' formulas in small; the free choices (qualities, windows, direction)
are those that were best on forgeries of training photos. `side` is a window's, in cells, unless pixels are named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
FloatMap = npt.NDArray[np.float32]
Method = Callable[[UInt8], FloatMap]

# Side of the cells that blocks are moved by, pixels.
CELL = 8
# Fractions of a log2: what a flat window's statistic is bounded by.
FLOOR = 1e-3


def luma(image: UInt8) -> FloatMap:
    """0.299 R + 0.587 G + 0.114 B, not rounded: float32 [H, W]."""
    return image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def channel_mean(values: FloatMap) -> FloatMap:
    return cv2.transform(values, np.full((1, 3), 1 / 3, np.float32))


def window_means(values: FloatMap, side: int) -> FloatMap:
    """Means of `side` cells squared around each cell: float32 [rows, columns]."""
    down, right = (-length % CELL for length in values.shape)
    padded = cv2.copyMakeBorder(values, 0, down, 0, right, cv2.BORDER_REFLECT)
    rows, columns = (length // CELL for length in padded.shape)
    cells = cv2.resize(padded, (columns, rows), interpolation=cv2.INTER_AREA)
    return cv2.blur(cells, (side, side), borderType=cv2.BORDER_REFLECT)


def at_pixels(cells: FloatMap, image: UInt8) -> FloatMap:
    """A value of each cell, interpolated to every pixel of the photo."""
    whole = cv2.resize(cells, None, fx=CELL, fy=CELL, interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(whole[: image.shape[0], : image.shape[1]])


def deviation(values: FloatMap) -> FloatMap:
    """Distance from the image's median in robust standard deviations (1.4826 MAD), in either direction."""
    distance = np.abs(values - np.median(values))
    return (distance / (1.4826 * np.median(distance) + FLOOR)).astype(np.float32)


def recompressed(image: UInt8, quality: int) -> UInt8:
    """The photo after one baseline JPEG of this quality."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def error_level(image: UInt8, quality: int = 95, side: int = 7) -> FloatMap:
    """Error level analysis (Krawetz, "A picture's worth", Black Hat 2007).

    |I - JPEG_q(I)|, mean of the channels and of a window; here as its deviation from the image's median, since a
    pasted part may have lost more than its surroundings or less.
    """
    error = channel_mean(cv2.absdiff(image, recompressed(image, quality)).astype(np.float32))
    return at_pixels(deviation(np.log2(window_means(error, side) + FLOOR)), image)


def noise_variance(image: UInt8, side: int = 3) -> FloatMap:
    """Local variance of a noise residual (after Mahdian and Saic, "Using noise inconsistencies", 2009).

    r = second differences across both axes (kernel [1 -2 1]^T [1 -2 1] / 4), v = mean of r^2 in a window; the deviation
    of log v from the image's median.
    """
    row = np.array([1.0, -2.0, 1.0], np.float32)
    residual = cv2.sepFilter2D(luma(image), cv2.CV_32F, row / 2, row / 2, borderType=cv2.BORDER_REFLECT)
    return at_pixels(deviation(np.log2(window_means(residual * residual, side) + FLOOR)), image)


def noise_level(image: UInt8, side: int = 48) -> FloatMap:
    """Noise's standard deviation in blocks (Mahdian and Saic, 2009; the estimator is Donoho's).

    sigma = median |HH| / 0.6745 of the finest diagonal Haar band in a block of `side` pixels, which edges hardly move;
    the deviation of log sigma from the image's median.
    """
    grey = cv2.copyMakeBorder(luma(image), 0, 1, 0, 1, cv2.BORDER_REFLECT)
    height, width = (length // 2 * 2 for length in grey.shape)
    a, b, c, d = (grey[i:height:2, j:width:2] for i in (0, 1) for j in (0, 1))
    band = np.abs(a - b - c + d) / 2
    # Windows around the middle of each cell, in pixels of the band.
    half, step = side // 2, CELL // 2
    before = (half - step) // 2
    after = [half - step - before + -length % step for length in band.shape]
    padded = cv2.copyMakeBorder(band, before, after[0], before, after[1], cv2.BORDER_REFLECT)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (half, half))[::step, ::step]
    sigma = np.stack([np.median(row.reshape(len(row), -1), axis=1) for row in windows]) / np.float32(0.6745)
    return at_pixels(deviation(np.log2(sigma + FLOOR)), image)


def jpeg_ghosts(image: UInt8, qualities: Sequence[int] = tuple(range(40, 100, 5)), side: int = 3) -> FloatMap:
    """JPEG ghosts (Farid, "Exposing digital forgeries from JPEG ghosts", IEEE TIFS 4(1), 2009).

    d(x, y, q) = mean over channels and a window of (I - JPEG_q(I))^2, then normalised to [0, 1] over the qualities of
    each pixel. A part that was once saved at another quality than the rest has its minimum elsewhere: a ghost, which
    Farid finds by eye at the right q. The map is the mean over q of |d - the image's median of d|.
    """
    stack = []
    for quality in qualities:
        error = cv2.absdiff(image, recompressed(image, quality)).astype(np.float32)
        stack.append(window_means(channel_mean(error * error), side))
    ghosts = np.stack(stack)
    ghosts -= ghosts.min(axis=0)
    ghosts /= ghosts.max(axis=0) + FLOOR
    usual = np.median(ghosts, axis=(1, 2), keepdims=True)
    return at_pixels(np.abs(ghosts - usual).mean(axis=0), image)


def marked(values: FloatMap) -> npt.NDArray[np.bool_]:
    """The upper one of two classes by Otsu's threshold; nothing of a flat map.

    The best one on forgeries of training photos of: this, half of the range, and 1 to 4 robust standard deviations.
    """
    low, high = float(values.min()), float(values.max())
    levels = np.round((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
    return levels > threshold
