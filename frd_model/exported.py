"""Networks out of exported files, each run by its own engine, behind the interface of an FRDNet in eval mode."""

from __future__ import annotations

import importlib.util
import json
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import FRDNetConfig
from .hub import local_file, parse
from .score import HEAD, ScoreRule
from .state_files import FORMAT, config_in_header, first_line, metadata_in_header
from .weights import rule_in

#: The endings of exported files: ONNX, OpenVINO, torch.export and AOTInductor.
ENDINGS = (".onnx", ".xml", ".pt2")
#: The names of their input and outputs. The second output is there where the network has an image-level head.
INPUT, OUTPUTS = "images", ("logits", "image_logits")
#: Where a .pt2 file holds what the other formats have in places of their own.
HEADER = "frd_model.json"
PRECISIONS = ("float32", "bf16")

Run = Callable[[Tensor], list[Tensor]]


class Opened(NamedTuple):
    """A file that an engine has loaded.

    run: images -> outputs. shape: of the images, None where the file takes any number. outputs: how many there are.
    header: what `weights.header_of` gave. least: the smallest side of an image.
    """

    run: Run
    shape: tuple[int | None, ...]
    outputs: int
    header: dict[str, str]
    least: int = 1


def is_exported(name: object) -> bool:
    """Whether a checkpoint's name is that of an exported file."""
    return str(name).lower().endswith(ENDINGS)


class ExportedNet(nn.Module):
    """A network in an exported file, always in eval mode, in float32 on the CPU: see `load_exported`.

    Attributes:
        config: of the FRDNet; None for a file that does not say it.
        score_rule: as of an FRDNet.
        metadata: of the checkpoint that was exported.
    """

    def __init__(
        self, opened: Opened, config: FRDNetConfig | None, rule: ScoreRule | None, metadata: dict[str, Any]
    ) -> None:
        super().__init__()
        self._opened = opened
        self.config = config
        self.score_rule = rule
        self.metadata = metadata
        self.eval()

    def train(self, mode: bool = True) -> ExportedNet:
        if mode:
            raise NotImplementedError("train: an exported network has no gradients; train its checkpoint")
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, 1, H, W]. ValueError for a shape that the file does not take."""
        return self._run(images)[0]

    def with_score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and image-level logits [B]. ValueError where the network has no image-level head."""
        if self._opened.outputs < len(OUTPUTS):
            raise ValueError("image_head: must be true in the configuration for a score, got False")
        logits, scores = self._run(images)
        return logits, scores

    def _run(self, images: Tensor) -> list[Tensor]:
        _check_images(images, self._opened.shape, self._opened.least)
        images = images.detach().to("cpu", torch.float32).contiguous()
        batch = self._opened.shape[0]
        parts = [self._opened.run(part) for part in images.split(batch or len(images))]
        return parts[0] if len(parts) == 1 else [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


def load_exported(path: str | Path, precision: str = "float32") -> ExportedNet:
    """Load a file of `frd export`: a network that :func:`frd_model.predict` takes like an FRDNet.

    It runs on the CPU in as many threads as torch has (`torch.get_num_threads`), in eval mode and without gradients.

    Args:
        path: `.onnx` (run by onnxruntime), also `hf://owner/name/FILE.onnx`; `.xml` with its `.bin` beside it (by
            OpenVINO); or `.pt2` (by torch). A `.pt2` can hold code that runs when it is loaded: take it from nobody
            whom you do not trust. A foreign `.onnx` or `.xml` that takes normalised images [B, 3, H, W] and gives
            logits [B, 1, H, W] is taken too; it has no `score_rule`.
        precision: "float32", or "bf16" for a `.xml`.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: the package that runs it is missing.
        ValueError: another kind of file, a damaged one, or not a network of these shapes.
        NotImplementedError: this precision with this format.
    """
    if not is_exported(path):
        raise ValueError(f"path: must end in {', '.join(ENDINGS)}, got {str(path)!r}")
    ending = Path(path).suffix.lower()
    if precision not in PRECISIONS:
        raise ValueError(f"precision: must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "float32" and ending != ".xml":
        raise NotImplementedError(f"precision: must be float32 for a {ending} file, got {precision!r}")
    if parse(path) is not None and ending != ".onnx":
        raise ValueError(f"path: a {ending} file must be a local one, got {str(path)!r}; download it first")
    file = local_file(path)
    for part in files_of(file):
        if not part.is_file():
            raise FileNotFoundError(f"{part}: no such file")
    if ending == ".xml":
        return _net(file, _open_openvino(file, precision))
    return _net(file, _open_onnx(file) if ending == ".onnx" else _open_pt2(file))


def files_of(path: Path) -> list[Path]:
    """The files that make up an exported file, itself first."""
    return [path, path.with_suffix(".bin")] if path.suffix.lower() == ".xml" else [path]


def _net(file: Path, opened: Opened) -> ExportedNet:
    if len(opened.shape) != 4 or opened.shape[1] not in (3, None):
        raise ValueError(f"{file}: must take images [B, 3, H, W], got an input {list(opened.shape)}")
    config = config_in_header(file, opened.header)
    if config is not None and config.image_head != (opened.outputs == len(OUTPUTS)):
        raise ValueError(f"{file}: its outputs are not those of its configuration; export it again")
    metadata = metadata_in_header(file, opened.header) if opened.header.get("format") == FORMAT else {}
    rule = rule_in(file, metadata)
    if rule is not None and rule.statistic == HEAD and opened.outputs < len(OUTPUTS):
        raise ValueError(f"{file}: its score rule needs the output {OUTPUTS[1]!r}, got {OUTPUTS[0]!r} alone")
    return ExportedNet(opened, config, rule, metadata)


def _check_images(images: Tensor, shape: tuple[int | None, ...], least: int) -> None:
    got = tuple(images.shape)
    if len(got) != 4 or got[1] != 3 or min(got) < 1:
        raise ValueError(f"images: must be [B, 3, H, W] with B, H, W >= 1, got {list(got)}")
    if not images.is_floating_point():
        raise TypeError(f"images: must be floating point, got {images.dtype}")
    if any(fixed not in (None, side) for side, fixed in zip(got[2:], shape[2:], strict=True)):
        wanted = " x ".join("any" if fixed is None else str(fixed) for fixed in shape[2:])
        raise ValueError(
            f"images: this file takes {wanted} pixels only, got {got[2]} x {got[3]}; export it without --fixed"
        )
    if min(got[2:]) < least:
        raise ValueError(
            f"images: this file takes sides from {least} pixels on, got {got[2]} x {got[3]}; export to onnx instead"
        )


def check_package(name: str, extra: str, what: str) -> None:
    """ModuleNotFoundError that says what to install, if a package is missing."""
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"{what} needs {name}: pip install frd-kernels[{extra}]")


def _open_onnx(file: Path) -> Opened:
    check_package("onnxruntime", "onnxruntime", "an ONNX file")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # What it would log is in the exception.
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    # Its exceptions have no common class.
    except Exception as error:
        raise ValueError(
            f"{file}: onnxruntime {onnxruntime.__version__} does not load it: {first_line(error)}"
        ) from error
    inputs, names = session.get_inputs(), [output.name for output in session.get_outputs()]
    if len(inputs) != 1:
        raise ValueError(f"{file}: must have one input, got {len(inputs)}")
    name = inputs[0].name
    shape = tuple(side if isinstance(side, int) else None for side in inputs[0].shape)
    wanted = [output for output in OUTPUTS if output in names] or names[:1]

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(wanted, {name: images.numpy()})]

    return Opened(run, shape, len(wanted), dict(session.get_modelmeta().custom_metadata_map))


