"""Read photos and masks of any common format, and write results atomically."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from frd_model.results import COLOUR_MAPS

from .files import ImageError, PathLike, check_strips, photo_formats
from .files import find_images as find_images
from .masks import MaskError, marked_pixels, widen
from .png import write_bands

UInt8 = npt.NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)

MAX_PIXELS = 120_000_000
# As many as 120 megapixels of four 16-bit samples take uncompressed, and metadata.
MAX_BYTES = 1 << 30


def read_image(
    path: PathLike, *, background: int = 255, max_pixels: int = MAX_PIXELS, data: bytes | None = None
) -> UInt8:
    """Decode a photo to uint8 RGB [H,W,3].

    The EXIF rotation is applied. Grey, palette and CMYK images are converted, 16-bit samples are scaled to 8,
    alpha is composited over a uniform `background` (white), and of an animation or a
    multi-page file the first image is read.

    Args:
        data: the file's content where it is in memory already; `path` then only names it in messages.

    Raises:
        ImageError: the path cannot be read, is not a complete image, or has more than `max_pixels` pixels or more
            than MAX_BYTES bytes, which is found before memory is taken for them.
    """
    return _decode(path, max_pixels, lambda image, _: from_pillow(image, background), data)


def read_file(path: PathLike) -> bytes:
    """A photo's file as it is. ImageError if it cannot be read, is empty or has more than MAX_BYTES bytes."""
    check_readable(path)
    with open(path, "rb") as file:
        return read_stream(file, path)


def read_stream(file: BinaryIO, name: PathLike) -> bytes:
    """The rest of a file or pipe. ImageError if it has more than MAX_BYTES bytes, of which no more are then read."""
    try:
        data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ImageError(f"image {os.fspath(name)!r} must be readable, got: {error.strerror}") from None
    _check_bytes(name, len(data))
    return data


def _decode(
    path: PathLike,
    max_pixels: int,
    convert: Callable[[Image.Image, str], npt.NDArray[T]],
    data: bytes | None = None,
) -> npt.NDArray[T]:
    """`convert`, called with the loaded image and Pillow's name for the file's samples; ImageError for a bad file."""
    with open_image(path, max_pixels, data) as image:
        raw_mode = _raw_mode(image)
        image.load()
        # An icon's file states one size and may hold another.
        _check_size(path, image.size, max_pixels)
        return convert(image, raw_mode)


@contextlib.contextmanager
def open_image(
    path: PathLike, max_pixels: int = MAX_PIXELS, data: bytes | BinaryIO | None = None
) -> Iterator[Image.Image]:
    """A photo's file, opened and not yet decoded. Errors in the block, such as those of `load`, become ImageError.

    `data` is the file's content where it is in memory already, or the file where it is open.
    """
    name = os.fspath(path)
    if data is None:
        check_readable(path)
    elif isinstance(data, bytes):
        _check_bytes(path, len(data))
    try:
        with contextlib.ExitStack() as stack:
            file: BinaryIO
            if data is None:
                file = stack.enter_context(open(path, "rb"))
            else:
                file = io.BytesIO(data) if isinstance(data, bytes) else data
            check_strips(path, file)
            image = stack.enter_context(Image.open(file, formats=photo_formats()))
            _check_size(path, image.size, max_pixels)
            yield image
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(f"image {name!r} must fit into memory, got out of memory") from None
    except Image.DecompressionBombError:
        raise ImageError(f"image {name!r} must have at most {max_pixels} pixels, got far more") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"image {name!r} must be an image file Pillow can read, got {_describe(path, data)}"
        ) from None
    # Decoders raise anything from OSError to struct.error for a damaged file.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"image {name!r} must be a complete image, got: {reason}") from None


def _check_size(path: PathLike, size: tuple[int, int], max_pixels: int) -> None:
    name, (width, height) = os.fspath(path), size
    if width * height > max_pixels:
        raise ImageError(
            f"image {name!r} must have at most {max_pixels} pixels, got {width} x {height} = {width * height}"
        )
    if width * height == 0:
        raise ImageError(f"image {name!r} must not be empty, got {width} x {height}")


