"""Conversion between uint8 photos and the model's normalised tensors, and random views for training."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

# Mean and standard deviation of ImageNet's RGB channels in [0, 1]: the normalisation of every encoder here.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def to_tensor(image: UInt8) -> Tensor:
    """uint8 RGB [H,W,3] to a float32 ImageNet-normalised tensor [3,H,W]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H,W,3], got {image.dtype} {image.shape}")
    import torch

    scale = 1 / (255 * np.array(STD, np.float32))
    offset = np.array(MEAN, np.float32) / np.array(STD, np.float32)
    values = image.astype(np.float32) * scale - offset
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def to_image(tensor: Tensor) -> UInt8:
    """The inverse of `to_tensor`: [3,H,W] to uint8 RGB [H,W,3], rounded and clipped."""
    values = tensor.detach().float().cpu().numpy().transpose(1, 2, 0) * np.array(STD) + np.array(MEAN)
    return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)


def mask_to_tensor(mask: Bool) -> Tensor:
    """bool [H,W] to float32 [1,H,W]."""
    import torch

    return torch.from_numpy(mask.astype(np.float32))[None]


def resize(image: UInt8, mask: Bool, size: tuple[int, int]) -> tuple[UInt8, Bool]:
    """Image and mask to (height, width): area or cubic interpolation for the image, nearest for the mask."""
    height, width = size
    if image.shape[:2] == (height, width):
        return image, mask
    method = cv2.INTER_AREA if height * width < image.shape[0] * image.shape[1] else cv2.INTER_CUBIC
    resized = np.asarray(cv2.resize(image, (width, height), interpolation=method), dtype=np.uint8)
    nearest = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return resized, np.asarray(nearest).astype(np.bool_)


def squash(image: UInt8, mask: Bool, side: int) -> tuple[UInt8, Bool]:
    """Image and mask to a square, whatever the aspect ratio: bilinear for the image, nearest for the mask.

    What IMDL-BenCo and the paper train and score on, as the evaluation's `benco-512`.
    """
    square = (side, side)
    resized = np.asarray(cv2.resize(image, square, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
    nearest = cv2.resize(mask.astype(np.uint8), square, interpolation=cv2.INTER_NEAREST)
    return resized, np.asarray(nearest).astype(np.bool_)


def reduce(photo: UInt8, max_side: int) -> UInt8:
    """A photo [H,W,3] whose longer side has at most `max_side` pixels, by area averaging; no side gets below 32."""
    height, width = photo.shape[:2]
    factor = max(max_side / max(height, width), 32 / min(height, width))
    if factor >= 1:
        return photo
    size = (round(factor * width), round(factor * height))
    return np.asarray(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def is_coloured(photo: UInt8) -> bool:
    """Whether the channels of a photo differ by more than a few grey levels on average."""
    sample = photo[::4, ::4].astype(np.int16)
    return bool((sample.max(axis=2) - sample.min(axis=2)).mean() > 4)


def random_view(
    rng: np.random.Generator,
    photo: UInt8,
    size: int,
    zoom: tuple[float, float] = (0.5, 1.25),
    attempts: int = 4,
) -> UInt8:
    """A random square crop [size,size,3]: half of the time at the photo's own scale, else resized by `zoom`.

    The first of a few crops that is not nearly flat is taken (a black border or clear sky teaches nothing).
    Photos smaller than the crop are enlarged.
    """
    height, width = photo.shape[:2]
    factor = 1.0 if rng.random() < 0.5 else float(np.exp(rng.uniform(*np.log(zoom))))
    side = min(max(8, round(size / factor)), height, width)
    crop = photo
    for _ in range(attempts):
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        crop = photo[top : top + side, left : left + side]
        if crop[::8, ::8].std() > 8:
            break
    if side == size:
        return np.ascontiguousarray(crop)
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(crop, (size, size), interpolation=method), dtype=np.uint8)


def random_look(rng: np.random.Generator, photo: UInt8, colour: float = 0.5) -> UInt8:
    """Mirror, rotate by quarter turns and, with probability `colour`, change gains, gamma and channel order."""
    if rng.random() < 0.5:
        photo = photo[:, ::-1]
    turns = int(rng.integers(4)) if rng.random() < 0.5 else 0
    photo = np.ascontiguousarray(np.rot90(photo, turns))
    if rng.random() >= colour:
        return photo
    if rng.random() < 0.3:
        photo = np.ascontiguousarray(photo[:, :, rng.permutation(3)])
    levels = np.linspace(0, 1, 256)[:, None] ** np.exp(rng.uniform(-0.25, 0.25))
    gains = rng.uniform(0.8, 1.15) * rng.uniform(0.88, 1.08, 3)
    table = np.clip(np.rint(255 * levels * gains), 0, 255).astype(np.uint8).reshape(1, 256, 3)
    return np.asarray(cv2.LUT(photo, table), dtype=np.uint8)


def random_focus(rng: np.random.Generator, photo: UInt8) -> UInt8:
    """A photo [H,W,3] as a lens of shallow depth of field would show it: sharp near a plane or a subject only.

    The blur grows smoothly with the distance from the plane of focus. Noise arises behind the lens: it is as strong
    where the scene is blurred, which tells this from a blur that an editor has added.
    """
    radius = _distance(rng, photo.shape[0], photo.shape[1]) * float(rng.uniform(1.0, 6.0))
    result = sharper = photo.astype(np.float32)
    # Between the levels of blur the photo is interpolated.
    levels = (0.0, 0.7, 1.5, 3.0, 6.0)
    for low, high in pairwise(levels):
        if radius.max() <= low:
            break
        blurred = cv2.GaussianBlur(photo, (0, 0), high).astype(np.float32)
        share = np.clip((radius - low) / (high - low), 0, 1)[..., None]
        result = result + share * (blurred - sharper)
        sharper = blurred
    lost = np.clip(radius / 0.7, 0, 1)[..., None] * _noise_level(photo)
    result += lost * rng.standard_normal(photo.shape, dtype=np.float32)
    return np.clip(np.rint(result), 0, 255).astype(np.uint8)


def _distance(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float32]:
    """Distance [H,W] in [0, 1] from what is in focus: a line across the photo, or an ellipse in it."""
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] - np.float32(rng.uniform(-0.8, 0.8))
    x = np.linspace(-1, 1, width, dtype=np.float32) - np.float32(rng.uniform(-0.8, 0.8))
    angle = rng.uniform(0, np.pi)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    if rng.random() < 0.5:
        along = 0 * along
    away = np.hypot(along * rng.uniform(0.5, 1), across)
    sharp, reach = rng.uniform(0.1, 0.6), rng.uniform(0.1, 1.0)
    return np.clip((away - sharp) / reach, 0, 1).astype(np.float32)


def _noise_level(photo: UInt8) -> npt.NDArray[np.float32]:
    """Standard deviation of the noise of each channel, from the median of a second difference that cancels edges."""
    # Immerkaer, Fast noise variance estimation (CVIU 1996), with the median in the place of the mean.
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    difference = np.abs(cv2.filter2D(photo, cv2.CV_32F, kernel))
    return (np.median(difference, axis=(0, 1)) / (0.6745 * 6)).astype(np.float32)
