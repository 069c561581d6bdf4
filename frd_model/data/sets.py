"""Data sets by name, "LAYOUT:PATH": the one way in which every command and configuration names them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .convert import CachedDataset
from .dataset import FolderDataset, JoinedDataset, JsonDataset, ManiDataset, PairDataset
from .files import expand_user
from .layouts import LAYOUTS, read_pair_list
from .pairing import DatasetError

# The layouts of own data; those of public data sets are in LAYOUTS.
FORMATS = {
    "mani": "folder with Tp (photos) and Gt (masks)",
    "json": 'JSON list of [image, mask or "Negative"]',
    "txt": "text list of lines image mask",
    "collection": 'JSON file {name: folder or list} or [["ManiDataset", folder], ["JsonDataset", list], ...]',
    "untouched": "folder of photos, all untouched",
    "cache": "decoded photos, written by `frd data convert`",
}


def parse_spec(spec: str) -> tuple[str, str, Path]:
    """Name, layout and path of "coverage=cover:data/COVERAGE". Without a name it is the layout's, of own data that of
    the folder or file.

    Raises:
        DatasetError: no known layout, or no path.
    """
    head, colon, path = spec.partition(":")
    name, equals, layout = head.rpartition("=")
    layout = layout.lower()
    if not colon or layout not in (LAYOUTS | FORMATS) or (equals and not name):
        known = ", ".join((*FORMATS, *LAYOUTS))
        raise DatasetError(f"data set {spec!r} must be [NAME=]LAYOUT:PATH with a layout of {known}")
    if not path:
        raise DatasetError(f"data set {spec!r} must name a path after the colon, got none")
    return name or (layout if layout in LAYOUTS else Path(path).stem), layout, expand_user(path)


def open_sets(
    specs: Iterable[str], *, invert_masks: bool = False, recursive: bool = False
) -> dict[str, PairDataset]:
    """The data sets that specifications name; a collection gives several.

    Args:
        specs: see `parse_spec`.
        invert_masks: the masks are the other way round than the layout has them (black where edited).
        recursive: the folders of "mani" are read with the folders inside them.

    Raises:
        DatasetError: a specification or a data set that cannot be used, or two sets of one name.
    """
    found: dict[str, PairDataset] = {}
    for spec in specs:
        name, layout, path = parse_spec(spec)
        if layout == "collection":
            opened = _open_collection(path, invert_masks)
        else:
            opened = {name: _open(layout, path, invert_masks, recursive)}
        for key, data in opened.items():
            if key in found:
                raise DatasetError(
                    f"data set {spec!r} must have a name of its own, got {key!r} twice; write NAME={spec}"
                )
            found[key] = data
    if not found:
        raise DatasetError("data sets must be at least one, got none")
    return found


def open_set(spec: str, *, invert_masks: bool = False, recursive: bool = False) -> PairDataset:
    """One data set; the sets of a collection are joined. See `open_sets`."""
    return join_sets(open_sets([spec], invert_masks=invert_masks, recursive=recursive))


def join_sets(sets: Mapping[str, PairDataset]) -> PairDataset:
    """Several data sets as one, in their order."""
    return next(iter(sets.values())) if len(sets) == 1 else JoinedDataset(sets)


def _open(layout: str, path: Path, invert: bool, recursive: bool) -> PairDataset:
    if layout == "mani":
        return ManiDataset(path, invert_masks=invert, recursive=recursive)
    if layout == "json":
        return JsonDataset(path, invert_masks=invert)
    if layout == "txt":
        return PairDataset(read_pair_list(path), invert_masks=invert)
    if layout == "untouched":
        return FolderDataset.untouched(path, recursive)
    if layout == "cache":
        return CachedDataset(path)
    public = LAYOUTS[layout]
    pairs = public.read(path)
    if not pairs:
        raise DatasetError(f"data set {str(path)!r} must hold photos in the layout {layout}, got none")
    masks = [pair.mask for pair in pairs if pair.mask is not None]
    if masks and not any(os.path.isfile(mask) for mask in masks):
        raise DatasetError(
            f"data set {str(path)!r} must hold masks in the layout {layout}, got none, not even {str(masks[0])!r}"
        )
    data = PairDataset(pairs, invert_masks=public.invert != invert, reader=public.read_mask)
    data.names = [_name_below(pair.image, path) for pair in pairs]
    return data


def _name_below(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name


def _open_collection(path: Path, invert: bool) -> dict[str, PairDataset]:
    """The two kinds of file that IMDL-BenCo has: sets by name to test on, and a list of sets to train on. Relative
    paths start at the file's folder."""
    try:
        # Lists in use have comments, in lines of their own.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        entries = json.loads("\n".join(line for line in lines if not line.lstrip().startswith("//")))
    except OSError as error:
        raise DatasetError(
            f"collection {str(path)!r} must be a readable file, got: {error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"collection {str(path)!r} must be JSON, got: {error}") from None
    if isinstance(entries, dict) and entries and all(isinstance(v, str) for v in entries.values()):
        return {name: _open_member(path, value, invert) for name, value in entries.items()}
    if isinstance(entries, list) and entries and all(_is_member(entry) for entry in entries):
        found: dict[str, PairDataset] = {}
        for kind, value in entries:
            name = Path(value).stem
            key = name if name not in found else f"{name} {len(found) + 1}"
            found[key] = _open_member(path, value, invert, kind)
        return found
    raise DatasetError(
        f"collection {str(path)!r} must be {{name: path}} or a list of [kind, path] with the kinds "
        f"{', '.join(_MEMBERS)}, got {entries!r:.200}"
    )


_MEMBERS: dict[str, Callable[..., PairDataset]] = {"ManiDataset": ManiDataset, "JsonDataset": JsonDataset}


def _is_member(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[0] in _MEMBERS and isinstance(entry[1], str)


def _open_member(path: Path, value: str, invert: bool, kind: str = "") -> PairDataset:
    place = path.parent / expand_user(value)
    kind = kind or ("ManiDataset" if place.is_dir() else "JsonDataset")
    try:
        return _MEMBERS[kind](place, invert_masks=invert)
    except DatasetError as error:
        raise DatasetError(f"collection {str(path)!r}, {value!r}: {error}") from None
