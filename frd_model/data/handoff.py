"""What happens to a finished image on its way to the viewer: filters, encodings, a resize, a crop."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .forge_options import MIN_SIDE, ForgeOptions
from .traces import Rng, UInt8, random_filter, random_jpeg, random_webp

Bool = npt.NDArray[np.bool_]

# Most rows and columns that a crop takes off: enough for every position in the 8x8 block grid.
CROP = 8
_SHRINKS = {
    "area": cv2.INTER_AREA,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}


def finish(
    rng: Rng, image: UInt8, mask: Bool, options: ForgeOptions, size: tuple[int, int] | None = None
) -> tuple[UInt8, Bool, dict[str, Any]]:
    """A random hand-off of image [H,W,3] and mask [H,W]; returns both and its record.

    In this order, each by its own share: a filter, an encoding, a smaller size, a crop, the last encoding, which is
    aligned with the image's corner as in every JPEG file. Untouched photos take the same way.

    Args:
        size: (height, width) of the result, at most the image's: the crop takes at most `CROP` rows and columns, so
            what is larger is resized. None: the result's size is random.
    """
    record: dict[str, Any] = {}
    if rng.random() < options.final_filter:
        image, step = random_filter(rng, image)
        record |= step
    if rng.random() < options.handoff:
        encode = random_webp if rng.random() < options.webp else random_jpeg
        image, step = encode(rng, image, options.handoff_quality)
        record["handoff"] = step
    target = _resized_size(rng, (image.shape[0], image.shape[1]), options, size)
    if target != image.shape[:2]:
        name = str(rng.choice(list(_SHRINKS)))
        image = np.asarray(cv2.resize(image, target[::-1], interpolation=_SHRINKS[name]), dtype=np.uint8)
        mask = shrink_mask(mask, target)
        record["resize"] = [*target, name]
    image, mask, corner = _crop(rng, image, mask, options, size)
    if any(corner):
        record["crop"] = list(corner)
    if rng.random() < options.final_jpeg:
        image, step = random_jpeg(rng, image, options.final_quality, aligned=True)
        record |= step
    return image, mask, record


def view_side(rng: Rng, size: int, options: ForgeOptions) -> int:
    """Side of the view to forge for a result of `size` pixels: larger where the hand-off resizes or crops it."""
    factor = float(rng.uniform(*options.handoff_scale)) if rng.random() < options.handoff_resize else 1.0
    return round(size / factor) + (CROP if options.handoff_crop > 0 else 0)


def shrink_mask(mask: Bool, size: tuple[int, int]) -> Bool:
    """A mask [H,W] at a smaller size (height, width): True where at least half of the pixel was."""
    share = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
    # An edit too thin for that keeps the pixels that hold most of it.
    return np.asarray(share >= min(0.5, share.max()) if mask.any() else share > 1, dtype=np.bool_)


def _resized_size(
    rng: Rng, old: tuple[int, int], options: ForgeOptions, size: tuple[int, int] | None
) -> tuple[int, int]:
    if size is not None:
        room = CROP if options.handoff_crop > 0 else 0
        return min(old[0], size[0] + room), min(old[1], size[1] + room)
    if rng.random() >= options.handoff_resize:
        return old
    factor = float(rng.uniform(*options.handoff_scale))
    return max(MIN_SIDE, round(factor * old[0])), max(MIN_SIDE, round(factor * old[1]))


def _crop(
    rng: Rng, image: UInt8, mask: Bool, options: ForgeOptions, size: tuple[int, int] | None
) -> tuple[UInt8, Bool, tuple[int, int]]:
    """A corner cut off, to `size` or by less than the block grid; the edit stays in sight."""
    height, width = mask.shape
    if size is None:
        if rng.random() >= options.handoff_crop or min(height, width) < MIN_SIDE + CROP:
            return image, mask, (0, 0)
        size = (height - CROP, width - CROP)
    rows, columns = height - size[0] + 1, width - size[1] + 1
    top, left = int(rng.integers(rows)), int(rng.integers(columns))
    part = mask[top : top + size[0], left : left + size[1]]
    if mask.any() and not part.any():
        # The edit lies in the rows or columns that were cut off: keep the corner that shows most of it.
        corners = [(y, x) for y in (0, rows - 1) for x in (0, columns - 1)]
        top, left = max(corners, key=lambda c: int(mask[c[0] : c[0] + size[0], c[1] : c[1] + size[1]].sum()))
        part = mask[top : top + size[0], left : left + size[1]]
    cut = image[top : top + size[0], left : left + size[1]]
    return np.ascontiguousarray(cut), np.ascontiguousarray(part), (top, left)
