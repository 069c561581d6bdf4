"""Find image files: which formats count, and which entries of a folder are skipped."""

from __future__ import annotations

import glob
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image, ImageFile

PathLike = str | os.PathLike[str]

# Not photos, though Pillow opens them: a page description that Ghostscript would have to run, and a video's header.
_NO_PHOTOS = {"EPS", "MPEG"}
_HEIF_EXTENSIONS = (".heic", ".heif", ".hif", ".heics", ".heifs")
# Pillow makes an object of each strip or tile of a TIFF when it opens the file.
MAX_STRIPS = 1 << 20
_STRIP_TAGS = {273, 279, 324, 325}


class ImageError(ValueError):
    """A file that cannot be used as an image. The message is one line: path, rule, and what was found.

    kind: "size" for a mask of another size than its photo, "mask" for an image that is no mask, else "unreadable".
    """

    kind = "unreadable"

    @classmethod
    def of(cls, kind: str, text: str) -> ImageError:
        """An error of another kind."""
        error = cls(text)
        error.kind = kind
        return error


class Skipped(NamedTuple):
    """An entry of a folder that was skipped, and the reason."""

    path: Path
    reason: str


class Found(NamedTuple):
    """The image files that paths name, sorted, and the skipped entries of their folders."""

    images: list[Path]
    skipped: list[Skipped]


@lru_cache(maxsize=1)
def image_extensions() -> frozenset[str]:
    """Lower-case extensions of the formats of `photo_formats`."""
    formats = photo_formats()
    extensions = Image.registered_extensions().items()
    return frozenset(extension.lower() for extension, name in extensions if name in formats)


@lru_cache(maxsize=1)
def photo_formats() -> tuple[str, ...]:
    """Pillow's names of the raster formats that the installed Pillow opens, for the `formats` of `Image.open`.

    HEIC and related formats are included if pillow-heif is installed (`pip install frd-kernels[heif]`).
    """
    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in Image.ID if _opens(name))


def _opens(name: str) -> bool:
    if name not in Image.OPEN or name in _NO_PHOTOS:
        return False
    factory = Image.OPEN[name][0]
    # A stub only recognizes its format; decoding needs a handler that is not installed.
    return not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))


def name_bytes(text: str) -> bytes:
    """A file name's bytes, for hashes: those on disk, also of a name that no file can have, as a list may hold one."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


def real_path(path: PathLike) -> str:
    """os.path.realpath, and the name itself where no file can have it, as in a list."""
    try:
        return os.path.realpath(os.fspath(path))
    except ValueError:
        return os.fspath(path)


def expand_user(path: PathLike) -> Path:
    """`path` with a leading ~ or ~user replaced by that home directory, unless a file has that very name.

    Raises:
        ImageError: an empty text (such as an unset shell variable), which pathlib would read as the working directory.
    """
    name = os.fspath(path)
    if not name:
        raise ImageError("path must name a file or directory, got an empty text")
    return Path(name if os.path.lexists(name) else os.path.expanduser(name))


def find_images(paths: PathLike | Iterable[PathLike], recursive: bool = False) -> list[Path]:
    """Image files named by files, directories and glob patterns; sorted, each file once.

    Sub-directories are read only if `recursive`. A plain file name is returned unchanged, whatever its extension and
    even if it does not exist, so that reading it reports the error and the rest of a batch is still done.
    `scan_images` also returns what was skipped.

    Raises:
        ImageError: a directory holds no image or cannot be listed, a pattern matches none, or no path was
        given.
    """
    return scan_images(paths, recursive).images


def scan_images(paths: PathLike | Iterable[PathLike], recursive: bool = False) -> Found:
    """`find_images`, and the skipped entries of directories and patterns. Raises as `find_images` does."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found: dict[str, Path] = {}
    skipped: dict[Path, Skipped] = {}
    given = 0
    for path in paths:
        given += 1
        part = _expand(path, recursive)
        skipped |= {entry.path: entry for entry in part.skipped}
        for file in part.images:
            first = found.setdefault(os.path.realpath(file), file)
            if os.path.abspath(first) != os.path.abspath(file):
                skipped[file] = Skipped(file, "second name of a file")
    if not given:
        raise ImageError("paths must name at least one file, directory or pattern, got none")
    return Found(sorted(found.values()), sorted(skipped.values()))


def scan_folder(folder: PathLike, recursive: bool = False, leave_out: PathLike | None = None) -> Found:
    """The images of one directory, each link to the same file separately, and its skipped entries.

    `leave_out` is a directory inside it to ignore.

    Raises:
        ImageError: the directory cannot be listed.
    """
    seen = set() if leave_out is None else {_identity(leave_out)}
    return _split(_walk(Path(folder), recursive, seen))