def _check_bytes(path: PathLike, count: int) -> None:
    if count == 0:
        raise ImageError(f"image {os.fspath(path)!r} must not be empty, got 0 bytes")
    if count > MAX_BYTES:
        raise ImageError(
            f"image {os.fspath(path)!r} must have at most {MAX_BYTES} bytes, got {count} or more"
        )


def from_pillow(image: Image.Image, background: int = 255) -> UInt8:
    """uint8 RGB [H,W,3] of a PIL image of any mode, converted as `read_image` converts a file."""
    return _to_rgb(_upright(image), background)


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for the samples as stored in the file, such as "RGB;16B"; "" if it has none."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def check_readable(path: PathLike) -> None:
    """ImageError unless the path is a regular file of 1 to MAX_BYTES bytes that can be opened."""
    name = repr(os.fspath(path))
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise ImageError(f"image {name} must be a file, got a directory")
        # Opening a pipe would wait for a writer.
        if not stat.S_ISREG(info.st_mode):
            raise ImageError(f"image {name} must be a file, got a device, pipe or socket")
        _check_bytes(path, info.st_size)
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ImageError(f"image {name} must be a readable file, got: {error.strerror}") from None
    except ImageError:
        raise
    # A name that no file can have.
    except ValueError as error:
        raise ImageError(f"image {name} must be a readable file, got: {error}") from None


def _describe(path: PathLike, data: bytes | BinaryIO | None) -> str:
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    with open(path, "rb") if source is None else contextlib.nullcontext(source) as file:
        file.seek(0)
        head = file.read(8)
        return f"{file.seek(0, io.SEEK_END)} bytes that start with {head!r}"


def _upright(image: Image.Image) -> Image.Image:
    try:
        # exif_transpose copies even if there is nothing to rotate.
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    # Broken metadata is no reason to reject intact pixels.
    except Exception:
        return image


def _to_rgb(image: Image.Image, background: int) -> UInt8:
    if image.mode.startswith("I") or image.mode == "F":
        grey = _grey_to_uint8(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    result = np.empty((image.height, image.width, 3), np.uint8)
    # In bands, since Pillow's conversions and their NumPy arrays are copies.
    for rows in row_bands(image.height, image.width):
        result[rows] = _band_to_rgb(image.crop((0, rows.start, image.width, rows.stop)), background)
    return result


def _band_to_rgb(image: Image.Image, background: int) -> UInt8:
    # Pillow converts "La" to nothing else.
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (background, background, background, 255))
        image = Image.alpha_composite(canvas, rgba)
    return np.asarray(image.convert("RGB"), dtype=np.uint8)


def _grey_to_uint8(values: npt.NDArray[Any]) -> UInt8:
    """16-bit integers are scaled by 255/65535; floats in [0, 1] by 255, other floats must lie in [0, 255]."""
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.floating):
        limit = 1.0 if high <= 1 else 255.0
    else:
        limit = 65535.0
    if not (low >= 0 and high <= limit):
        raise ValueError(f"samples must lie in [0, {limit:g}], got {low:g} to {high:g}")
    result = np.empty(values.shape, np.uint8)
    for rows in row_bands(*values.shape):
        result[rows] = np.rint(values[rows] * (255.0 / limit))
    return result


