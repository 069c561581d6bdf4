"""Keeps torch.compile from reusing graphs that it cached with another version of this package.

Its cache keys hold the name of an operator, but neither its fake nor its backward, which are compiled into the graph.
"""

from __future__ import annotations

import hashlib
import pathlib

from torch.compiler import config

from ._torch_internals import config_entry


def fingerprint(package: pathlib.Path) -> str:
    """A hash of the package's Python sources, for `add_to_keys`."""
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return f"frd_kernels-{digest.hexdigest()[:16]}"


def add_to_keys(tag: str) -> None:
    """Appends to `torch.compiler.config.cache_key_tag`, for every thread."""
    # In torch 2.14, unlike 2.11, an assignment is local to a thread; the other threads read the entry's default.
    entry = config_entry(config, "cache_key_tag")
    if hasattr(entry, "env_value_default"):
        known = entry.env_value_default if isinstance(entry.env_value_default, str) else entry.default
        entry.env_value_default = _joined(known, tag)
    if tag not in config.cache_key_tag.split():
        config.cache_key_tag = _joined(config.cache_key_tag, tag)


def _joined(known: str, tag: str) -> str:
    return known if tag in known.split() else f"{known} {tag}".strip()
