"""Keeps graphs that torch.compile cached with another version of this package from being used with this one.

The keys of its caches hold an operator's name, but neither its fake nor its derivative; both are compiled into the
graph.
"""

from __future__ import annotations

import hashlib
import pathlib

from torch.compiler import config

from ._torch_internals import config_entry


def fingerprint(package: pathlib.Path) -> str:
    """Differs for any two versions of the package's Python code."""
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return f"frd_kernels-{digest.hexdigest()[:16]}"


def add_to_keys(tag: str) -> None:
    """Appends to `torch.compiler.config.cache_key_tag`, for every thread."""
    # In torch 2.14, unlike 2.11, an assignment holds for one thread; that of all others stands in the entry alone.
    entry = config_entry(config, "cache_key_tag")
    if hasattr(entry, "env_value_default"):
        known = entry.env_value_default if isinstance(entry.env_value_default, str) else entry.default
        entry.env_value_default = _joined(known, tag)
    if tag not in config.cache_key_tag.split():
        config.cache_key_tag = _joined(config.cache_key_tag, tag)


def _joined(known: str, tag: str) -> str:
    return known if tag in known.split() else f"{known} {tag}".strip()
