"""Which mask belongs to which photo: by name in two folders, or by a JSON list."""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .files import ImageError, Skipped, describe_skipped, expand_user, scan_folder

_MASK_SUFFIX = re.compile(r"_(gt|mask)$", re.IGNORECASE)


class DatasetError(ValueError):
    """A data set whose files do not fit together; one line with the path, the rule and what came."""


class Pair(NamedTuple):
    """A photo file and its mask file, or None for an untouched photo."""

    image: Path
    mask: Path | None


class Pairing(NamedTuple):
    """Pairs in the order of the photos' names, and what the folders hold beside images."""

    pairs: list[Pair]
    skipped: list[Skipped]


def pair_by_name(images: Path, masks: Path, allow_authentic: bool, recursive: bool) -> Pairing:
    """Pair photos with masks of their name: NAME.* with NAME.*, NAME_gt.* or NAME_mask.*.

    Names are compared in Unicode's composed form (NFC), so that files copied from a system that decomposes
    accents still match. With `recursive` a name is the path below the folder.

    Raises:
        DatasetError: a folder is missing, two files have the same name, or a photo or mask has no partner.
    """
    photos, photos_skipped = _named_files(images, recursive, masks)
    found, masks_skipped = _named_files(masks, recursive, images)
    if not photos:
        entries = describe_skipped(photos_skipped) or "nothing"
        raise DatasetError(f"folder {str(images)!r} must hold at least one photo, got {entries}")
    if not found and any(entry.reason != "hidden entry" for entry in masks_skipped):
        raise DatasetError(
            f"folder {str(masks)!r} must hold masks, got only {describe_skipped(masks_skipped)}"
        )
    pairs = _match(photos, found)
    _refuse_other_masks(pairs, photos, masks_skipped, masks)
    _refuse_lone_files(pairs, photos, found, masks if not allow_authentic else None, images)
    return Pairing([Pair(photos[key], pairs.get(key)) for key in photos], [*photos_skipped, *masks_skipped])


def _named_files(folder: Path, recursive: bool, other: Path) -> tuple[dict[str, Path], list[Skipped]]:
    """The images of `folder` by key. If the `other` folder is inside, it is ignored."""
    if not os.path.isdir(folder):
        raise DatasetError(f"folder {str(folder)!r} must be a directory, got none there")
    inside = os.path.isdir(other) and folder.resolve() in other.resolve().parents
    try:
        scan = scan_folder(folder, recursive, other if inside else None)
    except ImageError as error:
        raise DatasetError(str(error)) from None
    files: dict[str, Path] = {}
    for file in scan.images:
        first = files.setdefault(_key(file, folder), file)
        if first != file:
            raise DatasetError(
                f"file {str(file)!r} must have a name of its own, got {first.name!r} beside it "
                "(the same but for its extension or Unicode form)"
            )
    skipped = [s for s in scan.skipped if not (inside and s.path.resolve() == other.resolve())]
    return files, skipped


def _key(file: Path, folder: Path) -> str:
    name = file.relative_to(folder).with_suffix("").as_posix()
    # From the bytes on disk, which a process in another locale would not decode as UTF-8.
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


def _match(photos: dict[str, Path], masks: dict[str, Path]) -> dict[str, Path]:
    """Mask file by photo key: the mask of exactly that name, otherwise the one with a suffix."""
    pairs = {key: masks[key] for key in photos if key in masks}
    for key, file in masks.items():
        base = _MASK_SUFFIX.sub("", key)
        if base == key or key in photos or base not in photos:
            continue
        if base in pairs:
            raise DatasetError(
                f"photo {str(photos[base])!r} must have one mask, got {pairs[base].name!r} and {file.name!r}"
            )
        pairs[base] = file
    return pairs


def _refuse_other_masks(
    pairs: dict[str, Path], photos: dict[str, Path], skipped: list[Skipped], masks: Path
) -> None:
    """DatasetError for a mask in a file that is not an image: its photo would count as untouched."""
    for entry in skipped:
        key = _key(entry.path, masks)
        lone = {key, _MASK_SUFFIX.sub("", key)} & photos.keys() - pairs.keys()
        if lone and os.path.isfile(entry.path):
            raise DatasetError(
                f"mask {str(entry.path)!r} must be an image, got a {entry.reason} "
                "(move it elsewhere if it is not a mask)"
            )


