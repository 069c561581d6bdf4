"""Read the tensors of any checkpoint file, and the configuration that it holds.

Only tensors and plain containers are unpickled (``weights_only=True``); objects of other classes become placeholders
without behaviour.
"""

from __future__ import annotations

import builtins
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import FRDNetConfig, model_config
from .state_dicts import State

FORMAT = "frd_model"
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.")
# Functions and lower-case classes that only build values. All other functions in a pickle are refused.
_VALUES = {
    "copyreg._reconstructor",
    "collections.defaultdict",
    "collections.deque",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "functools.partial",
}
_WAY_OUT = "if you trust it, save its state dict alone: torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
_SHARDED = "holds one process's part of a sharded net: save the full state dict (save_model in every process)"


class Stored(NamedTuple):
    """The tensors of a file by their dotted path; its configuration and the metadata of save_model, if it has them."""

    state: State
    config: FRDNetConfig | None
    metadata: dict[str, Any]


def read(file: Path) -> Stored:
    """Read a file of safetensors or torch.save, or all shards of an index.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has another format, is damaged, or holds no tensors.
    """
    start = _start(file)
    if _is_index(file):
        return Stored(_read_shards(file), config_beside(file), {})
    if _SHARD.search(file.name):
        raise ValueError(f"{file}: one shard of several; give the index beside them (*.index.json)")
    if is_safetensors(file):
        state, header = read_safetensors(file)
        config = config_in_header(file, header)
        return Stored(
            state, config or config_beside(file), metadata_in_header(file, header) if config else {}
        )
    _refuse_foreign(file, start)
    loaded = _read_pickle(file, start)
    state = dict(_tensors(loaded))
    if not state:
        raise ValueError(f"{file}: a state dict of tensors is needed, got {_kind(loaded)}")
    if any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        state = _gather(file, state)
    return Stored(state, _config_in(file, loaded) or config_beside(file), {})


def _gather(file: Path, state: State) -> State:
    """The full tensors of a file that holds this process's shards. All processes must call it."""
    if not torch.distributed.is_initialized():
        raise ValueError(f"{file}: {_SHARDED}")
    return {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in state.items()}


def _tensors(value: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested mappings by their dotted path. Sequences hold only optimizer states and histories."""
    if not isinstance(value, Mapping) or depth > 8:
        return
    for key, inner in value.items():
        if isinstance(inner, Tensor):
            yield f"{where}{key}", inner
        else:
            yield from _tensors(inner, f"{where}{key}.", depth + 1)


def is_safetensors(file: Path) -> bool:
    """Whether the file starts as safetensors does: the length of the JSON header, then its opening brace."""
    start = _start(file)
    return start[8:9] == b"{" and start[5:8] == bytes(3)


def _start(file: Path) -> bytes:
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        hint = f", such as {inside[0]} in it" if inside else ""
        if (file / ".metadata").is_file():
            hint = ": convert it, python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE"
        raise ValueError(f"{file}: a directory; a file is needed{hint}")
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    # Opening a pipe would wait for a writer.
    if not file.is_file():
        raise ValueError(f"{file}: a device, pipe or socket; a file is needed")
    with file.open("rb") as stream:
        start = stream.read(256)
    if not start:
        raise ValueError(f"{file}: the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: a Git LFS pointer, not the weights themselves: run `git lfs pull`")
    return start


def _refuse_foreign(file: Path, start: bytes) -> None:
    """ValueError that names the format of a file that neither safetensors nor torch.save wrote."""
    what = ""
    if file.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80")):
        what = "no valid safetensors file"
    elif start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        what = "an HTML page, not a checkpoint: the download has failed"
    elif start.startswith(b"\x89HDF"):
        what = "an HDF5 (Keras) file, not a checkpoint of PyTorch"
    elif file.suffix == ".onnx" or (
        start[0] == 8 and start[1:2] < b"\x20" and start[2:3] in b"\x12\x1a\x22\x3a\x42"
    ):
        what = "an ONNX graph, which holds no state dict: give the checkpoint, or use frd_model.exported.load_exported"
    elif start.startswith(b"PK"):
        what = _zip_problem(file)
    elif not start.startswith(b"\x80"):
        what = "no checkpoint of tensors alone: neither a file of safetensors nor of torch.save"
    if what:
        raise ValueError(f"{file}: {what}")


def _zip_problem(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError):
        return "no checkpoint of tensors alone: a truncated or damaged zip archive (copied in part?)"
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "a TorchScript archive: save its state dict instead, "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
        )
    if any(name.endswith("archive_format") for name in names):
        return "an archive of torch.export: give the checkpoint, or use frd_model.exported.load_exported"
    if not any(name.endswith("data.pkl") for name in names):
        return "a zip archive, but none of torch.save"
    return ""


def _is_index(file: Path) -> bool:
    return file.name.endswith(".index.json")


def shard_names(index: Path) -> list[str]:
    """The files that an index lists, which are beside it. ValueError if it is no index."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted({os.path.basename(name) for name in names})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{index}: no index of shards: {first_line(error)}") from error


