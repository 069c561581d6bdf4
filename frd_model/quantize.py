"""8-bit networks for CPUs: an exported ONNX graph, calibrated on photos, and what that changes in their maps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from .data.images import read_image
from .data.transforms import to_tensor
from .exported import INPUT
from .pixels import UInt8
from .predict import predict

#: The largest error that an 8-bit file may have unless the caller allows more: see `Int8Error`.
MAX_ERROR = 0.05
# Of so many photos every fourth is compared and the others calibrate.
MIN_PHOTOS, _EVERY = 4, 4
# Ranges of activations settle long before.
_MOST_PHOTOS = 128
# Convolutions so near to the image stay in float32: camera traces are smaller than the step of 8 bits.
_FLOAT_DEPTH = 2


class Int8Error(NamedTuple):
    """What 8 bits change, on `photos` photos that did not calibrate.

    map: the largest mean difference of a photo's probabilities. score: the largest difference of a photo's score.
    marked: the largest share of a photo's pixels that are marked by one of the two networks only.
    """

    photos: int
    map: float
    score: float
    marked: float

    @property
    def error(self) -> float:
        """The larger one of `map` and `score`, which is limited."""
        return max(self.map, self.score)


def split(photos: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The photos that calibrate, and those that are compared."""
    # Spread over a long list: neighbours in a folder are alike.
    chosen = list(photos)[:: -(-len(photos) // _MOST_PHOTOS)]
    compared = chosen[_EVERY - 1 :: _EVERY]
    return [photo for photo in chosen if photo not in compared], compared


def quantize(source: Path, target: Path, photos: Sequence[Path], side: int) -> None:
    """Write the ONNX file `source` with 8-bit convolutions and matrix products as `target`.

    Args:
        photos: their middles of up to `side` x `side` pixels calibrate the ranges of the activations.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.photos: Iterator[Path] = iter(photos)

        def get_next(self) -> dict[str, Any] | None:
            photo = next(self.photos, None)
            return None if photo is None else {INPUT: to_tensor(middle(photo, side))[None].numpy()}

    prepared = target.with_name("prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        target,
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "MatMul"],
        nodes_to_exclude=_first_convolutions(onnx.load(prepared).graph),
    )
    prepared.unlink()


def compare(plain: nn.Module, found: nn.Module, photos: Sequence[Path], side: int) -> Int8Error:
    """The two networks on the middles of photos."""
    rows = []
    for photo in photos:
        pixels = middle(photo, side)
        # With raw, masks do not depend on the verdict.
        wanted, got = (predict(pixels, net, size="whole", raw=True) for net in (plain, found))
        difference = float(np.abs(got.probability - wanted.probability).mean())
        rows.append((difference, abs(got.score - wanted.score), float((got.mask != wanted.mask).mean())))
    return Int8Error(len(rows), *(max(column) for column in zip(*rows, strict=True)))


def middle(photo: Path, side: int) -> UInt8:
    """The middle [h, w, 3] of a photo, with h, w <= side."""
    pixels = read_image(photo)
    y, x = (max(0, (length - side) // 2) for length in pixels.shape[:2])
    return np.ascontiguousarray(pixels[y : y + side, x : x + side])


def _first_convolutions(graph: Any) -> list[str]:
    """The names of the convolutions with fewer than `_FLOAT_DEPTH` others between them and the image."""
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    depth: dict[str, int] = {}
    waiting = deque([(INPUT, 0)])
    while waiting:
        name, above = waiting.popleft()
        for node in readers.get(name, ()):
            # Sizes go everywhere.
            if node.op_type in ("Shape", "Size"):
                continue
            here = above + (node.op_type == "Conv")
            if here <= _FLOAT_DEPTH and here < depth.get(node.name, _FLOAT_DEPTH + 1):
                depth[node.name] = here
                waiting.extend((output, here) for output in node.output)
    return [node.name for node in graph.node if node.op_type == "Conv" and node.name in depth]
