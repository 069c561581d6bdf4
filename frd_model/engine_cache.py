"""Exported copies of networks for the engines that run files: made once, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import cached_assets_path

from .export import export_model
from .exported import check_package
from .frdnet import FRDNet

#: Engines that run a copy in a file, and the ending of theirs. Their packages and extras have the same names.
ENDINGS = {"openvino": ".xml", "onnxruntime": ".onnx"}
_SUMS = "sha256.json"


def export_once(net: FRDNet, engine: str, notify: Callable[[str], object] = lambda text: None) -> Path:
    """The copy of this network in the cache, which is written first, after `notify`, if it is missing or damaged.

    Several processes may ask at once: one writes, the others wait for it. A copy appears whole or not at all, and only
    if it gives PyTorch's logits (`export_model`).

    Raises what `export_model` raises.
    """
    check_package(engine, engine, f"engine {engine}")
    folder = _folder(net, engine)
    if not _is_whole(folder):
        notify(f"exporting the network for {engine}, once: this takes a minute or two")
        with FileLock(f"{folder}.lock"):
            if not _is_whole(folder):
                _write(net, engine, folder)
    return _file(folder, engine)


def _write(net: FRDNet, engine: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        new = Path(temporary, folder.name)
        export_model(net, _file(new, engine), size=128)
        sums = {file.name: _sum(file) for file in new.iterdir()}
        (new / _SUMS).write_text(json.dumps(sums))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)


def _is_whole(folder: Path) -> bool:
    try:
        sums = json.loads((folder / _SUMS).read_bytes())
        return bool(sums) and all(_sum(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sum(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _file(folder: Path, engine: str) -> Path:
    return folder / f"net{ENDINGS[engine]}"


def _folder(net: FRDNet, engine: str) -> Path:
    """Named by everything that the copy depends on: weights, structure, and the code that writes it."""
    key = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        key.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        key.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    key.update(f"{net!r}\n{net.config!r}\n".encode())
    for package in ("frd-kernels", "torch", engine):
        key.update(f"{package} {_version(package)}\n".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        key.update(source.read_bytes())
    root = cached_assets_path("frd-kernels", "engines")
    return root / f"{engine}-{key.hexdigest()[:32]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