def read_mask(
    path: PathLike, size: tuple[int, int] | None = None, *, invert: bool = False
) -> npt.NDArray[np.bool_]:
    """Decode a mask to bool [H,W]: True where it is white, that is, where the photo was edited.

    `size` is the (height, width) of the photo, which the mask must have. Samples are used as stored in the file and
    must be clearly two-valued: black and white, with grey at soft edges only. Labels such as 0 and 1, or a single
    colour, are an error (`frd_model.data.masks` states the rule). Transparent pixels count as black. A black file
    is the mask of an untouched photo.

    Raises:
        ImageError: the file cannot be read, has another size, or is not a mask; the message names its values.
    """
    name = os.fspath(path)

    def convert(image: Image.Image, raw_mode: str) -> npt.NDArray[np.bool_]:
        try:
            image = _upright(widen(image, raw_mode, path))
            if size is None or image.size[::-1] == tuple(size):
                return marked_pixels(image)
        except MaskError as error:
            raise ImageError.of("mask", f"mask {name!r} {error}") from None
        raise ImageError.of(
            "size",
            f"mask {name!r} must have its photo's size {size[1]} x {size[0]}, "
            f"got {image.width} x {image.height}",
        )

    mask = _decode(path, MAX_PIXELS, convert)
    return ~mask if invert else mask


def write_bytes(path: PathLike, data: bytes) -> Path:
    """Write a file atomically: a reader sees the old content or all of the new. Creates missing folders."""
    with replacing(path) as file:
        file.write(data)
    return Path(path)


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends without an error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not made from the target's name, which may already have the maximum length, nor from the process's number,
    # which is no number of its own on a disk that several machines share.
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            yield file
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_png(path: PathLike, array: npt.NDArray[Any]) -> Path:
    """Write bool or uint8 [H,W] (True becomes 255) or RGB uint8 [H,W,3] as PNG, atomically."""
    values = _checked(array)
    height, width = values.shape[:2]
    bands = (values[rows] for rows in row_bands(height, width))
    return write_png_bands(path, height, width, 1 if values.ndim == 2 else 3, bands)


def write_png_bands(path: PathLike, height: int, width: int, channels: int, bands: Iterable[Any]) -> Path:
    """`write_png` for an image given as bands of rows, which are never all in memory."""
    with replacing(path) as file:
        write_bands(file, height, width, channels, (_to_uint8(band) for band in bands))
    return Path(path)


def write_map(path: PathLike, probability: npt.NDArray[np.float32]) -> Path:
    """Write a probability map [H,W] as grey PNG of 16 bit, value = round(65535 p), atomically."""
    height, width = probability.shape
    bands = (np.rint(probability[rows] * 65535).astype(np.uint16) for rows in row_bands(height, width))
    with replacing(path) as file:
        write_bands(file, height, width, 1, bands, depth=16)
    return Path(path)


def write_npz(path: PathLike, **arrays: Any) -> Path:
    """Write arrays as compressed npz, atomically."""
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)
    return Path(path)


def write_jpeg(path: PathLike, array: npt.NDArray[Any], quality: int = 95) -> Path:
    """Write uint8 [H,W] or RGB [H,W,3] as JPEG, atomically."""
    values = _to_uint8(_checked(array))
    if values.ndim == 3:
        values = np.asarray(cv2.cvtColor(values, cv2.COLOR_RGB2BGR), np.uint8)
    done, data = cv2.imencode(".jpg", values, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"array must be encodable as .jpg, got shape {values.shape}")
    return write_bytes(path, data.tobytes())


