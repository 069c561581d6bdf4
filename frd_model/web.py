"""What stands behind the page of `frd web`: photos are examined one at a time, within limits, and results are kept."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from frd_model.data.images import ImageError, fit, overlay, read_image
from frd_model.predict import Prediction, predict
from frd_model.provenance import provenance
from frd_model.report import highest
from frd_model.results import Job, save_prediction
from frd_model.score import NO_TRACE
from frd_model.tiling import TILE

UInt8 = npt.NDArray[np.uint8]

# Longest side, in pixels, of the images on the page.
SIDE = 1024
# Bytes of the results that are kept for the slider and the download; the oldest one goes.
KEPT_BYTES = 2 << 30


GONE = "This result is no longer kept: give the photo again."


class LimitError(ValueError):
    """A photo that the page refuses, or a result that it no longer has."""


@dataclass(frozen=True)
class Limits:
    """Bytes and pixels of a photo, and seconds for it, which the time in the queue does not count into."""

    file_bytes: int
    pixels: int
    seconds: float


class Result:
    """One photo's result: a copy of the photo, and arrays that are mapped from files beside it.

    Attributes:
        photo: the copy, in a folder of its own.
        found: the prediction, without a mask, which is made anew for each threshold.
        provenance: what `frd_model.provenance.provenance` says of the file.
        bytes: of all these files.
    """

    def __init__(self, photo: Path, pixels: UInt8, found: Prediction, provenance: dict[str, Any]) -> None:
        self.photo, self.provenance = photo, provenance
        folder = Path(tempfile.mkdtemp(dir=photo.parent))
        self._small = _on_disk(folder / "small.npy", fit(pixels, SIDE))
        self._heat = _on_disk(folder / "heat.npy", fit(found.probability, SIDE))
        self._highest = _on_disk(folder / "highest.npy", highest(found.probability, self._small.shape[:2]))
        probability = _on_disk(folder / "probability.npy", found.probability)
        self.found = replace(found, probability=probability, mask=np.zeros((0, 0), bool))
        self.bytes = sum(file.stat().st_size for file in (photo, *folder.iterdir()))

    def at(self, threshold: float, raw: bool) -> Prediction:
        """The prediction with the mask of another threshold; `raw` as in `predict`."""
        mask = self.found.probability > threshold
        if self.emptied(raw):
            mask[:] = False
        return replace(self.found, mask=mask, threshold=threshold)

    def heat_map(self, raw: bool) -> UInt8:
        """[h, w, 3], at most SIDE pixels high and wide."""
        heat = np.zeros_like(self._heat) if self.emptied(raw) else self._heat
        return overlay(self._small, heat)

    def mask(self, threshold: float, raw: bool) -> UInt8:
        """[h, w], 255 where any pixel of the photo under it is marked, so that no small region is lost."""
        marked = (self._highest > threshold) & (not self.emptied(raw))
        return np.multiply(marked, 255, dtype=np.uint8)

    @property
    def small(self) -> UInt8:
        """The photo [h, w, 3], at most SIDE pixels high and wide."""
        return np.array(self._small)

    def emptied(self, raw: bool) -> bool:
        """Whether nothing is marked, whatever the threshold, since no trace was found."""
        return self.found.verdict == NO_TRACE and not raw


class Service:
    """Examines photos with one network and keeps the newest results below `folder`, each under an unguessable key.

    `settings` go into the records of downloads.
    """

    def __init__(
        self,
        model: nn.Module,
        label: str,
        folder: Path,
        limits: Limits,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.model, self.label, self.folder, self.limits = _Timed(model), label, folder, limits
        self.settings = {"size_policy": "auto", "tile": TILE, **(settings or {})}
        self._results: OrderedDict[str, Result] = OrderedDict()
        self._lock = threading.Lock()
        self._writing = threading.Lock()

    def examine(self, file: Path) -> str:
        """Find the edited pixels of a photo; returns the key of its result.

        Raises LimitError for a photo above a limit, ImageError for a file that is no complete image.
        """
        if file.stat().st_size > self.limits.file_bytes:
            raise LimitError(f"A photo may have at most {self.limits.file_bytes / 1e6:g} MB.")
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            self.model.start(self.limits.seconds)
            result = self._result(Path(shutil.copy(file, folder / file.name)))
        except BaseException:
            shutil.rmtree(folder)
            raise
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._results[key] = result
            while len(self._results) > 1 and sum(kept.bytes for kept in self._results.values()) > KEPT_BYTES:
                _, old = self._results.popitem(last=False)
                shutil.rmtree(old.photo.parent, ignore_errors=True)
        return key

    def _result(self, photo: Path) -> Result:
        pixels = read_image(photo, max_pixels=self.limits.pixels)
        facts = provenance(photo)
        return Result(photo, pixels, predict(pixels, self.model), facts)

    def result(self, key: str) -> Result:
        """Raises LimitError where it is gone."""
        with self._lock:
            found = self._results.get(key)
        if found is None:
            raise LimitError(GONE)
        return found

    def archive(self, key: str, threshold: float, raw: bool) -> Path:
        """A zip file of the files that `frd predict --save mask,overlay,map` writes; the caller deletes it."""
        result = self.result(key)
        # One at a time, since each holds a photo and its map in memory.
        with self._writing, tempfile.TemporaryDirectory(dir=self.folder) as folder:
            job = Job(Path(result.photo.name), result.photo.stem)
            settings = {
                **self.settings,
                **({"raw": True} if raw else {}),
                "provenance": result.provenance,
            }
            kinds = ("mask", "overlay", "map")
            try:
                pixels = read_image(result.photo)
            # It was dropped since `result` looked.
            except ImageError:
                raise LimitError(GONE) from None
            save_prediction(Path(folder), job, pixels, result.at(threshold, raw), self.label, settings, kinds)
            handle, name = tempfile.mkstemp(".zip", dir=self.folder)
            with open(handle, "wb") as stream, zipfile.ZipFile(stream, "w") as archive:
                for file in sorted(Path(folder).iterdir()):
                    archive.write(file, file.name)
        return Path(name)


class _Timed(nn.Module):
    """A network that refuses to go on once the time of its thread is over; a large photo asks it tile by tile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.score_rule = getattr(model, "score_rule", None)
        self.config = getattr(model, "config", None)
        self.eval()
        self._thread = threading.local()

    def start(self, seconds: float) -> None:
        self._thread.seconds, self._thread.end = seconds, time.monotonic() + seconds

    def _check(self) -> None:
        if time.monotonic() > self._thread.end:
            raise LimitError(f"This photo takes longer than {self._thread.seconds:g} s, the limit here.")

    def forward(self, x: Tensor) -> Tensor:
        self._check()
        logits: Tensor = self.model(x)
        return logits

    def with_score(self, x: Tensor) -> Any:
        self._check()
        scoring: Any = self.model
        return scoring.with_score(x)


def _on_disk(file: Path, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    np.save(file, values)
    return np.asarray(np.load(file, mmap_mode="r"))
