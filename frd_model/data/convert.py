"""Rewrites data sets: as two folders in IMDL-BenCo's layout, as a JSON list, or as a cache of decoded photos."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .dataset import PairDataset
from .files import expand_user
from .images import ImageError, read_mask, write_bytes, write_json, write_png
from .pairing import DatasetError, Pair
from .transforms import resize

Bool = npt.NDArray[np.bool_]
UInt8 = npt.NDArray[np.uint8]
KINDS = ("mani", "json", "cache")
INDEX = "index.json"


class Converted(NamedTuple):
    """written: photos; failed: one line for each pair that cannot be used and was left out."""

    written: int
    failed: list[str]


def convert(
    data: PairDataset,
    out: str | os.PathLike[str],
    kind: str = "mani",
    *,
    size: tuple[int, int] | None = None,
    longest: int | None = None,
    progress: Callable[[Iterable[int], int], Iterable[int]] | None = None,
) -> Converted:
    """Write every pair of a data set that can be used.

    Args:
        kind: "mani": out/Tp and out/Gt as PNG, untouched photos with a black mask; "json": the list out of the files
            where they are; "cache": out/NUMBER.npy, decoded photos and masks that the layout "cache" reads without
            decoding.
        size: (height, width) that every photo is resized to; longest: the longer side that larger photos are reduced
            to. Photos are averaged over areas, masks take the nearest pixel. Not for "json".
        progress: wraps the numbers of the pairs, with how many there are.

    Raises:
        ValueError: arguments that do not fit together; a folder out that holds photos of the data set, or of another
            one. OSError: out cannot be written.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if size is not None and longest is not None:
        raise ValueError("size and longest exclude each other, got both")
    if kind == "json" and (size or longest):
        raise ValueError("a JSON list names files as they are and has no size, got one")
    place = expand_user(out)
    _prepare(data, place, kind)
    failed: list[str] = []
    entries: list[Any] = []
    numbers: Iterable[int] = range(len(data))
    for index in progress(numbers, len(data)) if progress else numbers:
        try:
            image, mask = data.load(index)
            if kind == "json":
                _check_listed(data.pairs[index], mask)
        except (ValueError, OSError) as error:
            failed.append(" ".join(str(error).split()))
            if kind == "mani":
                for part in ("Tp", "Gt"):
                    (place / part / _mani_name(data, index)).unlink(missing_ok=True)
            continue
        image, mask = _resized(image, mask, size, longest)
        entries.append(_write(data, index, image, mask, place, kind))
    if kind == "json":
        write_json(place, entries)
    elif kind == "cache":
        write_json(place / INDEX, entries)
    return Converted(len(entries), failed)


def _prepare(data: PairDataset, place: Path, kind: str) -> None:
    """An earlier conversion of the same data in the folder may be replaced. Photos that would be read as part of the
    new set, or whose files are read while they are written, may not."""
    if kind == "json":
        return
    names = {_mani_name(data, index) for index in range(len(data))}
    for folder in (place,) if kind == "cache" else (place / "Tp", place / "Gt"):
        real = os.path.realpath(folder)
        sources = (file for pair in data.pairs for file in (pair.image, pair.mask) if file is not None)
        inside = next((file for file in sources if os.path.dirname(os.path.realpath(file)) == real), None)
        found = sorted(os.listdir(folder)) if kind == "mani" and folder.is_dir() else []
        other = next((name for name in found if name not in names and not name.startswith(".")), None)
        if inside is not None or other is not None:
            raise ValueError(
                f"out must hold no photos but those of an earlier conversion of the same data, got "
                f"{str(inside or folder / str(other))!r}; choose a new folder"
            )
    # Until the new index is written, the files do not belong to an earlier one.
    if kind == "cache":
        (place / INDEX).unlink(missing_ok=True)


def _mani_name(data: PairDataset, index: int) -> str:
    return f"{index:06d}_{data.pairs[index].image.stem}.png"


