"""Low-level traces of a photo's history: noise, blur, resampling, JPEG. Random, recorded and reproducible."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Rng = np.random.Generator
Trace = tuple[UInt8, dict[str, Any]]

_BANK_SIZE = 1 << 21


@lru_cache(maxsize=1)
def _noise_bank() -> npt.NDArray[np.float32]:
    """Standard normal samples, read at random offsets: drawing fresh ones would be the slowest step."""
    return np.random.default_rng(20260101).standard_normal(_BANK_SIZE, dtype=np.float32)


def add_noise(rng: Rng, image: UInt8, sigma: float, mono: bool = False) -> UInt8:
    """Gaussian noise of standard deviation sigma (grey levels), the same in all channels if mono."""
    height, width = image.shape[:2]
    shape = (height, width) if mono else (height, width, 3)
    size = int(np.prod(shape))
    bank = _noise_bank()
    if size >= len(bank):
        noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(sigma)
    else:
        start = int(rng.integers(0, len(bank) - size))
        noise = bank[start : start + size].reshape(shape) * np.float32(sigma)
    if mono:
        noise = cv2.merge([noise, noise, noise])
    return np.asarray(cv2.add(image, noise, dtype=cv2.CV_8U), dtype=np.uint8)


def blur(image: UInt8, sigma: float) -> UInt8:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.uint8)


def sharpen(image: UInt8, amount: float, sigma: float = 1.0) -> UInt8:
    """Unsharp mask: image + amount (image - blurred image)."""
    return np.asarray(cv2.addWeighted(image, 1 + amount, blur(image, sigma), -amount, 0), dtype=np.uint8)


def resample(image: UInt8, factor: float) -> UInt8:
    """Resize by factor and back, leaving the interpolation's traces at the same size."""
    height, width = image.shape[:2]
    small = (max(1, round(width * factor)), max(1, round(height * factor)))
    shrink = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    back = cv2.INTER_CUBIC if factor < 1 else cv2.INTER_AREA
    return np.asarray(
        cv2.resize(cv2.resize(image, small, interpolation=shrink), (width, height), interpolation=back)
    )


def jpeg(image: UInt8, quality: int, chroma: str = "420", shift: tuple[int, int] = (0, 0)) -> UInt8:
    """Compress and decode. shift (dy, dx) in 0..7 is the position of the image's corner in the 8x8 block grid."""
    dy, dx = shift
    if dy or dx:
        image = np.asarray(cv2.copyMakeBorder(image, dy, 0, dx, 0, cv2.BORDER_REPLICATE), dtype=np.uint8)
    factor = {"420": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, "444": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444}[
        chroma
    ]
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), flags)
    decoded = cv2.cvtColor(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB)
    return np.ascontiguousarray(decoded[dy:, dx:])


def webp(image: UInt8, quality: int) -> UInt8:
    """Compress and decode as WebP."""
    _, data = cv2.imencode(
        ".webp", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, quality]
    )
    return cv2.cvtColor(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB).astype(np.uint8)


def random_webp(rng: Rng, image: UInt8, quality: tuple[int, int]) -> Trace:
    chosen = int(rng.integers(quality[0], quality[1] + 1))
    return webp(image, chosen), {"webp": chosen}


def random_jpeg(rng: Rng, image: UInt8, quality: tuple[int, int], aligned: bool = False) -> Trace:
    chosen = int(rng.integers(quality[0], quality[1] + 1))
    chroma = "420" if rng.random() < 0.7 else "444"
    shift = (0, 0) if aligned else (int(rng.integers(8)), int(rng.integers(8)))
    return jpeg(image, chosen, chroma, shift), {"jpeg": chosen, "chroma": chroma, "grid": list(shift)}


def _random_noise(rng: Rng, image: UInt8) -> Trace:
    sigma, mono = float(rng.uniform(1, 7)), bool(rng.random() < 0.3)
    return add_noise(rng, image, sigma, mono), {"noise": round(sigma, 2), "mono": mono}


def _random_blur(rng: Rng, image: UInt8) -> Trace:
    sigma = float(rng.uniform(0.4, 1.4))
    return blur(image, sigma), {"blur": round(sigma, 2)}


def _random_sharpen(rng: Rng, image: UInt8) -> Trace:
    amount = float(rng.uniform(0.3, 1.2))
    return sharpen(image, amount), {"sharpen": round(amount, 2)}


def _random_resample(rng: Rng, image: UInt8) -> Trace:
    factor = float(rng.uniform(0.5, 0.9) if rng.random() < 0.7 else rng.uniform(1.1, 1.6))
    return resample(image, factor), {"resample": round(factor, 2)}


FILTERS: dict[str, Callable[[Rng, UInt8], Trace]] = {
    "noise": _random_noise,
    "blur": _random_blur,
    "sharpen": _random_sharpen,
    "resample": _random_resample,
}


def random_filter(rng: Rng, image: UInt8) -> Trace:
    """One of noise (half the time), blur, resampling, sharpening."""
    name = ("noise", "noise", "noise", "blur", "resample", "sharpen")[int(rng.integers(6))]
    return FILTERS[name](rng, image)


def random_history(
    rng: Rng, image: UInt8, filter_share: float, jpeg_share: float, quality: tuple[int, int]
) -> Trace:
    """A random history of a photo before the edit: possibly one filter, then possibly one JPEG compression."""
    record: dict[str, Any] = {}
    if rng.random() < filter_share:
        image, step = random_filter(rng, image)
        record |= step
    if rng.random() < jpeg_share:
        image, step = random_jpeg(rng, image, quality)
        record |= step
    return image, record
