"""Reading photos and masks of any common kind, finding them, and writing results atomically."""

from __future__ import annotations

import itertools
import json
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .files import ImageError, PathLike, image_extensions
from .files import find_images as find_images
from .masks import MaskError, marked_pixels, widen

UInt8 = npt.NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)

MAX_PIXELS = 120_000_000
_PARTS = itertools.count()


def read_image(path: PathLike, *, background: int = 255, max_pixels: int = MAX_PIXELS) -> UInt8:
    """Decode a photo to uint8 RGB [H,W,3].

    The EXIF rotation is applied. Grey, palette and CMYK images are converted, 16-bit samples are scaled to 8,
    alpha is composited over a uniform `background` (white), and of an animation or a multi-page file the
    first image counts.

    Raises:
        ImageError: the path cannot be read, is no complete image, or holds more than `max_pixels` pixels.
    """
    return _decode(path, max_pixels, lambda image, _: _to_rgb(_upright(image), background))


def _decode(
    path: PathLike, max_pixels: int, convert: Callable[[Image.Image, str], npt.NDArray[T]]
) -> npt.NDArray[T]:
    """`convert` of the loaded image and of Pillow's name for the file's samples; ImageError for a bad file."""
    name = os.fspath(path)
    _check_readable(path)
    image_extensions()  # registers the optional formats
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageError(
                        f"image {name!r} must have at most {max_pixels} pixels, "
                        f"got {width} x {height} = {width * height}"
                    )
                if width * height == 0:
                    raise ImageError(f"image {name!r} must not be empty, got {width} x {height}")
                raw_mode = _raw_mode(image)
                image.load()
                return convert(image, raw_mode)
        except ImageError:
            raise
        except Image.DecompressionBombError:
            raise ImageError(f"image {name!r} must have at most {max_pixels} pixels, got far more") from None
        except UnidentifiedImageError:
            raise ImageError(
                f"image {name!r} must be an image file Pillow can read, got {_describe(path)}"
            ) from None
        except Exception as error:  # decoders raise anything from OSError to struct.error on a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"image {name!r} must be a complete image, got: {reason}") from None


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for the samples as they lie in the file, such as "RGB;16B"; "" where it has none."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _check_readable(path: PathLike) -> None:
    name = repr(os.fspath(path))
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise ImageError(f"image {name} must be a file, got a directory")
        # opening a pipe would wait for a writer
        if not stat.S_ISREG(info.st_mode):
            raise ImageError(f"image {name} must be a file, got a device, pipe or socket")
        if info.st_size == 0:
            raise ImageError(f"image {name} must not be empty, got 0 bytes")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ImageError(f"image {name} must be a readable file, got: {error.strerror}") from None
    except ImageError:
        raise
    except ValueError as error:  # a name that no file can have
        raise ImageError(f"image {name} must be a readable file, got: {error}") from None


def _describe(path: PathLike) -> str:
    with open(path, "rb") as file:
        head = file.read(8)
    return f"{os.path.getsize(path)} bytes that start with {head!r}"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata is no reason to refuse intact pixels
        return image


def _to_rgb(image: Image.Image, background: int) -> UInt8:
    if image.mode.startswith("I") or image.mode == "F":
        grey = _grey_to_uint8(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (background, background, background, 255))
        image = Image.alpha_composite(canvas, rgba)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _grey_to_uint8(values: npt.NDArray[Any]) -> UInt8:
    """16-bit integers are scaled by 255/65535; floats in [0, 1] by 255, other floats must lie in [0, 255]."""
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.floating):
        limit = 1.0 if high <= 1 else 255.0
    else:
        limit = 65535.0
    if not (low >= 0 and high <= limit):
        raise ValueError(f"samples must lie in [0, {limit:g}], got {low:g} to {high:g}")
    return np.rint(values * (255.0 / limit)).astype(np.uint8)


