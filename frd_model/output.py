"""Checks of outputs before the work starts, and one-line messages that print on any terminal."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TextIO


def check_output_folder(flag: str, folder: Path) -> None:
    """Create the folder if it is missing; ValueError if files cannot be written into it."""
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
    """ValueError if the file cannot be written, or exists and `overwrite` is False."""
    if os.path.lexists(file):
        if not file.is_file():
            raise ValueError(f"{flag} must be a regular file, got {str(file)!r}, which is something else")
        if not overwrite:
            raise ValueError(
                f"{flag} must be a new file, got {str(file)!r}, which exists; give --overwrite to replace it"
            )
    check_output_folder(f"the directory of {flag}", file.parent)


def one_line(error: BaseException) -> str:
    """An error's text in one line, after the name of its type if the text alone may say little."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory: {text}".rstrip(": ")
    own = isinstance(error, (ValueError, OSError)) or type(error).__module__.startswith("frd_")
    return text if own and text else f"{type(error).__name__}: {text}".rstrip(": ")


def printable(text: str) -> str:
    """`text` with its characters escaped that are not printable, such as line ends and changes of direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def say(text: str, file: TextIO | None = None) -> None:
    """Print one line, with characters escaped that are not printable or not in the stream's encoding."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
