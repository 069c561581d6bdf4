"""Many photos through a network: threads read ahead of it and write behind it, in bounded memory and in order."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch import nn

from frd_model.data.files import image_extensions
from frd_model.data.images import check_readable, open_image, read_image, read_stream
from frd_model.eval_view import device_of
from frd_model.logits import crop_count, default_batch
from frd_model.predict import GROUP_PIXELS, Prediction, predict
from frd_model.provenance import provenance
from frd_model.results import Job

UInt8 = npt.NDArray[np.uint8]
T = TypeVar("T")

READERS = min(4, os.cpu_count() or 1)
WRITERS = 2
# Photos that are read, or written, at one time at most.
AHEAD = 16
# Bytes that photos under way may take together; a photo that needs more is under way alone.
MEMORY = 1 << 30
# What a pixel takes at most at one time: while it is decoded, or as photo, map and mask with what writing needs.
BYTES_PER_PIXEL = 12
# Elements of a photo that leaves memory worth returning.
LARGE = 1 << 24


class Header(NamedTuple):
    """Size of a photo before its EXIF rotation, and the bytes set aside for it."""

    height: int
    width: int
    memory: int


class Content(NamedTuple):
    """pixels [H, W, 3], and what the file says of its origin."""

    pixels: UInt8
    provenance: dict[str, Any]


@dataclass
class Photo:
    """A photo on its way through the network. Either future may end with an error."""

    job: Job
    header: Future[Header] = field(default_factory=Future)
    content: Future[Content] = field(default_factory=Future)


Finish = Callable[[Job, Content | None, Prediction | BaseException], T]


def process(jobs: Iterable[Job], model: nn.Module, finish: Finish[T], **options: Any) -> Iterator[T]:
    """What `finish` makes of each photo, in the order of `jobs`; `options` are those of `predict`.

    `finish(job, content, prediction)` is called in threads of its own. For a photo that failed it gets the error in the
    prediction's place, and None for the content of a file that could not be read.
    """
    # Registers the formats, before threads do.
    image_extensions()
    gate = _Gate(MEMORY)
    batch = options.pop("batch_size", None) or default_batch(device_of(model))
    options["batch_size"] = batch
    written: deque[Future[T]] = deque()
    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(WRITERS) as writers:

        def through(group: list[Photo]) -> None:
            for photo, result in zip(group, _predict(group, model, options), strict=True):
                written.append(writers.submit(_finish, photo, result, finish, gate))

        try:
            for group in _groups(_read_ahead(jobs, gate, readers), batch, options):
                through(group)
                # The pixels are the writers' now, which free them.
                del group
                while written and (written[0].done() or len(written) > AHEAD):
                    yield written.popleft().result()
            while written:
                yield written.popleft().result()
        finally:
            gate.close()
            readers.shutdown(wait=False, cancel_futures=True)


class _Gate:
    """Lets photos in one after the other, each when those before it leave memory for it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.next = 0
        self.used = 0
        self.closed = False
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """A block that photo `number` enters after all before it have left theirs."""
        with self._when(lambda: self.next == number):
            pass
        try:
            yield
        finally:
            with self.changed:
                self.next += 1
                self.changed.notify_all()

    def take(self, amount: int) -> None:
        with self._when(lambda: not self.used or self.used + amount <= self.limit):
            self.used += amount

    def give(self, amount: int) -> None:
        with self.changed:
            self.used -= amount
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    @contextlib.contextmanager
    def _when(self, ready: Callable[[], bool]) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.closed or ready())
            if self.closed:
                raise CancelledError
            yield


def _read_ahead(jobs: Iterable[Job], gate: _Gate, readers: ThreadPoolExecutor) -> Iterator[Photo]:
    queue: deque[Photo] = deque()
    for number, job in enumerate(jobs):
        queue.append(Photo(job))
        readers.submit(_read, queue[-1], number, gate)
        if len(queue) > AHEAD:
            yield queue.popleft()
    while queue:
        yield queue.popleft()


def _read(photo: Photo, number: int, gate: _Gate) -> None:
    """Read and decode a photo once there is memory for it."""
    path = photo.job.path
    try:
        with contextlib.ExitStack() as stack:
            with gate.turn(number):
                file = stack.enter_context(_open(photo.job))
                with open_image(path, data=file) as image:
                    width, height = image.size
                header = Header(height, width, file.seek(0, io.SEEK_END) + BYTES_PER_PIXEL * height * width)
                # Known before the wait, so that the photo's group is not held back until there is memory.
                photo.header.set_result(header)
                gate.take(header.memory)
            file.seek(0)
            data = read_stream(file, path)
        content = Content(read_image(path, data=data), provenance(path, data))
        _return_freed_memory(content.pixels)
        photo.content.set_result(content)
    # Decoders and allocators raise errors of any type; whoever waits for the photo must learn of it.
    except BaseException as error:
        for future in (photo.header, photo.content):
            if not future.done():
                future.set_exception(error)


def _return_freed_memory(pixels: UInt8) -> None:
    """Give the system what was freed after work on a large photo, which glibc keeps for each thread alone."""
    if pixels.size > LARGE and sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _open(job: Job) -> BinaryIO:
    if job.standard_input:
        return io.BytesIO(read_stream(sys.stdin.buffer, job.path))
    check_readable(job.path)
    return open(job.path, "rb")


def _groups(photos: Iterable[Photo], batch: int, options: dict[str, Any]) -> Iterator[list[Photo]]:
    """Photos that fill a batch at most, or one: made from the headers alone, so that they do not depend on timing."""
    group: list[Photo] = []
    crops = pixels = memory = 0
    for photo in photos:
        # One that cannot be read takes no place.
        header = Header(0, 0, 0) if photo.header.exception() else photo.header.result()
        height, width, needed = header
        count = (
            crop_count((height, width), options["size"], options["tile"], options["overlap"]) if needed else 0
        )
        crops, pixels, memory = crops + count, pixels + height * width, memory + needed
        if group and (crops > batch or pixels > GROUP_PIXELS or memory > MEMORY):
            yield group
            group, crops, pixels, memory = [], count, height * width, needed
        group.append(photo)
        del photo
    if group:
        yield group


def _predict(
    group: list[Photo], model: nn.Module, options: dict[str, Any]
) -> list[Prediction | BaseException]:
    """The prediction of each photo, or the error that it ended with."""
    errors = [photo.content.exception() for photo in group]
    pixels = [photo.content.result().pixels for photo, error in zip(group, errors, strict=True) if not error]
    found: Iterator[Prediction | Exception]
    try:
        found = iter(predict(pixels, model, **options))
    # A photo's error is its own: the others go through alone.
    except Exception as error:
        found = iter([error]) if len(pixels) == 1 else (_alone(p, model, options) for p in pixels)
    return [error or next(found) for error in errors]


def _alone(pixels: UInt8, model: nn.Module, options: dict[str, Any]) -> Prediction | Exception:
    try:
        return predict(pixels, model, **options)
    except Exception as error:
        return error


def _finish(photo: Photo, result: Prediction | BaseException, finish: Finish[T], gate: _Gate) -> T:
    try:
        content = None if photo.content.exception() else photo.content.result()
        if content is not None:
            _return_freed_memory(content.pixels)
        return finish(photo.job, content, result)
    finally:
        if not photo.header.exception():
            gate.give(photo.header.result().memory)
