"""Probability maps that any method saved: found by the photo's name, read and checked."""

from __future__ import annotations

import os
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from frd_model.data.files import ImageError, PathLike, expand_user
from frd_model.data.images import MAX_PIXELS
from frd_model.results import KINDS, record_of

SUFFIXES = (".png", ".npy", ".npz")
# Full scale of each kind of sample; floats are probabilities as they are.
_WHITES = {np.dtype(np.bool_): 1, np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


class MapError(ValueError):
    """A map that is missing or cannot be scored; one line with the file, the rule and what came."""


class SavedMap(NamedTuple):
    """probability [H, W] float32 in [0, 1]; score in [0, 1], or None where the file holds none."""

    probability: npt.NDArray[np.float32]
    score: float | None


class SavedMaps:
    """The maps below a folder: PNG of 8 or 16 bit, npy, or npz with TruFor's keys (map, score, imgsize).

    A map is named after its photo, with or without the photo's suffix: `x.png` or `x.jpg.npz` for `x.jpg`. Of several
    the one at the photo's own place in its set counts, else the one that shares most folders with the photo's
    path. Each map serves one photo. `others` counts files of other kinds. In a folder of `frd predict` the maps are
    those of --save npz or map, found by the photo's path in the record beside them.

    Raises MapError for a folder that is not there or holds no map.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = expand_user(folder)
        self.others = 0
        self._by_name: dict[str, list[tuple[tuple[str, ...], Path]]] = {}
        self._used: dict[Path, str] = {}
        self._highest: tuple[float, Path | None] = (0.0, None)
        if not self.folder.is_dir():
            raise MapError(f"predictions must be a folder of maps, got {str(self.folder)!r}, which is none")
        for file in _files_below(self.folder):
            record = record_of(file)
            if record is not None and not _is_map(file):
                continue
            if file.suffix.lower() in SUFFIXES:
                photo = (
                    file.relative_to(self.folder).with_suffix("") if record is None else Path(record["path"])
                )
                parents, name = _split(photo)
                self._by_name.setdefault(name, []).append((parents, file))
            else:
                self.others += 1
        if not self._by_name:
            kinds = ", ".join(SUFFIXES)
            raise MapError(f"predictions must hold maps ({kinds}), got none in {str(self.folder)!r}")

    def unused(self) -> list[Path]:
        """Maps that no photo has asked for."""
        files = [file for entries in self._by_name.values() for _, file in entries]
        return sorted(set(files) - self._used.keys())

    def too_dark(self) -> str:
        """One line where no PNG read so far reaches above 1 / 255, as labels 0 and 1 do; "" otherwise."""
        highest, file = self._highest
        if file is None or highest > 1.001 / 255:
            return ""
        return (
            f"no map reaches above 1 / 255 of its full scale, not {str(file)!r} either: labels 0 and 1, or 8-bit "
            "samples in 16-bit files?"
        )

    def find(self, name: str, path: PathLike | None = None) -> Path:
        """The map of the photo `name` in its set, at `path`. Raises MapError for none, several, or one used before."""
        inside, photo = _split(PurePosixPath(name))
        full, _ = _split(Path(path or name))
        found: dict[int, list[Path]] = {}
        for key in dict.fromkeys((photo, PurePosixPath(photo).stem)):
            for parents, file in self._by_name.get(key, ()):
                if parents == inside:
                    found.setdefault(len(full) + 1, []).append(file)
                elif _ends(full, parents):
                    found.setdefault(len(parents), []).append(file)
                elif _ends(parents, inside):
                    found.setdefault(-1, []).append(file)
        if not found:
            raise MapError(f"photo {name!r} must have a map in {str(self.folder)!r}, got none of that name")
        best = found[max(found)]
        if len(best) > 1:
            raise MapError(f"photo {name!r} must have one map, got {str(best[0])!r} and {str(best[1])!r}")
        if best[0] in self._used:
            other = self._used[best[0]]
            raise MapError(f"map {str(best[0])!r} must belong to one photo, got {other!r} and {name!r}")
        self._used[best[0]] = name
        return best[0]

    def load(self, name: str, path: PathLike | None, size: tuple[int, int]) -> SavedMap:
        """The map of a photo of `size` (H, W), at the size it was saved in. Raises MapError: see `find`, `read_map`."""
        file = self.find(name, path)
        saved = read_map(file, size)
        highest = float(saved.probability.max())
        if file.suffix.lower() == ".png" and highest > self._highest[0]:
            self._highest = (highest, file)
        return saved


def read_map(path: PathLike, size: tuple[int, int] | None = None) -> SavedMap:
    """A map of any of the kinds, as probabilities; `size` (H, W) of its photo is held against what the file says.

    Integers count by the full scale of their kind (255, 65535). Raises MapError for NaN, values outside [0, 1],
    colours, other shapes, and a map that lies on its side or was made of a photo of another size.
    """
    file = Path(path)
    try:
        values, score, made_of = _read(file)
        probability = _probabilities(values)
        if score is not None and not 0 <= score <= 1:
            raise ValueError(f"score must lie in [0, 1], got {score:g}")
        if size is not None:
            _check_size(probability.shape, made_of, size)
    except MemoryError:
        raise MapError(f"map {str(file)!r} must fit into memory, got out of memory") from None
    # readers raise anything on a damaged file
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MapError(f"map {str(file)!r}: {reason}") from None
    return SavedMap(probability, score)


def _read(file: Path) -> tuple[npt.NDArray[Any], float | None, tuple[int, ...] | None]:
    """Samples, score and (H, W) of the photo, the last two where the file has them."""
    suffix = file.suffix.lower()
    if suffix == ".png":
        return _read_png(file), None, None
    if suffix == ".npy":
        return np.load(file, allow_pickle=False), None, None
    if suffix != ".npz":
        raise ValueError(f"must be one of {', '.join(SUFFIXES)}, got {suffix!r}")
    if not zipfile.is_zipfile(file):
        raise ValueError("must be an npz archive, got another kind of file")
    with np.load(file, allow_pickle=False) as archive:
        if "map" not in archive:
            keys = ", ".join(archive.files) or "none"
            raise ValueError(f"must hold the key map, got {keys}")
        score = float(archive["score"].item()) if "score" in archive else None
        if score is not None and np.isnan(score):
            raise ValueError("score must lie in [0, 1], got NaN")
        made_of = tuple(int(n) for n in archive["imgsize"].reshape(-1)) if "imgsize" in archive else None
        return archive["map"], score, made_of


def _read_png(file: Path) -> npt.NDArray[Any]:
    with Image.open(file, formats=["PNG"]) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"must have at most {MAX_PIXELS} pixels, got {image.width} x {image.height}")
        mode = image.mode
        image.load()
        if mode.startswith("I"):
            return np.asarray(image).astype(np.uint16)
        if mode in ("1", "L"):
            return np.asarray(image.convert("L"))
        colours = np.asarray(image.convert("RGBA"))
    grey = colours[:, :, 0]
    if (colours[:, :, :3] != grey[:, :, None]).any() or (colours[:, :, 3] != 255).any():
        raise ValueError(f"must be grey, got colours or transparency (mode {mode})")
    return grey


def _probabilities(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim != 2 or not values.size:
        raise ValueError(f"must have shape [H, W], got {list(values.shape)}")
    if values.dtype in _WHITES:
        white = np.float32(_WHITES[values.dtype])
        return np.asarray(values.astype(np.float32) / white)
    if values.dtype.kind != "f":
        raise ValueError(f"must hold floats, bool, uint8 or uint16, got {values.dtype}")
    missing = int(np.isnan(values).sum())
    if missing:
        raise ValueError(f"must hold no NaN, got {missing} of them")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"must hold probabilities in [0, 1], got {low:g} to {high:g} (logits, or 0 to 255 as floats?)"
        )
    return np.ascontiguousarray(values, np.float32)


def _check_size(shape: tuple[int, ...], made_of: tuple[int, ...] | None, size: tuple[int, int]) -> None:
    if made_of is not None and made_of[-2:] != size:
        raise ValueError(f"imgsize must be its photo's (height, width) {size}, got {made_of}")
    if shape != size and shape == size[::-1]:
        raise ValueError(
            f"must not lie on its side: the photo is {size[1]} x {size[0]}, got {shape[1]} x {shape[0]}"
        )


def _files_below(folder: Path) -> Iterator[Path]:
    """All but hidden files, by way of links to folders too, each folder once."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _is_map(file: Path) -> bool:
    """Of the results of `frd predict`: npz, which holds the score too, goes before PNG."""
    if file.name.endswith(KINDS["map"]):
        return not file.with_suffix(".npz").exists()
    return file.name.endswith(KINDS["npz"])


def _split(path: Path | PurePosixPath) -> tuple[tuple[str, ...], str]:
    """Folders and name, in Unicode's composed form: names of one system that decomposes accents still match."""
    *parents, name = (unicodedata.normalize("NFC", part) for part in path.parts)
    return tuple(parents), name


def _ends(whole: tuple[str, ...], end: tuple[str, ...]) -> bool:
    return len(end) <= len(whole) and whole[len(whole) - len(end) :] == end
