"""Export a network to ONNX, run the file and compare it with PyTorch."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from frd_kernels.convert import fold

from .exported import INPUT, OUTPUTS, ExportedNet, load_exported
from .frdnet import FRDNet
from .state_files import first_line
from .weights import header_of

#: The largest deviation from PyTorch that `export_onnx` accepts, relative to the largest logit (at least 1).
BOUND = 1e-3
# An argmax whose two best cosines differ by less than rounding may go either way, which can change logits by more than
# the bound (above all if a map has fewer rows or columns than a grid, so that bins repeat). That depends on the input,
# while a wrong graph is wrong for all of them.
_TRIES = 3
# Traced for a dynamic file: batch and sides differ and none is 1.
_EXAMPLE = (2, 3, 96, 160)
# The oldest that torch writes.
_OLDEST_OPSET = 18
_INSTALL = "pip install frd-kernels[export]"


class Exported(NamedTuple):
    """What `export_onnx` wrote.

    checks: input shape -> deviation from PyTorch, relative as `BOUND`; empty if onnxruntime is not installed.
    """

    path: Path
    checks: dict[tuple[int, ...], float]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    dynamic: bool = True,
    size: int | tuple[int, int] = 512,
    opset: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a network as ONNX: images [B, 3, H, W], ImageNet-normalised float32 -> logits [B, 1, H, W].

    A network with `config.image_head` has a second output, image_logits [B]. The file uses standard operators only:
    plain convolutions (`frd_kernels.convert.fold`), and clustering as index arithmetic. It holds the configuration and
    the score rule of an FRDNet, so that :func:`frd_model.exported.load_exported` needs nothing else. If onnxruntime is
    installed, it runs the graph at two batches and sizes before the file is written, and must match PyTorch.

    Args:
        model: an FRDNet or a wrapper of one, or another network of these shapes. It is not changed: a float32 copy in
            eval mode on the CPU is exported.
        path: the file, replaced if it exists; missing folders are created.
        dynamic: for any batch and any sides, otherwise for batch 1 and `size` only.
        size: (H, W), or one number for both: the size of a fixed file, or of the larger check of a dynamic one.
        opset: version of ONNX's operators, None for torch's choice.
        metadata: any JSON values, stored in the file as :func:`frd_model.save_model` does.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
        TypeError, ValueError: bad arguments.
        OSError: the file cannot be written.
        RuntimeError: torch cannot export the network, or the file computes something else.
    """
    height, width = _check_arguments(model, size)
    check_packages("onnx", "onnxscript")
    _check_opset(opset)
    path = Path(path).expanduser()
    check_writable(path)
    plain = fold(copy.deepcopy(_net(model)).cpu().float()).requires_grad_(False)
    fixed = (1, 3, height, width)
    other = (3, 3, height // 2 + 1, width // 2 + 33)
    checks = {}
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        file = Path(folder) / "net.onnx"
        file.write_bytes(_convert(plain, (height, width), dynamic, opset, metadata))
        if importlib.util.find_spec("onnxruntime") is None:
            warnings.warn(f"{path} was not checked, onnxruntime is missing: {_INSTALL}", stacklevel=2)
        else:
            checks = _check(file, plain, [fixed, other] if dynamic else [fixed])
        os.replace(file, path)
    return Exported(path, checks)


def check_packages(*names: str) -> None:
    """ModuleNotFoundError that says what to install, if a package is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX export needs {' and '.join(missing)}: {_INSTALL}")


def check_writable(path: Path) -> None:
    """Create the folder; OSError if the file cannot be written."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a directory; the name of a file is needed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _check_arguments(model: Any, size: Any) -> tuple[int, int]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: an nn.Module is needed, got {type(model).__name__}")
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or not all(_is_count(s) for s in sides):
        raise ValueError(f"size: must be a positive integer or (H, W), got {size!r}")
    return sides[0], sides[1]


def _check_opset(opset: Any) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not (_is_count(opset) and _OLDEST_OPSET <= opset <= newest):
        raise ValueError(f"opset: must lie between {_OLDEST_OPSET} and {newest} or be None, got {opset!r}")


def _net(model: nn.Module) -> nn.Module:
    """The FRDNet inside DDP, torch.compile and the like."""
    nets = [module for module in model.modules() if isinstance(module, FRDNet)]
    return nets[0] if len(nets) == 1 else model


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class _Scored(nn.Module):
    """A network whose forward gives the image-level logit too."""

    def __init__(self, net: FRDNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.with_score(images)


def _has_head(plain: nn.Module) -> bool:
    return isinstance(plain, FRDNet) and plain.config.image_head


def _convert(
    plain: nn.Module,
    size: tuple[int, int],
    dynamic: bool,
    opset: int | None,
    metadata: Mapping[str, Any] | None,
) -> bytes:
    """The ONNX model, serialised."""
    import onnx

    head = _has_head(plain)
    example = torch.zeros(_EXAMPLE if dynamic else (1, 3, *size))
    auto = torch.export.Dim.AUTO
    try:
        program = torch.onnx.export(
            _Scored(cast(FRDNet, plain)).eval() if head else plain,
            (example,),
            dynamo=True,
            dynamic_shapes=[{0: auto, 2: auto, 3: auto}] if dynamic else None,
            input_names=[INPUT],
            output_names=OUTPUTS if head else OUTPUTS[:1],
            opset_version=opset,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise RuntimeError(f"{type(plain).__name__}: torch cannot export it to ONNX: {cause}") from error
    assert program is not None
    proto = program.model_proto
    written = {entry.domain: entry.version for entry in proto.opset_import}[""]
    if opset is not None and written != opset:
        raise ValueError(f"opset: torch cannot bring this net from {written} to {opset}; leave it out")
    if dynamic:
        for value in (proto.graph.input[0], *proto.graph.output):
            for axis, name in zip((0, 2, 3), ("batch", "height", "width"), strict=True):
                if axis < len(value.type.tensor_type.shape.dim):
                    value.type.tensor_type.shape.dim[axis].dim_param = name
    if isinstance(plain, FRDNet):
        onnx.helper.set_model_props(proto, header_of(plain, metadata))
    return bytes(proto.SerializeToString())


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
    head = _has_head(plain)
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
