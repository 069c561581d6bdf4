"""The audit of data sets: what cannot be used, what looks wrong, and photos that training and test share."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .files import ImageError, describe_skipped
from .layouts import LAYOUTS

if TYPE_CHECKING:
    from .dataset import PairDataset

# Hamming distance of two 64-bit perceptual hashes up to which two photos are taken for versions of one.
NEAR = 6
# Kinds of findings, in the order of the table. Notes may be intended; a fault cannot be used or spoils a result.
FAULTS = ("missing", "unreadable", "size", "mask", "inverted", "duplicate", "shared", "near")
NOTES = ("black mask", "untouched twice", "skipped", "count")


class Finding(NamedTuple):
    """kind: one of FAULTS or NOTES; file: what it is about; text: one line that names it."""

    kind: str
    file: str
    text: str


@dataclass
class Audit:
    """What was found of one data set. untouched: photos without a mask, or with a black one."""

    photos: int
    untouched: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return [finding.text for finding in self.findings if finding.kind in FAULTS]

    @property
    def notes(self) -> list[str]:
        return [finding.text for finding in self.findings if finding.kind in NOTES]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers by kind, and every finding."""
        return {
            "photos": self.photos,
            "untouched": self.untouched,
            "counts": dict(Counter(finding.kind for finding in self.findings)),
            "findings": [finding._asdict() for finding in self.findings],
        }


class _Seen(NamedTuple):
    """What is remembered of a photo: the hash of its file, its perceptual hash (0 if not asked for), whether edited."""

    file: Path
    digest: bytes
    look: int
    edited: bool