def _check_listed(pair: Pair, mask: Bool) -> None:
    """A list names mask files as they are: they must be white where edited."""
    if pair.mask is not None and not np.array_equal(read_mask(pair.mask), mask):
        raise ImageError(
            f"mask {str(pair.mask)!r} must be white where edited to be listed; convert to mani or cache"
        )


def _resized(
    image: UInt8, mask: Bool, size: tuple[int, int] | None, longest: int | None
) -> tuple[UInt8, Bool]:
    if longest is not None:
        height, width = mask.shape
        scale = longest / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale))) if scale < 1 else None
    return (image, mask) if size is None else resize(image, mask, size)


def _write(data: PairDataset, index: int, image: UInt8, mask: Bool, place: Path, kind: str) -> Any:
    """Writes one pair; returns its entry of the list or of the index."""
    pair = data.pairs[index]
    if kind == "json":
        folder = place.parent
        return [
            _relative(pair.image, folder),
            "Negative" if pair.mask is None else _relative(pair.mask, folder),
        ]
    if kind == "mani":
        name = _mani_name(data, index)
        write_png(place / "Tp" / name, image)
        write_png(place / "Gt" / name, mask)
        return name
    number = f"{index:06d}"
    height, width = mask.shape
    packed = np.packbits(mask) if mask.any() else np.zeros(0, np.uint8)
    _write_array(place / f"{number}.npy", np.concatenate([image.reshape(-1), packed]))
    return {
        "name": data.names[index],
        "size": [height, width],
        "mask": bool(mask.any()),
        "file": f"{number}.npy",
    }


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()


def _write_array(path: Path, values: UInt8) -> None:
    from io import BytesIO

    content = BytesIO()
    np.save(content, values)
    write_bytes(path, content.getvalue())


class CachedDataset(PairDataset):
    """A cache that `convert` has written: decoded photos and masks, read without decoding.

    Raises:
        DatasetError: no cache, or an index that names no file.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        folder = expand_user(root)
        try:
            self.entries = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            files = [folder / entry["file"] for entry in self.entries]
            names = [str(entry["name"]) for entry in self.entries]
            masked = [bool(entry["mask"]) for entry in self.entries]
            self._sizes = [(int(entry["size"][0]), int(entry["size"][1])) for entry in self.entries]
        except OSError as error:
            raise DatasetError(
                f"cache {str(folder)!r} must hold {INDEX}, got: {error.strerror}; `frd data convert` writes one"
            ) from None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DatasetError(
                f"cache {str(folder / INDEX)!r} must be as `frd data convert` writes it, got: {error!r}"
            ) from None
        super().__init__(
            [Pair(file, file if mask else None) for file, mask in zip(files, masked, strict=True)]
        )
        self.names = names

    def load(self, index: int) -> tuple[UInt8, Bool]:
        """See `PairDataset.load`."""
        file, (height, width) = self.pairs[index].image, self._sizes[index]
        pixels = height * width
        expected = 3 * pixels + (-(-pixels // 8) if self.pairs[index].mask is not None else 0)
        try:
            values = np.load(file)
        except (OSError, ValueError, EOFError) as error:
            raise ImageError(f"cached photo {str(file)!r} must be readable, got: {error}") from None
        if values.dtype != np.uint8 or values.shape != (expected,):
            got = f"{values.dtype} {list(values.shape)}"
            raise ImageError(f"cached photo {str(file)!r} must hold {expected} bytes, got {got}")
        image = values[: 3 * pixels].reshape(height, width, 3)
        mask = (
            np.unpackbits(values[3 * pixels :], count=pixels)
            if expected > 3 * pixels
            else np.zeros(pixels, np.uint8)
        )
        return image, mask.reshape(height, width).astype(np.bool_)

    def load_mask(self, index: int, size: tuple[int, int] | None = None) -> Bool | None:
        """See `PairDataset.load_mask`."""
        return None if self.pairs[index].mask is None else self.load(index)[1]
