"""The writers of `frd_model.export`: a folded network to a file of each format."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import frd_kernels as fk

from .exported import HEADER, INPUT, OUTPUTS
from .frdnet import FRDNet, every_side
from .state_files import first_line
from .weights import header_of

# Traced for a dynamic file: batch and sides differ and none is 1.
_EXAMPLE = (2, 3, 96, 160)
# The oldest that torch writes.
_OLDEST_OPSET = 18


class Request(NamedTuple):
    """How to write a file: see `export_model`."""

    size: tuple[int, int]
    dynamic: bool
    opset: int | None
    metadata: Mapping[str, Any] | None

    @property
    def example(self) -> Tensor:
        return torch.zeros(_EXAMPLE if self.dynamic else (1, 3, *self.size))

    @property
    def shapes(self) -> list[dict[int, Any]] | None:
        auto = torch.export.Dim.AUTO
        return [{0: auto, 2: auto, 3: auto}] if self.dynamic else None


def check_opset(to: str, opset: Any) -> None:
    """ValueError for a version that torch does not write."""
    if to != "onnx":
        raise ValueError(f"opset: goes with ONNX, got {opset!r} for {to}")
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not (isinstance(opset, int) and not isinstance(opset, bool) and _OLDEST_OPSET <= opset <= newest):
        raise ValueError(f"opset: must lie between {_OLDEST_OPSET} and {newest} or be None, got {opset!r}")


class _Scored(nn.Module):
    """A network whose forward gives the image-level logit too."""

    def __init__(self, net: FRDNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.with_score(images)


def has_head(plain: nn.Module) -> bool:
    """Whether the network gives image-level logits."""
    return isinstance(plain, FRDNet) and plain.config.image_head


def _traced(plain: nn.Module) -> nn.Module:
    return _Scored(cast(FRDNet, plain)).eval() if has_head(plain) else plain


def _header(plain: nn.Module, request: Request) -> dict[str, str]:
    return header_of(plain, request.metadata) if isinstance(plain, FRDNet) else {}


def _write_onnx(plain: nn.Module, file: Path, request: Request) -> None:
    import onnx

    try:
        program = torch.onnx.export(
            _traced(plain),
            (request.example,),
            dynamo=True,
            dynamic_shapes=request.shapes,
            input_names=[INPUT],
            output_names=OUTPUTS if has_head(plain) else OUTPUTS[:1],
            opset_version=request.opset,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise RuntimeError(
            f"{type(plain).__name__}: torch cannot export it to ONNX: {_cause(error)}"
        ) from error
    assert program is not None
    proto = program.model_proto
    written = {entry.domain: entry.version for entry in proto.opset_import}[""]
    if request.opset not in (None, written):
        raise ValueError(
            f"opset: torch cannot bring this net from {written} to {request.opset}; leave it out"
        )
    if request.dynamic:
        for value in (proto.graph.input[0], *proto.graph.output):
            for axis, name in zip((0, 2, 3), ("batch", "height", "width"), strict=True):
                if axis < len(value.type.tensor_type.shape.dim):
                    value.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.helper.set_model_props(proto, _header(plain, request))
    file.write_bytes(proto.SerializeToString())


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _write_openvino(plain: nn.Module, file: Path, request: Request) -> None:
    onnx = file.with_suffix(".onnx")
    _write_onnx(plain, onnx, request)
    to_openvino(onnx, file)


def to_openvino(onnx: Path, file: Path) -> None:
    """Convert an ONNX file, with its metadata, which OpenVINO keeps as rt_info "framework"."""
    import openvino

    # Not by `convert_model`, which reports its use to a server.
    openvino.save_model(openvino.Core().read_model(onnx), file, compress_to_fp16=False)


@contextlib.contextmanager
def _explained(to: str) -> Iterator[None]:
    try:
        yield
    # torch.export and Inductor raise errors of any type.
    except Exception as error:
        raise RuntimeError(f"torch cannot export it to {to}: {first_line(_cause(error))}") from error


def _pt2_header(plain: nn.Module, request: Request, least: int = 1) -> dict[str, str]:
    shape = [None, 3, None, None] if request.dynamic else list(request.example.shape)
    facts = {"shape": shape, "least": least, "outputs": 2 if has_head(plain) else 1}
    return {HEADER: json.dumps(_header(plain, request) | facts)}


def _write_torch(plain: nn.Module, file: Path, request: Request) -> None:
    token = every_side.set(True)
    try:
        with _explained("torch-export"), fk.use_backend("reference"):
            program = torch.export.export(_traced(plain), (request.example,), dynamic_shapes=request.shapes)
            torch.export.save(program, file, extra_files=_pt2_header(plain, request))
    finally:
        every_side.reset(token)


def least_side(plain: nn.Module, request: Request) -> int:
    """The smallest side that a file of AOTInductor takes: torch.export treats a size of 1 apart, also of inner maps."""
    if not request.dynamic:
        return 1
    if not isinstance(plain, FRDNet):
        return 2
    return 2 * max(plain.min_side, plain.multiple) - plain.multiple + 1


def _write_aoti(plain: nn.Module, file: Path, request: Request) -> None:
    """With our operators, which are native code already. Inductor cannot lower the program of `_write_torch`."""
    least = least_side(plain, request)
    batch, sides = torch.export.Dim("batch", min=1, max=4096), {"min": least, "max": 65536}
    height, width = torch.export.Dim("height", **sides), torch.export.Dim("width", **sides)
    example = torch.zeros(2, 3, max(160, least), max(200, least + 40)) if request.dynamic else request.example
    with _explained("aoti"):
        program = torch.export.export(
            _traced(plain),
            (example,),
            dynamic_shapes=[{0: batch, 2: height, 3: width}] if request.dynamic else None,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        header = {"aot_inductor.metadata": _pt2_header(plain, request, least)}
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=header)


WRITERS: dict[str, Callable[[nn.Module, Path, Request], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "torch-export": _write_torch,
    "aoti": _write_aoti,
}