def _read_shards(file: Path) -> State:
    state: State = {}
    for name in shard_names(file):
        shard = file.with_name(name)
        start = _start(shard)
        state |= read_safetensors(shard)[0] if is_safetensors(shard) else _tensors(_read_pickle(shard, start))
    return state


def read_safetensors(file: Path, *, tensors: bool = True) -> tuple[State, dict[str, str]]:
    """Tensors (unless `tensors` is False) and header of a safetensors file; ValueError if it is damaged."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()} if tensors else {}  # noqa: SIM118
            return state, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: no valid safetensors file: {first_line(error)}") from error


def config_in_header(file: Path, header: Mapping[str, str]) -> FRDNetConfig | None:
    """The configuration that save_model writes; None for other files."""
    if header.get("format") != FORMAT or "config" not in header:
        return None
    try:
        return FRDNetConfig.from_dict(json.loads(header["config"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: its configuration is not valid: {first_line(error)}") from error


def metadata_in_header(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """The metadata that save_model was given."""
    try:
        return dict(json.loads(header.get("metadata") or "{}"))
    except (ValueError, TypeError):
        raise ValueError(f"{file}: its metadata must be a JSON object, got something else") from None


def config_beside(file: Path) -> FRDNetConfig | None:
    """The configuration in config.json next to the file; None if there is none."""
    path = file.with_name("config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        values = values.get("config", values)
        known = FRDNetConfig().to_dict().keys() & values.keys()
    except (AttributeError, ValueError):
        return None
    if "encoder" not in known:
        return None
    try:
        return FRDNetConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its configuration is not valid: {first_line(error)}") from error


def _config_in(file: Path, loaded: Any) -> FRDNetConfig | None:
    """The model section of the training configuration in last.pt of `frd train`."""
    config = loaded.get("config") if isinstance(loaded, Mapping) else None
    section = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(section, Mapping) or not {"name", "preset"} <= section.keys():
        return None
    try:
        return model_config(section["name"], section["preset"], **section.get("options", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: its configuration is not valid: {first_line(error)}") from error


class _Placeholder(list[Any]):
    """Stands in for an object of any other class: accepts any arguments, elements and state."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass


def _read_pickle(file: Path, start: bytes) -> Any:
    names = {"argparse.Namespace"}
    is_zip = start.startswith(b"PK")
    try:
        names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) if is_zip else set()
    # torch raises half a dozen types for files it cannot read.
    except Exception as error:
        raise ValueError(f"{file}: no checkpoint of tensors alone: {_reason(error)}") from error
    _refuse_globals(file, names)
    try:
        with torch.serialization.safe_globals([_stand_in(name) for name in names]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        raise ValueError(f"{file}: no checkpoint of tensors alone: {_reason(error)}") from error


def _stand_in(name: str) -> tuple[Any, str]:
    # The unpickler fills dictionaries of exactly this type.
    return (lambda *_: {}) if name == "collections.defaultdict" else type("_P", (_Placeholder,), {}), name


def _refuse_globals(file: Path, names: set[str]) -> None:
    """ValueError for objects that a placeholder cannot replace: tensor shards, whole networks, functions."""
    if any(n.startswith("torch.distributed.") and n.endswith(("DTensor", "ShardedTensor")) for n in names):
        raise ValueError(f"{file}: {_SHARDED}")
    if any(n.startswith("frd_model.") and n.endswith(".FRDNet") for n in names):
        raise ValueError(f"{file}: a whole pickled net: save its state dict instead, or use save_model")
    acting = sorted(n for n in names if not _is_value(n))
    if acting:
        raise ValueError(f"{file}: no checkpoint of tensors alone: it would call {acting[0]}; {_WAY_OUT}")


def _is_value(name: str) -> bool:
    module, _, last = name.rpartition(".")
    if module == "builtins":
        return isinstance(getattr(builtins, last, None), type)
    return last[:1].isupper() or name in _VALUES or module.split(".")[0] == "numpy"


def _reason(error: BaseException) -> str:
    """The cause in torch.load's message of several lines."""
    found = re.search(r"WeightsUnpickler error: Unsupported global: GLOBAL (\S+)", str(error))
    if found:
        return f"it holds {found[1]}; {_WAY_OUT}"
    found = re.search(r"WeightsUnpickler error: (.+)", str(error))
    return found[1][:200] if found else first_line(error)


def _kind(loaded: Any) -> str:
    return "an object of a class" if isinstance(loaded, _Placeholder) else type(loaded).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
