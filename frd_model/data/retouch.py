"""Edits of a part of one photo: recolouring, filters, warping, filling a hole, and gradient-domain blending."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .traces import Rng, Trace, UInt8, add_noise, blur, sharpen

Bool = npt.NDArray[np.bool_]

INTERPOLATIONS = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}


def recolour(rng: Rng, image: UInt8) -> Trace:
    """Shift hue and chroma in CIELAB and bend the lightness by a gamma."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32)
    turn, chroma = float(rng.uniform(-np.pi, np.pi)), float(rng.uniform(0.6, 1.5))
    cos, sin = np.cos(turn) * chroma, np.sin(turn) * chroma
    shift = rng.uniform(-14, 14, 2)
    a, b = lab[..., 1] - 128, lab[..., 2] - 128
    gamma = float(np.exp(rng.uniform(-0.35, 0.35)))
    lab[..., 0] = 255 * (lab[..., 0] / 255) ** gamma
    lab[..., 1], lab[..., 2] = 128 + cos * a - sin * b + shift[0], 128 + sin * a + cos * b + shift[1]
    levels = np.clip(np.rint(lab), 0, 255).astype(np.uint8)
    record = {"turn": round(turn, 2), "chroma": round(chroma, 2), "gamma": round(gamma, 2)}
    return np.asarray(cv2.cvtColor(levels, cv2.COLOR_LAB2RGB), dtype=np.uint8), record


def local_blur(rng: Rng, image: UInt8) -> Trace:
    """Gaussian or median blur, stronger than what a photo's history has."""
    if rng.random() < 0.3:
        size = int(rng.choice([3, 5, 7]))
        return np.asarray(cv2.medianBlur(image, size), dtype=np.uint8), {"median": size}
    sigma = float(rng.uniform(0.8, 3.0))
    return blur(image, sigma), {"sigma": round(sigma, 2)}


def local_sharpen(rng: Rng, image: UInt8) -> Trace:
    amount, sigma = float(rng.uniform(0.6, 2.0)), float(rng.uniform(0.7, 2.0))
    return sharpen(image, amount, sigma), {"amount": round(amount, 2), "sigma": round(sigma, 2)}


def local_noise(rng: Rng, image: UInt8) -> Trace:
    """Grain, as editors add to hide a retouched part."""
    sigma, mono = float(rng.uniform(2, 8)), bool(rng.random() < 0.5)
    return add_noise(rng, image, sigma, mono), {"sigma": round(sigma, 2), "mono": mono}


def rescale(rng: Rng, image: UInt8) -> Trace:
    """Enlarge or shrink the content about the centre of the image."""
    factor = float(rng.uniform(0.75, 0.92) if rng.random() < 0.4 else rng.uniform(1.08, 1.4))
    name = str(rng.choice(list(INTERPOLATIONS)))
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), 0, factor)
    flags, border = INTERPOLATIONS[name], cv2.BORDER_REFLECT_101
    done = cv2.warpAffine(image, matrix, (width, height), flags=flags, borderMode=border)
    return np.asarray(done, dtype=np.uint8), {"factor": round(factor, 2), "interpolation": name}


