"""Export a network to ONNX, OpenVINO, torch.export or AOTInductor, run the file and compare it with PyTorch."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from frd_kernels.convert import fold

from .export_formats import WRITERS, Request, check_opset, has_head, least_side, to_openvino
from .exported import ExportedNet, check_package, files_of, load_exported
from .frdnet import FRDNet
from .quantize import MAX_ERROR, MIN_PHOTOS, Int8Error, compare, quantize, split
from .state_files import first_line

#: The formats and the endings of their files.
FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "aoti": ".pt2"}
#: The largest deviation from PyTorch that an export accepts, relative to the largest logit (at least 1).
BOUND = 1e-3
# An argmax whose two best cosines differ by less than rounding may go either way, which can change logits by more than
# the bound (above all if a map has fewer rows or columns than a grid, so that bins repeat). That depends on the input,
# while a wrong graph is wrong for all of them.
_TRIES = 3
_PACKAGES = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}
_INSTALL = "pip install frd-kernels[export]"


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        checks: input shape -> deviation from PyTorch, relative as `BOUND`; empty for ONNX where onnxruntime is missing.
            For an 8-bit file: of the float32 graph that it was made from.
        int8: what 8 bits change; None for a float32 file.
    """

    path: Path
    checks: dict[tuple[int, ...], float]
    int8: Int8Error | None = None


def export_model(
    model: nn.Module,
    path: str | Path,
    to: str | None = None,
    *,
    dynamic: bool = True,
    size: int | tuple[int, int] = 512,
    opset: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    calibration: Sequence[str | Path] | None = None,
    max_error: float = MAX_ERROR,
) -> Exported:
    """Write a network as a file: images [B, 3, H, W], ImageNet-normalised float32 -> logits [B, 1, H, W].

    A network with `config.image_head` has a second output, image_logits [B]. The file uses standard operators only:
    plain convolutions (`frd_kernels.convert.fold`), and clustering as index arithmetic, so that other programs can run
    it. It holds the configuration and the score rule of an FRDNet, and :func:`frd_model.exported.load_exported` needs
    nothing else. Only a file of AOTInductor calls the clustering of `frd_kernels`, and takes no sides below 33 pixels
    (97 with a trace branch).

    Before the file is written, it runs at two batches and sizes, and must match PyTorch (ONNX: where onnxruntime is
    installed).

    Args:
        model: an FRDNet or a wrapper of one, or another network of these shapes. It is not changed: a float32 copy in
            eval mode on the CPU is exported.
        path: the file, replaced if it exists; missing folders are created. OpenVINO's weights are beside it in a file
            with the ending .bin.
        to: "onnx" (.onnx), "openvino" (.xml), "torch-export" (.pt2: a program of `torch.export`) or "aoti" (.pt2:
            compiled by AOTInductor for this machine's processor). None takes what the ending says.
        dynamic: for any batch and any sides, otherwise for batch 1 and `size` only.
        size: (H, W), or one number for both: the size of a fixed file, or of the larger check of a dynamic one.
        opset: version of ONNX's operators, None for torch's choice.
        metadata: any JSON values, stored in the file as :func:`frd_model.save_model` does.
        calibration: at least four photos like those that the file is for. With them convolutions and matrix products
            compute in 8 bits (ONNX and OpenVINO); of up to 128 of them every fourth does not calibrate but is
            compared, each by its middle of `size` pixels.
        max_error: the largest :attr:`frd_model.quantize.Int8Error.error` of an 8-bit file.

    Raises:
        ModuleNotFoundError: a package or the compiler that the format needs is missing.
        TypeError, ValueError: bad arguments.
        OSError: the file cannot be written.
        RuntimeError: the network cannot be exported, or the file computes something else, or the error of
            8 bits is larger than `max_error`.
    """
    path = Path(path).expanduser()
    to = format_of(path, to)
    height, width = _check_arguments(model, size)
    check_packages(to)
    if opset is not None:
        check_opset(to, opset)
    if calibration is not None:
        check_calibration(to, calibration, dynamic)
    check_writable(path)
    plain = fold(copy.deepcopy(_net(model)).cpu().float()).requires_grad_(False)
    request = Request((height, width), dynamic, opset, metadata)
    int8 = None
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        file = Path(folder) / f"net{FORMATS[to]}"
        if calibration is not None:
            checks, int8 = _write_int8(
                plain, file, request, [Path(p).expanduser() for p in calibration], max_error
            )
        else:
            checks = _write(plain, file, request, to)
        _move(file, path)
    return Exported(path, checks, int8)


def check_calibration(to: str, photos: Sequence[object], dynamic: bool) -> None:
    """ValueError or ModuleNotFoundError for what an 8-bit file cannot be made of."""
    if to not in ("onnx", "openvino") or not dynamic:
        raise ValueError("calibration: goes with onnx and openvino and any sides (--int8, without --fixed)")
    if len(photos) < MIN_PHOTOS:
        raise ValueError(f"calibration: must be at least {MIN_PHOTOS} photos, got {len(photos)}")
    check_package("onnxruntime", "export", "an 8-bit file")


def _write(plain: nn.Module, file: Path, request: Request, to: str) -> dict[tuple[int, ...], float]:
    WRITERS[to](plain, file, request)
    if to == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        warnings.warn(f"the ONNX file was not checked, onnxruntime is missing: {_INSTALL}", stacklevel=3)
        return {}
    return _check(file, plain, _shapes(request, least_side(plain, request) if to == "aoti" else 1))


