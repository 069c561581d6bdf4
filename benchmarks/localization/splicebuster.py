"""A residual clustering after Splicebuster (Cozzolino, Poggi, Verdoliva, "Splicebuster: a new blind image splicing
detector", WIFS 2015), smaller in block and dimensions, which was better on small photos."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import numpy.typing as npt

from .methods import CELL, FloatMap, UInt8, at_pixels, luma

WORD = 4
STEP = 2.0
ROUNDS = 20


def _bins() -> npt.NDArray[np.int64]:
    """The class of each of the 81 words of four levels: a word, its mirror image and their negatives are one."""
    classes: dict[tuple[int, ...], int] = {}
    bins = []
    for word in itertools.product((-1, 0, 1), repeat=WORD):
        negative = tuple(-level for level in word)
        smallest = min(word, word[::-1], negative, negative[::-1])
        bins.append(classes.setdefault(smallest, len(classes)))
    return np.array(bins)


BINS = _bins()


def splicebuster(image: UInt8, block: int = 64, dimensions: int = 5, outlier: float = 4.0) -> FloatMap:
    """Mahalanobis distance of a block's residual statistics from the class that most of the photo's blocks are of.

    Residuals r = x[j-1] - 3 x[j] + 3 x[j+1] - x[j+2] along rows and columns, quantised to -1, 0, 1 at steps of 2;
    histograms of four neighbours, along the residual and across it, in blocks moved by 8 pixels; their square roots;
    PCA. Expectation maximisation of a Gaussian and a uniform class, as in the paper: the log likelihood ratio of the
    classes is (m - t) / 2 with m the squared Mahalanobis distance and t = d + `outlier` sqrt(2 d), standard deviations
    above the mean that m has in d dimensions.
    """
    features = np.sqrt(block_histograms(luma(image), block))
    points = principal(features.reshape(-1, features.shape[2]).astype(np.float64), dimensions)
    limit = dimensions + outlier * np.sqrt(2 * dimensions)
    weights = np.ones(len(points))
    for _ in range(ROUNDS):
        distance = mahalanobis(points, weights)
        weights = 1 / (1 + np.exp(np.clip((distance - limit) / 2, -50, 50)))
    fit = np.sqrt(distance).reshape(features.shape[:2]).astype(np.float32)
    return at_pixels(fit, image)


def principal(points: npt.NDArray[np.float64], dimensions: int) -> npt.NDArray[np.float64]:
    """[N, dimensions]: the centred points along the axes of largest variance."""
    centred = points - points.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    return centred @ axes[:, -dimensions:]


def mahalanobis(points: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The squared distance of each point from the weighted mean, by the weighted covariance."""
    total = weights.sum()
    centred = points - weights @ points / total
    covariance = (centred * weights[:, None]).T @ centred / total + 1e-6 * np.eye(points.shape[1])
    return np.einsum("ij,ij->i", centred @ np.linalg.inv(covariance), centred)


def block_histograms(grey: FloatMap, block: int) -> FloatMap:
    """Relative frequencies of the residuals' words in the block around every cell: float32 [rows, columns, 2 x 25]."""
    down, right = (-size % CELL for size in grey.shape)
    grey = cv2.copyMakeBorder(grey, 0, down, 0, right, cv2.BORDER_REFLECT_101)
    rows, columns = quantised(grey), quantised(np.ascontiguousarray(grey.T)).T
    # A camera's rows and columns have the same statistics, so that both count together.
    along = cell_counts(rows, 1) + cell_counts(columns, 0)
    across = cell_counts(rows, 0) + cell_counts(columns, 1)
    counts = np.concatenate((along, across), axis=2)
    side = block // CELL // 2 * 2 + 1
    return cv2.blur(counts, (side, side), borderType=cv2.BORDER_REFLECT) / (2 * CELL * CELL)


def quantised(grey: FloatMap) -> npt.NDArray[np.int64]:
    """The residual along rows as 0, 1 or 2, of the photo's size."""
    kernel = np.array([[1, -3, 3, -1]], np.float32)
    residual = cv2.filter2D(grey, cv2.CV_32F, kernel, anchor=(1, 0), borderType=cv2.BORDER_REFLECT_101)
    return np.clip(np.round(residual / STEP), -1, 1).astype(np.int64) + 1


def cell_counts(levels: npt.NDArray[np.int64], axis: int) -> FloatMap:
    """How often each class of words along `axis` begins in each cell: float32 [rows, columns, 25]."""
    padded = np.pad(levels, [(0, WORD - 1) if a == axis else (0, 0) for a in (0, 1)], mode="symmetric")
    words = np.lib.stride_tricks.sliding_window_view(padded, WORD, axis)
    bins = BINS[words @ np.array([27, 9, 3, 1])]
    rows, columns = (length // CELL for length in levels.shape)
    cells = np.arange(rows).repeat(CELL)[:, None] * columns + np.arange(columns).repeat(CELL)
    count = int(BINS.max()) + 1
    found = np.bincount((cells * count + bins).reshape(-1), minlength=rows * columns * count)
    return found.reshape(rows, columns, count).astype(np.float32)