def audit(
    data: PairDataset,
    *,
    layout: str = "",
    workers: int = 4,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> Audit:
    """Read every pair of a data set.

    Args:
        layout: a name of `LAYOUTS` whose known numbers of photos are compared.
        workers: threads that read files.
        progress: wraps the pairs as they are read, with their number; tqdm's form.
    """
    result, _ = _audit(data, layout, workers, progress, look=False)
    return result


def audit_against(
    sets: Mapping[str, PairDataset],
    tests: Mapping[str, PairDataset],
    *,
    layouts: Mapping[str, str] | None = None,
    workers: int = 4,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> dict[str, Audit]:
    """Audit training sets and test sets, and find the photos of the former that are also, as the same file or a
    similar one, among the latter. Photos are compared by a 64-bit perceptual hash (pHash of the library ImageHash).

    Raises:
        ValueError: ImageHash is not installed.
    """
    _phash()
    names = layouts or {}
    known: dict[str, list[_Seen]] = {}
    results: dict[str, Audit] = {}
    for name, data in (*tests.items(), *sets.items()):
        results[name], known[name] = _audit(data, names.get(name, ""), workers, progress, look=True)
    for name in sets:
        for test in tests:
            results[name].findings += _shared(known[name], known[test], test)
    return results


def _audit(
    data: PairDataset, layout: str, workers: int, progress: Any, *, look: bool
) -> tuple[Audit, list[_Seen]]:
    result = Audit(len(data), sum(pair.mask is None for pair in data.pairs))
    seen: dict[bytes, _Seen] = {}
    kept: list[_Seen] = []
    black: list[Path] = []
    twins: list[Path] = []
    pairs = _read(data, workers, look)
    for index, read in enumerate(progress(pairs, len(data)) if progress else pairs):
        if isinstance(read, Finding):
            result.findings.append(read)
            continue
        photo, share = read
        kept.append(photo)
        first = seen.setdefault(photo.digest, photo)
        if first is not photo:
            if photo.edited or first.edited:
                text = f"photo {str(photo.file)!r} must occur once, got the same file as {str(first.file)!r}"
                result.findings.append(Finding("duplicate", str(photo.file), text))
            else:
                twins.append(photo.file)
        mask = data.pairs[index].mask
        if mask is not None and not photo.edited:
            black.append(mask)
        elif mask is not None and share > 0.5:
            text = f"mask {str(mask)!r} must be white where edited, got {share:.0%} white (inverted?)"
            result.findings.append(Finding("inverted", str(mask), text))
    result.untouched += len(black)
    result.findings += _notes(data, black, twins, layout)
    return result, kept


def _read(data: PairDataset, workers: int, look: bool) -> Iterator[Finding | tuple[_Seen, float]]:
    """Every pair in order: its photo and the marked share of its mask, or why it cannot be used."""

    def read(index: int) -> Finding | tuple[_Seen, float]:
        pair = data.pairs[index]
        try:
            image, mask = data.load(index)
            digest = hashlib.sha256(pair.image.read_bytes()).digest()
        except (ValueError, OSError) as error:
            return _unusable(pair.image, pair.mask, error)
        hashed = _look(image) if look else 0
        return _Seen(pair.image, digest, hashed, bool(mask.any())), float(mask.mean())

    with ThreadPoolExecutor(max(1, workers)) as pool:
        # A few ahead, so that results do not pile up.
        numbers = iter(range(len(data)))
        waiting = [pool.submit(read, i) for i in islice(numbers, 4 * max(1, workers))]
        while waiting:
            done = waiting.pop(0)
            waiting += [pool.submit(read, i) for i in islice(numbers, 1)]
            yield done.result()


def _unusable(image: Path, mask: Path | None, error: Exception) -> Finding:
    text = " ".join(str(error).split())
    for file in (image, mask):
        if file is not None and not os.path.isfile(file):
            return Finding("missing", str(file), text)
    kind = error.kind if isinstance(error, ImageError) else "unreadable"
    about_mask = mask is not None and (kind != "unreadable" or repr(str(mask)) in text)
    return Finding(kind, str(mask if about_mask else image), text)


def _notes(data: PairDataset, black: list[Path], twins: list[Path], layout: str) -> Iterator[Finding]:
    for kind, files, what in (
        ("black mask", black, "black masks, whose photos count as untouched"),
        ("untouched twice", twins, "untouched photos that occur more than once"),
    ):
        if files:
            yield Finding(kind, str(files[0]), f"{len(files)} {what}, the first {str(files[0])!r}")
    if data.skipped:
        yield Finding("skipped", str(data.skipped[0].path), f"skipped {describe_skipped(data.skipped)}")
    if layout in LAYOUTS:
        forged = sum(pair.mask is not None for pair in data.pairs)
        untouched = len(data) - forged
        counts = LAYOUTS[layout].counts
        if counts and not any(forged == f and u in (None, untouched) for f, u in counts):
            known = " or ".join(f"{f} forged" + (f" and {u} untouched" if u else "") for f, u in counts)
            yield Finding(
                "count", "", f"{forged} forged and {untouched} untouched photos; known versions have {known}"
            )


def _phash() -> Any:
    try:
        from imagehash import phash
    except ImportError:
        raise ValueError(
            "near-duplicates need the package ImageHash, got none; pip install frd-kernels[audit]"
        ) from None
    return phash


def _look(image: npt.NDArray[np.uint8]) -> int:
    from PIL import Image

    bits = np.asarray(_phash()(Image.fromarray(image)).hash, np.bool_).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _shared(photos: list[_Seen], others: list[_Seen], name: str) -> Iterator[Finding]:
    """Photos that are the same file as, or look like, one of the set `name`."""
    if not others:
        return
    digests = {other.digest: other for other in others}
    looks = np.array([other.look for other in others], np.uint64)
    for photo in photos:
        twin = digests.get(photo.digest)
        if twin is not None:
            text = f"photo {str(photo.file)!r} must not be in {name}, got the same file as {str(twin.file)!r}"
            yield Finding("shared", str(photo.file), text)
            continue
        distances = _bit_counts(looks ^ np.uint64(photo.look))
        nearest = int(distances.argmin())
        if distances[nearest] <= NEAR:
            like = f"{str(others[nearest].file)!r} ({distances[nearest]} of 64 bits differ)"
            text = f"photo {str(photo.file)!r} must not be in {name}, got one that looks like {like}"
            yield Finding("near", str(photo.file), text)


_ONES = np.array([bin(value).count("1") for value in range(256)], np.uint8)


def _bit_counts(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """Number of ones [N] of values [N]; NumPy 1 has no function for that."""
    return np.asarray(_ONES[values.view(np.uint8)].reshape(-1, 8).sum(axis=1), np.intp)
