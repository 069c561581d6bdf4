"""Reading images, forging, sample photos and data sets."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "KINDS",
    "MEAN",
    "SPLITS",
    "STD",
    "DatasetError",
    "FolderDataset",
    "ForgeOptions",
    "Forger",
    "Forgery",
    "ForgeryDataset",
    "Found",
    "ImageError",
    "JsonDataset",
    "ManiDataset",
    "Pair",
    "PairDataset",
    "Skipped",
    "describe_skipped",
    "find_images",
    "forge_folder",
    "image_extensions",
    "mask_to_tensor",
    "overlay",
    "read_image",
    "read_mask",
    "sample_photos",
    "scan_images",
    "to_image",
    "to_tensor",
    "write_bytes",
    "write_jpeg",
    "write_json",
    "write_png",
]

_HOME = {
    "KINDS": ".forge_options",
    "MEAN": ".transforms",
    "SPLITS": ".photos",
    "STD": ".transforms",
    "DatasetError": ".dataset",
    "FolderDataset": ".dataset",
    "ForgeOptions": ".forge_options",
    "Forger": ".forge",
    "Forgery": ".forge",
    "ForgeryDataset": ".dataset",
    "Found": ".files",
    "ImageError": ".images",
    "JsonDataset": ".dataset",
    "ManiDataset": ".dataset",
    "Pair": ".dataset",
    "PairDataset": ".dataset",
    "Skipped": ".files",
    "describe_skipped": ".files",
    "find_images": ".files",
    "forge_folder": ".forged_folder",
    "image_extensions": ".files",
    "mask_to_tensor": ".transforms",
    "overlay": ".images",
    "read_image": ".images",
    "read_mask": ".images",
    "sample_photos": ".photos",
    "scan_images": ".files",
    "to_image": ".transforms",
    "to_tensor": ".transforms",
    "write_bytes": ".images",
    "write_jpeg": ".images",
    "write_json": ".images",
    "write_png": ".images",
}


def __getattr__(name: str) -> Any:
    # Lazy, as in frd_model: reading and forging images need no torch, and neither does the help of a command.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