def describe_skipped(skipped: Iterable[Skipped], names: int = 3) -> str:
    """One line that counts entries by reason and names the first `names` of each; "" for none."""
    groups: dict[str, list[str]] = {}
    for entry in skipped:
        groups.setdefault(entry.reason, []).append(repr(str(entry.path)))
    parts = []
    for reason, found in groups.items():
        more = f", and {len(found) - names} more" if len(found) > names else ""
        parts.append(f"{len(found)} x {reason} ({', '.join(found[:names])}{more})")
    return "; ".join(parts)


def _expand(path: PathLike, recursive: bool) -> Found:
    name = str(expand_user(path))
    if os.path.isdir(name):
        kind, found = "directory", scan_folder(name, recursive)
    elif not os.path.lexists(name) and glob.has_magic(name):
        kind, found = (
            "pattern",
            _split(_classify(map(Path, glob.glob(name, recursive=True)), recursive, set())),
        )
    else:
        return Found([Path(name)], [])
    if not found.images:
        entries = describe_skipped(found.skipped) or "nothing"
        raise ImageError(f"{kind} {name!r} must hold at least one image, got {entries}")
    return found


def _split(entries: Iterator[Path | Skipped]) -> Found:
    images, skipped = [], []
    for entry in entries:
        if isinstance(entry, Skipped):
            skipped.append(entry)
        else:
            images.append(entry)
    return Found(sorted(images), sorted(skipped))


def _walk(folder: Path, recursive: bool, seen: set[tuple[int, int]]) -> Iterator[Path | Skipped]:
    try:
        seen.add(_identity(folder))
        entries = sorted(folder / name for name in os.listdir(folder))
    except OSError as error:
        raise ImageError(f"directory {str(folder)!r} must be readable, got: {error.strerror}") from None
    yield from _classify(entries, recursive, seen)


def _classify(
    entries: Iterable[Path], recursive: bool, seen: set[tuple[int, int]]
) -> Iterator[Path | Skipped]:
    """Each entry as an image or as skipped. `seen` are the directories already read, since links may form cycles."""
    for entry in entries:
        reason = _skip_reason(entry)
        if reason is None:
            yield entry
        elif reason == "directory" and recursive:
            try:
                if _identity(entry) not in seen:
                    yield from _walk(entry, recursive, seen)
            except (ImageError, OSError):
                yield Skipped(entry, "unreadable directory")
        elif reason == "directory":
            yield Skipped(entry, "directory, read only with --recursive")
        else:
            yield Skipped(entry, reason)


def _skip_reason(entry: Path) -> str | None:
    """None for an image, or the reason to skip. A broken link counts as an image: reading it reports the error."""
    if entry.name.startswith("."):
        return "hidden entry"
    try:
        mode = entry.stat().st_mode
    except OSError:
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        return "directory"
    if entry.suffix.lower() not in image_extensions():
        if entry.suffix.lower() in _HEIF_EXTENSIONS:
            return "HEIF file, which needs `pip install pillow-heif`"
        return "file of no image format"
    return None if stat.S_ISREG(mode) else "device, pipe or socket"


def _identity(folder: PathLike) -> tuple[int, int]:
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def check_strips(path: PathLike, file: BinaryIO) -> None:
    """ImageError for a TIFF of more strips or tiles than any photo has; other files pass. The position is kept."""
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order and len(head) == 16 and struct.unpack(f"{order}H", head[2:4])[0] in (42, 43):
        big = struct.unpack(f"{order}H", head[2:4])[0] == 43
        start, count, entry = ("Q", "Q", "HHQQ") if big else ("I", "H", "HHII")
        size = struct.calcsize(f"{order}{entry}")
        file.seek(struct.unpack_from(f"{order}{start}", head, 8 if big else 4)[0])
        length = file.read(struct.calcsize(f"{order}{count}"))
        entries = b""
        if len(length) == struct.calcsize(f"{order}{count}"):
            entries = file.read(size * min(65535, struct.unpack(f"{order}{count}", length)[0]))
        for tag, _, number, _ in struct.iter_unpack(
            f"{order}{entry}", entries[: len(entries) // size * size]
        ):
            if tag in _STRIP_TAGS and number > MAX_STRIPS:
                raise ImageError(
                    f"image {os.fspath(path)!r} must have at most {MAX_STRIPS} strips, got {number}"
                )
    file.seek(0)