def read_mask(
    path: PathLike, size: tuple[int, int] | None = None, *, invert: bool = False
) -> npt.NDArray[np.bool_]:
    """Decode a mask to bool [H,W]: True where it is white, that is, where the photo was edited.

    `size` is the (height, width) the mask must have, that of its photo. The samples count as they lie in the
    file, whatever its kind, and must be plainly two-valued: black and white, grey at soft edges alone. Labels
    such as 0 and 1, or a single colour, are an error (`frd_model.data.masks` states the rule). Transparent
    pixels count as black. A black file is the mask of an untouched photo.

    Raises:
        ImageError: the file cannot be read, has another size, or is no mask; names the values it holds.
    """
    name = os.fspath(path)

    def convert(image: Image.Image, raw_mode: str) -> npt.NDArray[np.bool_]:
        try:
            image = _upright(widen(image, raw_mode, path))
            if size is None or image.size[::-1] == tuple(size):
                return marked_pixels(image)
        except MaskError as error:
            raise ImageError(f"mask {name!r} {error}") from None
        raise ImageError(
            f"mask {name!r} must have its photo's size {size[1]} x {size[0]}, "
            f"got {image.width} x {image.height}"
        )

    mask = _decode(path, MAX_PIXELS, convert)
    return ~mask if invert else mask


def write_bytes(path: PathLike, data: bytes) -> Path:
    """Write a file atomically: a reader sees the old content or all of the new. Makes folders."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own, not one made from the target's, which may be as long as names can be
    part = target.with_name(f".{os.getpid()}-{next(_PARTS)}.part")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return target


def _encode(extension: str, array: npt.NDArray[Any], flags: list[int]) -> bytes:
    values = np.asarray(array)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
        raise ValueError(
            f"array must be uint8 or bool [H,W] or uint8 [H,W,3], got {values.dtype} {values.shape}"
        )
    if values.ndim == 3:
        values = cv2.cvtColor(values, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(extension, values, flags)
    if not done:
        raise ValueError(f"array must be encodable as {extension}, got shape {values.shape}")
    return data.tobytes()


def write_png(path: PathLike, array: npt.NDArray[Any]) -> Path:
    """Write bool or uint8 [H,W] (True becomes 255) or RGB uint8 [H,W,3] as PNG, atomically."""
    return write_bytes(path, _encode(".png", array, []))


def write_jpeg(path: PathLike, array: npt.NDArray[Any], quality: int = 95) -> Path:
    """Write uint8 [H,W] or RGB [H,W,3] as JPEG, atomically."""
    return write_bytes(path, _encode(".jpg", array, [cv2.IMWRITE_JPEG_QUALITY, quality]))


def write_json(path: PathLike, value: Any) -> Path:
    """Write a JSON file (UTF-8, indented, strict: NaN is an error), atomically."""
    return write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def overlay(image: UInt8, probability: npt.NDArray[Any], strength: float = 0.6) -> UInt8:
    """Heat map of probability [H,W] in [0, 1] over RGB image [H,W,3].

    The photo is dimmed towards grey where nothing was found, and a dark-red to yellow ramp grows in with the
    probability, so that the edited region stays recognisable.
    """
    if image.shape[:2] != probability.shape:
        raise ValueError(f"probability must have the image's size {image.shape[:2]}, got {probability.shape}")
    p = np.clip(np.nan_to_num(np.asarray(probability, np.float32)), 0, 1)
    ramp = cv2.cvtColor(
        # up to yellow: the map's last quarter, white, would be lost on bright photos
        cv2.applyColorMap(np.rint(p * 190).astype(np.uint8), cv2.COLORMAP_HOT),
        cv2.COLOR_BGR2RGB,
    )
    grey = image.mean(axis=2, dtype=np.float32, keepdims=True)
    base = 0.5 * image + 0.5 * grey
    weight = (strength * p)[:, :, None]
    return np.rint(base * (1 - weight) + ramp * weight).astype(np.uint8)
