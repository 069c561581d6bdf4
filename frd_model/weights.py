"""Weights on disk: own self-describing safetensors files, the authors' checkpoints, encoder weights.

Nothing is ever unpickled beyond tensors and plain containers (``weights_only=True``).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .config import PRESETS, FRDNetConfig
from .encoder import MixTransformer
from .frdnet import FRDNet
from .naming import (
    Naming,
    check_names,
    export_state,
    huggingface_encoder,
    import_state,
    original_encoder,
    released_model,
)

FORMAT = "frd_model"
VERSION = 1
# Keys of classification and segmentation heads, which an encoder has no use for.
_HEADS = ("head.", "classifier.", "decode_head.")
_FOREIGN_STAGE = re.compile(
    r"(?:patch_embed|block|norm)(\d)\.|encoder\.(?:patch_embeddings|block|layer_norm)\.(\d+)\."
)
_FIRST_WEIGHT = "stages.0.patch_embed.proj.weight"


def demo_path() -> Path:
    """The demo weights inside the package. FileNotFoundError where the installation lacks them."""
    path = Path(__file__).parent / "assets" / "demo.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"pretrained='demo': this installation has no {path.name}")
    return path


def save_model(
    model: FRDNet, path: str | Path, metadata: Mapping[str, Any] | None = None, *, half: bool = False
) -> None:
    """Write `model` as safetensors with its configuration inside; :func:`load_model` needs nothing else.

    Args:
        path: the file; it appears whole or not at all.
        metadata: anything JSON can hold, for example the training command; :func:`read_metadata` returns it.
        half: store floating-point parameters as float16, half the size; reading restores float32.

    Raises:
        ValueError: with `half`, a value that float16 cannot hold; metadata that JSON cannot hold.
    """
    state = {}
    for key, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        if half and tensor.is_floating_point():
            if not torch.isfinite(tensor.half()).all():
                raise ValueError(f"{key}: half storage needs finite values within 65504, got larger ones")
            tensor = tensor.half()
        state[key] = tensor.contiguous()
    try:
        extra = json.dumps(dict(metadata or {}))
    except TypeError as error:
        raise ValueError(f"metadata: must be what JSON can hold: {error}") from error
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(model.config.to_dict()),
        "metadata": extra,
    }
    _write_atomically(Path(path), serialize(state, metadata=header))


def _write_atomically(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a model is as readable as any other file of the user.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What :func:`save_model` wrote beside the tensors: ``{"config": FRDNetConfig, "metadata": dict}``.

    Raises:
        ValueError: no safetensors file, or one without an FRD-Net configuration.
    """
    _, header = _read_safetensors(Path(path), tensors=False)
    return {"config": _config_of(Path(path), header), "metadata": json.loads(header.get("metadata") or "{}")}


def load_model(path: str | Path, device: str | torch.device = "cpu") -> FRDNet:
    """The model a file holds, in eval mode.

    Args:
        path: a file of :func:`save_model` or ``"demo"``; or a checkpoint of the authors' code (``.pth``),
            which holds no configuration and is read as the preset ``released``.
        device: where to put it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a corrupt file, or one that does not hold such a model.
    """
    file = demo_path() if str(path) == "demo" else Path(path)
    config = read_metadata(file)["config"] if _is_safetensors(file) else PRESETS["released"]
    model = FRDNet(config)
    load_weights(model, file)
    return model.to(device).eval()