def _write_int8(
    plain: nn.Module, file: Path, request: Request, photos: Sequence[Path], limit: float
) -> tuple[dict[tuple[int, ...], float], Int8Error]:
    calibrating, compared = split(photos)
    facts = {"int8": {"photos": len(calibrating)}}
    full, onnx = file.with_name("float32.onnx"), file.with_suffix(".onnx")
    checks = _write(plain, full, request._replace(metadata={**(request.metadata or {}), **facts}), "onnx")
    side = min(request.size)
    quantize(full, onnx, calibrating, side)
    if onnx != file:
        to_openvino(onnx, file)
    found = compare(plain, load_exported(file), compared, side)
    if found.error > limit:
        raise RuntimeError(
            f"max_error: 8 bits may change probabilities and scores by {limit:g}, got {found.map:.3g} and "
            f"{found.score:.3g}; nothing was written (--max-error allows more)"
        )
    return checks, found


def _shapes(request: Request, least: int) -> list[tuple[int, ...]]:
    """The shapes to check."""
    height, width = (max(side, least) for side in request.size)
    other = (3, 3, max(height // 2 + 1, least), max(width // 2 + 33, least))
    return [(1, 3, height, width), other] if request.dynamic else [(1, 3, height, width)]


def export_onnx(model: nn.Module, path: str | Path, **options: Any) -> Exported:
    """`export_model` to ONNX, whatever the file's ending."""
    return export_model(model, path, "onnx", **options)


def format_of(path: Path, to: str | None = None) -> str:
    """The format to write: `to`, or what the file's ending says. ValueError where the two do not fit or say none."""
    if to is not None:
        if to not in FORMATS:
            raise ValueError(f"to: must be one of {', '.join(FORMATS)}, got {to!r}")
        ending = path.suffix.lower()
        # Other programs open an ONNX file of any name, but ours go by the ending.
        if ending != FORMATS[to] and (to != "onnx" or ending in FORMATS.values()):
            raise ValueError(f"path: a file of {to} must end in {FORMATS[to]}, got {str(path)!r}")
        return to
    found = [name for name, ending in FORMATS.items() if ending == path.suffix.lower()]
    if not found:
        raise ValueError(f"path: must end in {', '.join(dict.fromkeys(FORMATS.values()))}, got {str(path)!r}")
    if len(found) > 1:
        raise ValueError(f"to: must be {' or '.join(found)} for a file {path.suffix!r}, got None (--to)")
    return found[0]


def check_packages(to: str) -> None:
    """ModuleNotFoundError that says what to install, if a package that writes the format is missing."""
    for name in _PACKAGES.get(to, ()):
        check_package(name, "openvino" if name == "openvino" else "export", f"export to {to}")


def check_writable(path: Path) -> None:
    """Create the folder; OSError if the file cannot be written."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a directory; the name of a file is needed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _move(file: Path, path: Path) -> None:
    # The file that is opened comes last: once it is there, the others are.
    for source, target in reversed(list(zip(files_of(file), files_of(path), strict=True))):
        os.replace(source, target)


def _check_arguments(model: Any, size: Any) -> tuple[int, int]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: an nn.Module is needed, got {type(model).__name__}")
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or not all(_is_count(s) for s in sides):
        raise ValueError(f"size: must be a positive integer or (H, W), got {size!r}")
    return sides[0], sides[1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _net(model: nn.Module) -> nn.Module:
    """The FRDNet inside DDP, torch.compile and the like."""
    nets = [module for module in model.modules() if isinstance(module, FRDNet)]
    return nets[0] if len(nets) == 1 else model


def _check(file: Path, plain: nn.Module, shapes: list[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
    """Shape -> deviation of the file's network from PyTorch; raises RuntimeError above `BOUND`."""
    try:
        exported = load_exported(file)
    except ValueError as error:
        raise RuntimeError(f"{error}; nothing was written") from error
    generator = torch.Generator().manual_seed(0)
    found = {}
    for shape in shapes:
        for _ in range(_TRIES):
            found[shape] = _deviation(exported, plain, torch.randn(shape, generator=generator))
            if found[shape] <= BOUND:
                break
        else:
            raise RuntimeError(
                f"the {file.suffix} file must give PyTorch's logits up to {BOUND:g} of the largest, got a difference "
                f"of {found[shape]:.2g} at {list(shape)}; nothing was written"
            )
    return found


def _deviation(exported: ExportedNet, plain: nn.Module, images: Tensor) -> float:
    head = has_head(plain)
    with torch.inference_mode():
        wanted = cast(FRDNet, plain).with_score(images) if head else (plain(images),)
    try:
        got = exported.with_score(images) if head else (exported(images),)
    # The engines' exceptions have no common class.
    except Exception as error:
        raise RuntimeError(f"the exported file fails at {list(images.shape)}: {first_line(error)}") from error
    return max(_difference(a, b) for a, b in zip(got, wanted, strict=True))


def _difference(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape:
        raise RuntimeError(
            f"the exported file must give {list(wanted.shape)}, got {list(got.shape)}; nothing was written"
        )
    difference = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1)
    return float(difference.nan_to_num(nan=torch.inf))
