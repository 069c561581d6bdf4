"""Where an image file's data ends: bytes behind the end belong to no image that a viewer shows."""

from __future__ import annotations

import re
from typing import Any

# After an entropy-coded scan: any marker but a restart; FF 00 is a data byte.
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SOI, _EOI = 0xD8, 0xD9


def trailing_bytes(data: bytes, format_name: str) -> dict[str, Any] | None:
    """The number of bytes after the end of a JPEG, PNG or WebP image, and what they start with. None if unknown."""
    ends = {"JPEG": _jpeg_end, "MPO": _jpeg_end, "PNG": _png_end, "WEBP": _webp_end}
    if format_name not in ends:
        return None
    end = ends[format_name](data)
    if end is None:
        return None
    start = data[end : end + 16]
    return {
        "count": max(0, len(data) - end),
        "start": start.hex(" "),
        "looks_like": _kind(start),
    }


def _jpeg_end(data: bytes) -> int | None:
    """The offset after the first EOI marker."""
    at = 2
    while at + 4 <= len(data):
        found = _NEXT_MARKER.search(data, at)
        if found is None:
            return None
        marker, at = data[found.start() + 1], found.end()
        if marker == _EOI:
            return at
        # 01 and a further SOI have no length.
        if marker not in (0x01, _SOI):
            at += int.from_bytes(data[at : at + 2], "big")
    return None


def _png_end(data: bytes) -> int | None:
    at = 8
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        at += 12 + length
        if kind == b"IEND":
            return at
    return None


def _webp_end(data: bytes) -> int | None:
    size = int.from_bytes(data[4:8], "little")
    # A chunk of odd length is followed by one byte of padding.
    return 8 + size + size % 2


def _kind(start: bytes) -> str | None:
    if start[4:8] == b"ftyp":
        return "video or HEIF"
    signatures = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"PK\x03\x04": "ZIP", b"%PDF": "PDF"}
    return next((name for signature, name in signatures.items() if start.startswith(signature)), None)