def _checked(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    values = np.asarray(array)
    known = values.dtype in (np.bool_, np.uint8) and values.ndim == 2
    known |= values.dtype == np.uint8 and values.ndim == 3 and values.shape[2] == 3
    if not known or 0 in values.shape:
        raise ValueError(
            f"array must be uint8 or bool [H,W] or uint8 [H,W,3], got {values.dtype} {values.shape}"
        )
    return values


def _to_uint8(values: npt.NDArray[Any]) -> UInt8:
    return np.multiply(values, 255, dtype=np.uint8) if values.dtype == np.bool_ else values


def write_json(path: PathLike, value: Any) -> Path:
    """Write a JSON file (UTF-8, indented, strict: NaN is an error), atomically."""
    return write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def overlay(
    image: UInt8, probability: npt.NDArray[Any], strength: float = 0.6, colour_map: str = COLOUR_MAPS[0]
) -> UInt8:
    """Heat map of probability [H,W] in [0, 1] over RGB image [H,W,3].

    The photo is faded towards grey, and a colour of `colour_map` (viridis or cividis) is blended in with the
    probability, so that the edited region stays recognisable.
    """
    return np.concatenate(list(overlay_bands(image, probability, strength, colour_map)))


def overlay_bands(
    image: UInt8, probability: npt.NDArray[Any], strength: float = 0.6, colour_map: str = COLOUR_MAPS[0]
) -> Iterator[UInt8]:
    """`overlay` from the top in bands of rows [rows,W,3], in little more memory than one band."""
    if image.shape[:2] != probability.shape:
        raise ValueError(f"probability must have the image's size {image.shape[:2]}, got {probability.shape}")
    if colour_map not in COLOUR_MAPS:
        raise ValueError(f"colour_map must be one of {', '.join(COLOUR_MAPS)}, got {colour_map!r}")
    colours = getattr(cv2, f"COLORMAP_{colour_map.upper()}")
    bands = row_bands(*image.shape[:2])
    return (_overlay(image[band], probability[band], strength, colours) for band in bands)


def contour_bands(image: UInt8, mask: npt.NDArray[np.bool_]) -> Iterator[UInt8]:
    """RGB image [H,W,3] with the outline of mask [H,W] in yellow, cased in black, in bands of rows as `overlay_bands`.

    The line is about a five-hundredth of the photo's longer side wide. Where a marked region ends at the photo's
    border, so does the line.
    """
    height, width = mask.shape
    reach = max(1, round(max(height, width) / 1000))
    for band in row_bands(height, width):
        # Rows that the outline can reach from outside the band.
        top = max(0, band.start - 2 * reach)
        rows = mask[top : band.stop + 2 * reach].astype(np.uint8)
        shown = image[band].copy()
        for distance, colour in ((2 * reach, 0), (reach, (255, 230, 0))):
            kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
            inner = cv2.erode(rows, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
            line = cv2.dilate(rows, kernel) != inner
            shown[line[band.start - top :][: len(shown)]] = colour
        yield shown


def sheet(
    image: UInt8,
    probability: npt.NDArray[Any],
    mask: npt.NDArray[np.bool_],
    colour_map: str = COLOUR_MAPS[0],
    side: int = 1024,
) -> UInt8:
    """Photo, heat map and mask side by side with white between them, each at most `side` pixels high and wide."""
    small, heat, marked = (
        fit(part, side) for part in (image, probability, np.multiply(mask, 255, dtype=np.uint8))
    )
    gap = np.full((len(small), 8, 3), 255, np.uint8)
    white = np.repeat(marked[:, :, None], 3, axis=2)
    return np.hstack([small, gap, overlay(small, heat, colour_map=colour_map), gap, white])


def fit(values: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """An image or map [H,W(,3)] reduced by area averaging so that neither side exceeds `side` pixels."""
    height, width = values.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return values
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA), values.dtype)


def row_bands(height: int, width: int, pixels: int = 1 << 20) -> Iterator[slice]:
    """Slices that cover `height` rows; each has about `pixels` pixels and at least one row."""
    rows = max(1, pixels // max(1, width))
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _overlay(image: UInt8, probability: npt.NDArray[Any], strength: float, colours: int) -> UInt8:
    p = np.clip(np.nan_to_num(np.asarray(probability, np.float32)), 0, 1)
    ramp = cv2.cvtColor(
        cv2.applyColorMap(np.rint(p * 255).astype(np.uint8), colours),
        cv2.COLOR_BGR2RGB,
    )
    values = image.astype(np.float32)
    base = (values + values.mean(axis=2, keepdims=True)) * np.float32(0.5)
    weight = (np.float32(strength) * p)[:, :, None]
    return np.rint(base + (ramp - base) * weight).astype(np.uint8)