def load_weights(model: FRDNet, path: str | Path) -> None:
    """Fill `model` from a file of :func:`save_model`, or from the authors' checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a corrupt file, one of another configuration, names or shapes that do not fit.
    """
    file = Path(path)
    if _is_safetensors(file):
        state, header = _read_safetensors(file)
        differences = model.config.differences(_config_of(file, header))
        if differences:
            raise ValueError(
                f"{file}: holds another configuration; model against file: {'; '.join(differences[:3])}"
            )
        _fill(model, state, file)
        return
    state = _read_pickle(file)
    _fill(
        model,
        _import(file, model, state, released_model) if "fecblock1.0.norm1.weight" in state else state,
        file,
    )


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Fill a MiT encoder from Hugging Face's (``nvidia/mit-b*``) or the original (``mit_b*.pth``) naming.

    Classification and segmentation heads in the file are ignored, as are stages behind the encoder's last
    one; everything else must fit. An encoder with more than three input planes takes the file's weights for
    RGB and starts with zeros for the others, so that it begins as the pretrained one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a corrupt file, names or shapes that do not fit.
    """
    file = Path(path)
    if not isinstance(encoder, MixTransformer):
        raise ValueError(f"{file}: encoder weights fit a MiT only, got {type(encoder).__name__}")
    state = _read_safetensors(file)[0] if _is_safetensors(file) else _read_pickle(file)
    state = {k.removeprefix("segformer."): v for k, v in state.items() if not k.startswith(_HEADS)}
    naming: Naming = huggingface_encoder if any(k.startswith("encoder.") for k in state) else original_encoder
    state = {k: v for k, v in state.items() if _stage_of(k) < len(encoder.stages)}
    _widen(encoder, state, naming(_FIRST_WEIGHT).names[0])
    encoder.load_state_dict(_import(file, encoder, state, naming))


def _stage_of(key: str) -> int:
    match = _FOREIGN_STAGE.match(key)
    if match is None:
        return -1
    return int(match[1]) - 1 if match[1] else int(match[2])


def _widen(encoder: MixTransformer, state: dict[str, Tensor], first: str) -> None:
    own = encoder.state_dict()[_FIRST_WEIGHT]
    got = state.get(first)
    if got is not None and got.dim() == 4 and got.shape[1] == 3 and own.shape[1] > 3:
        state[first] = torch.cat((got, got.new_zeros(got.shape[0], own.shape[1] - 3, *got.shape[2:])), dim=1)


def export_released(model: FRDNet) -> dict[str, Tensor]:
    """The state of a `released` model in the authors' naming and shapes."""
    return export_state(model.state_dict(), released_model)


def _import(file: Path, module: nn.Module, state: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    try:
        return import_state(module.state_dict(), state, naming)
    except ValueError as error:
        raise ValueError(f"{file}: does not fit this {type(module).__name__}: {error}") from error


def _fill(model: FRDNet, state: Mapping[str, Tensor], file: Path) -> None:
    own = model.state_dict()
    try:
        check_names(set(own), set(state))
        for key, tensor in own.items():
            if state[key].shape != tensor.shape:
                raise ValueError(f"{key}: shape {list(tensor.shape)} is needed, got {list(state[key].shape)}")
    except ValueError as error:
        raise ValueError(f"{file}: does not fit this FRDNet: {error}") from error
    model.load_state_dict(dict(state))


def _is_safetensors(file: Path) -> bool:
    """By content: such a file starts with the length of its JSON header, then the header's brace."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    with file.open("rb") as stream:
        start = stream.read(9)
    return file.suffix == ".safetensors" or start[8:9] == b"{"


def _read_safetensors(file: Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()} if tensors else {}  # noqa: SIM118
            return state, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: no valid safetensors file: {_first_line(error)}") from error


def _config_of(file: Path, header: Mapping[str, str]) -> FRDNetConfig:
    if header.get("format") != FORMAT or "config" not in header:
        raise ValueError(f"{file}: holds no FRD-Net configuration (a file of save_model is needed)")
    try:
        return FRDNetConfig.from_dict(json.loads(header["config"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: its configuration is not valid: {_first_line(error)}") from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for files it cannot read
        raise ValueError(f"{file}: no checkpoint of tensors alone: {_first_line(error)}") from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"{file}: a state dict of tensors is needed, got {type(loaded).__name__}")
    return {str(k).removeprefix("module."): v for k, v in loaded.items()}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