def warp(rng: Rng, image: UInt8, region: Bool) -> Trace:
    """Bulge, pinch or push the content of region [h,w], as the liquify tool does; its border stays in place."""
    depth = cv2.distanceTransform(np.pad(region.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    deepest = float(depth.max())
    weight = np.minimum(depth / max(deepest, 1.0), 1.0).astype(np.float32)
    weight = weight * weight * (3 - 2 * weight)
    rows, columns = (np.asarray(grid, np.float32) for grid in np.indices(region.shape))
    dy, dx = rows - rows[region].mean(), columns - columns[region].mean()
    if rng.random() < 0.5:
        strength = float(rng.uniform(0.15, 0.4) * rng.choice([-1, 1]))
        columns, rows = columns - strength * weight * dx, rows - strength * weight * dy
        record: dict[str, Any] = {"bulge": round(strength, 2)}
    else:
        # Farther than half the depth, the content would fold over.
        push = rng.uniform(0.25, 0.5, 2) * rng.choice([-1, 1], 2) * deepest
        columns, rows = columns + np.float32(push[0]) * weight, rows + np.float32(push[1]) * weight
        record = {"push": [round(float(p), 1) for p in push]}
    done = cv2.remap(image, columns, rows, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(done, dtype=np.uint8), record


def smooth(rng: Rng, image: UInt8) -> Trace:
    """Smoothing that keeps edges, as skin retouching does: a bilateral filter."""
    colour, space = float(rng.uniform(20, 60)), float(rng.uniform(2, 5))
    done = cv2.bilateralFilter(image, 9, colour, space)
    return np.asarray(done, dtype=np.uint8), {"colour": round(colour), "space": round(space, 1)}


FILTERS: dict[str, Callable[[Rng, UInt8], Trace]] = {
    "recolour": recolour,
    "blur": local_blur,
    "sharpen": local_sharpen,
    "noise": local_noise,
    "rescale": rescale,
    "smooth": smooth,
}


def blend_gradients(source: UInt8, under: UInt8, region: Bool) -> UInt8:
    """Poisson blending (Perez et al., 2003): source's gradients inside region, under's values at its border.

    source, under [h,w,3], region [h,w], which may touch the border.
    """
    margin = 3
    pad = ((margin, margin), (margin, margin))
    mask = np.pad(region.astype(np.uint8) * 255, pad)
    x, y, w, h = cv2.boundingRect(mask)
    # OpenCV's solver needs a pixel with neighbours.
    if min(w, h) < 3:
        return source
    wide = [np.pad(image, (*pad, (0, 0)), mode="edge") for image in (source, under)]
    done = cv2.seamlessClone(wide[0], wide[1], mask, (x + w // 2, y + h // 2), cv2.NORMAL_CLONE)
    return np.ascontiguousarray(np.asarray(done, np.uint8)[margin:-margin, margin:-margin])


def fill_with_patches(rng: Rng, image: UInt8, hole: Bool, candidates: int = 24) -> UInt8:
    """Fill hole [H,W] of image [H,W,3] with square patches of its surroundings, from the border inwards.

    Each patch is the best of a few random ones by the mean squared difference over the pixels that are known already
    (the idea of exemplar-based inpainting, Criminisi et al., 2004), feathered where it overlaps them.
    """
    height, width = hole.shape
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = int(np.clip(extent // 5, 8, 48))
    side = min(side, height, width)
    result = image.astype(np.float32)
    known = ~hole
    depth = np.asarray(cv2.distanceTransform(hole.astype(np.uint8), cv2.DIST_L2, 3), np.float32)
    for _, top, left in _patch_places(depth, side, height, width):
        part = (slice(top, top + side), slice(left, left + side))
        if known[part].all():
            continue
        found = _best_patch(rng, result, known, hole, part, side, candidates)
        if found is None:
            continue
        old, weight = result[part], cv2.GaussianBlur(known[part].astype(np.float32), (0, 0), side / 8)
        weight = np.where(known[part], np.clip(2 * weight - 1, 0, 1), 0)[..., None]
        result[part] = np.where(hole[part][..., None], weight * old + (1 - weight) * found, old)
        known[part] = True
    return np.rint(result).astype(np.uint8)


def _patch_places(
    depth: npt.NDArray[np.float32], side: int, height: int, width: int
) -> list[tuple[float, int, int]]:
    """(depth, top, left) of overlapping patches that cover the hole, the shallowest first."""
    step = max(1, side * 2 // 3)
    places = []
    for top in [*range(0, height - side, step), height - side]:
        for left in [*range(0, width - side, step), width - side]:
            deepest = float(depth[top : top + side, left : left + side].max())
            if deepest > 0:
                places.append((deepest, top, left))
    return sorted(places)


def _best_patch(
    rng: Rng,
    result: npt.NDArray[np.float32],
    known: Bool,
    hole: Bool,
    part: tuple[slice, slice],
    side: int,
    candidates: int,
) -> npt.NDArray[np.float32] | None:
    """The candidate [side,side,3] outside the hole that fits the known pixels of `part` best."""
    height, width = hole.shape
    there = known[part]
    best: tuple[float, npt.NDArray[np.float32]] | None = None
    tops, lefts = (
        rng.integers(0, height - side + 1, candidates),
        rng.integers(0, width - side + 1, candidates),
    )
    for top, left in zip(tops, lefts, strict=True):
        place = (slice(top, top + side), slice(left, left + side))
        if hole[place].any():
            continue
        patch = result[place]
        if there.any():
            score = float(np.square(patch[there] - result[part][there]).mean())
        else:
            score = float(rng.random())
        if best is None or score < best[0]:
            best = score, patch.copy()
    return None if best is None else best[1]