def _open_openvino(file: Path, precision: str) -> Opened:
    check_package("openvino", "openvino", "an OpenVINO file")
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    try:
        model = core.read_model(file)
        compiled = core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise ValueError(f"{file}: OpenVINO does not load it: {first_line(error)}") from error
    if len(model.inputs) != 1:
        raise ValueError(f"{file}: must have one input, got {len(model.inputs)}")
    shape = tuple(None if side.is_dynamic else side.get_length() for side in model.input(0).partial_shape)
    ports = {name: port for port in compiled.outputs for name in port.get_names()}
    wanted = [ports[name] for name in OUTPUTS if name in ports] or [compiled.outputs[0]]
    # A request serves one call at a time.
    local = threading.local()

    def run(images: Tensor) -> list[Tensor]:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        found = local.request.infer([images.numpy()])
        return [torch.from_numpy(found[port]) for port in wanted]

    header = {
        key: model.get_rt_info(["framework", key]).astype(str)
        for key in ("format", "version", "config", "metadata")
        if model.has_rt_info(["framework", key])
    }
    return Opened(run, shape, len(wanted), header)


def _open_pt2(file: Path) -> Opened:
    try:
        with zipfile.ZipFile(file) as archive:
            compiled = any("/aotinductor/" in name for name in archive.namelist())
        network, text = _load_compiled(file) if compiled else _load_program(file)
        header = dict(json.loads(text or "{}"))
    # torch raises errors of any type for files that it cannot read.
    except Exception as error:
        raise ValueError(
            f"{file}: torch {torch.__version__} does not load it: {first_line(error)}"
        ) from error
    if not {"shape", "outputs", "least"} <= header.keys():
        raise ValueError(f"{file}: holds no {HEADER} with its shapes: no file of `frd export`")

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            found = network(images)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    shape, outputs, least = (header.pop(key) for key in ("shape", "outputs", "least"))
    return Opened(run, tuple(shape), outputs, header, least)


def _load_program(file: Path) -> tuple[Callable[[Tensor], Any], str]:
    extra = {HEADER: ""}
    program = torch.export.load(file, extra_files=extra)
    return program.module(), extra[HEADER]


def _load_compiled(file: Path) -> tuple[Callable[[Tensor], Any], str]:
    package = torch._inductor.aoti_load_package(str(file))
    return package, package.get_metadata().get(HEADER, "")