def _refuse_lone_files(
    pairs: dict[str, Path],
    photos: dict[str, Path],
    masks: dict[str, Path],
    required: Path | None,
    images: Path,
) -> None:
    used = set(pairs.values())
    lone_masks = {key: file for key, file in masks.items() if file not in used}
    lone_photos = {key: file for key, file in photos.items() if key not in pairs}
    if lone_photos and required is not None:
        raise DatasetError(
            _lone(lone_photos, "photo", f"have a mask of its name in {str(required)!r}", lone_masks)
        )
    if lone_masks:
        raise DatasetError(_lone(lone_masks, "mask", f"belong to a photo in {str(images)!r}", lone_photos))


def _lone(files: dict[str, Path], kind: str, rule: str, others: dict[str, Path]) -> str:
    key, file = next(iter(files.items()))
    more = f", nor have {len(files) - 1} more {kind}s" if len(files) > 1 else ""
    return f"{kind} {str(file)!r} must {rule}, got none{closest_name(key, others)}{more}"


def closest_name(key: str, others: dict[str, Path]) -> str:
    """How the most similar of the other names differs, as the end of a message; "" if none is similar."""
    name = _MASK_SUFFIX.sub("", key)
    plain = {other: _MASK_SUFFIX.sub("", other) for other in others}
    for what, simplify in _SIMPLER:
        for other, base in plain.items():
            if simplify(base) == simplify(name) != "":
                return _difference(name, base, other, others[other], f" in {what}")
    for close in difflib.get_close_matches(name, plain.values(), n=1):
        other = next(o for o, base in plain.items() if base == close)
        return _difference(name, close, other, others[other], "")
    return ""


def _without_spaces(text: str) -> str:
    return "".join(text.split()).casefold()


def _letters(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


# Ways in which two names may differ, and the form of a name that ignores it, smallest difference first.
_SIMPLER: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("letter case", str.casefold),
    ("spaces", _without_spaces),
    ("signs", _letters),
)


def _difference(name: str, base: str, other: str, file: Path, what: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(name, base, strict=False)) if a != b), None)
    place = min(len(name), len(base)) if place is None else place
    shown = (PurePosixPath(other).parent / file.name).as_posix()
    characters = f"{_character(name, place)} against {_character(base, place)}"
    return f" (the closest, {shown!r}, differs{what}: {characters} at character {place + 1})"


def _character(text: str, place: int) -> str:
    return f"{text[place]!r} (U+{ord(text[place]):04X})" if place < len(text) else "the end"


def read_list(path: Path) -> tuple[list[Pair], dict[Path, str]]:
    """The pairs of a JSON list [[image, mask or "Negative"], ...], and a message for each missing file.

    Relative paths start at the list's folder.

    Raises:
        DatasetError: not a readable JSON list of pairs, or no pair whose files exist.
    """
    try:
        # Windows editors write a byte order mark first.
        entries: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"list {str(path)!r} must be a readable file, got: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"list {str(path)!r} must be JSON, got: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"list {str(path)!r} must hold a JSON list of pairs, got {type(entries).__name__}")
    pairs = []
    missing: dict[Path, str] = {}
    for number, entry in enumerate(entries):
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
            raise DatasetError(
                f'list {str(path)!r} entry {number} must be [image, mask or "Negative"], got {entry!r:.200}'
            )
        files = [_listed(path, number, name, missing) for name in entry if name != "Negative"]
        if not files or entry[0] == "Negative":
            raise DatasetError(f"list {str(path)!r} entry {number} must name an image, got {entry!r:.200}")
        pairs.append(Pair(files[0], files[1] if len(files) > 1 else None))
    # For example paths of another folder or machine.
    if all(missing.keys() & set(pair) for pair in pairs):
        raise DatasetError(next(iter(missing.values())))
    return pairs, missing


def _listed(path: Path, number: int, name: str, missing: dict[Path, str]) -> Path:
    """The file that entry `number` of the list names, in whichever Unicode form its name has on disk."""
    file = path.parent / expand_user(name)
    forms: Iterable[Path] = (file, *(Path(unicodedata.normalize(f, str(file))) for f in ("NFC", "NFD")))
    for form in forms:
        if os.path.isfile(form):
            return form
    beside: dict[str, Path] = {}
    if os.path.isdir(file.parent):
        beside = {unicodedata.normalize("NFC", f.name): f for f in file.parent.iterdir() if f.is_file()}
    closest = closest_name(unicodedata.normalize("NFC", file.name), beside)
    missing[file] = f"list {str(path)!r} entry {number} must name files, got {str(file)!r}{closest}"
    return file
