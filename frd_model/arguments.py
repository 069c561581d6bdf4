"""What the commands share: values of flags, outputs that are checked before the work, lines that always print."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TextIO


def path(text: str) -> Path:
    """A flag's path, with ~ and ~user expanded however the flag is written (the shell leaves --out=~/x alone)."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or directory, got an empty text")
    return Path(os.path.expanduser(text))


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1], got {text!r}")
    return value


def tile_side(text: str) -> int:
    """The side of a tile in pixels."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 64:
        raise argparse.ArgumentTypeError(f"must be at least 64 pixels, in whole numbers, got {text!r}")
    return value


def check_output_folder(flag: str, folder: Path) -> None:
    """Make the folder where it is missing; ValueError where files cannot be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{flag} must be a directory that can be written, got {str(folder)!r}: {reason}"
        ) from None


def check_output_file(flag: str, file: Path, *, overwrite: bool) -> None:
    """ValueError where the file cannot be written, or is there already and `overwrite` was not given."""
    if os.path.lexists(file):
        if not file.is_file():
            raise ValueError(f"{flag} must be a regular file, got {str(file)!r}, which is something else")
        if not overwrite:
            raise ValueError(
                f"{flag} must be a new file, got {str(file)!r}, which exists; give --overwrite to replace it"
            )
    check_output_folder(f"the directory of {flag}", file.parent)


def one_line(error: BaseException) -> str:
    """An error's text in one line, with its type before it where the text alone may say little."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory: {text}".rstrip(": ")
    own = isinstance(error, (ValueError, OSError)) or type(error).__module__.startswith("frd_")
    return text if own and text else f"{type(error).__name__}: {text}".rstrip(": ")


def say(text: str, file: TextIO | None = None) -> None:
    """Print one line whatever it holds: what is not printable, or not in the stream's encoding, is escaped."""
    stream = sys.stdout if file is None else file
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
