"""Write PNG files in bands of rows, so that a large image is never in memory twice.

OpenCV encodes into memory, and Pillow first copies the image at four bytes per pixel.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_GREY, _RGB = 0, 2
_FILTER_SUB = 1


def write_bands(
    file: BinaryIO, height: int, width: int, channels: int, bands: Iterable[npt.NDArray[Any]], depth: int = 8
) -> None:
    """Write a PNG of bands [rows, W] (`channels` 1) or RGB [rows, W, 3] (3) that follow each other.

    They are uint8, or uint16 for a `depth` of 16.
    """
    file.write(b"\x89PNG\r\n\x1a\n")
    colour = {1: _GREY, 3: _RGB}[channels]
    _write_chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    # OpenCV's fast settings: run lengths of the differences between neighbours.
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)
    for band in bands:
        if data := deflate.compress(_filtered(band, channels * depth // 8)):
            _write_chunk(file, b"IDAT", data)
    _write_chunk(file, b"IDAT", deflate.flush())
    _write_chunk(file, b"IEND", b"")


def _filtered(band: npt.NDArray[Any], step: int) -> Any:
    """Each row as PNG stores it: the filter, then every byte less the one a pixel (`step` bytes) to its left."""
    samples = band.astype(">u2") if band.dtype == np.uint16 else band
    rows = np.ascontiguousarray(samples).view(np.uint8).reshape(len(band), -1)
    lines = np.empty((rows.shape[0], 1 + rows.shape[1]), np.uint8)
    lines[:, 0] = _FILTER_SUB
    lines[:, 1 : 1 + step] = rows[:, :step]
    np.subtract(rows[:, step:], rows[:, :-step], out=lines[:, 1 + step :])
    return lines


def _write_chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind)
    file.write(data)
    file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))
