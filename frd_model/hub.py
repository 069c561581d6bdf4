"""Checkpoints by name: ``hf://owner/name[@revision][/file]`` on the Hugging Face Hub, and local folders.

huggingface_hub downloads into its own cache; what it names by a hash is checked against it at every load.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from huggingface_hub import constants, hf_hub_download, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# What a folder or repository may call its weights, the first one found is taken.
NAMES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# One slash is what pathlib leaves of two.
_URI = re.compile(r"hf:/{1,2}([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.+))?")

#: The page of a repository that `FRDNet.push_to_hub` makes. It names no licence: that is for the owner to choose.
CARD = """---
{{ card_data }}
---

An FRD-Net: it marks the manipulated pixels of a photo.

```python
from frd_model import FRDNet, predict

model = FRDNet.from_pretrained("OWNER/NAME")
result = predict("photo.jpg", model)  # probability, mask, score, verdict
```
"""


class Source(NamedTuple):
    """A repository, its revision (None: the newest), and a file in it (None: the first of NAMES)."""

    repository: str
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        revision, file = f"@{self.revision}" if self.revision else "", f"/{self.file}" if self.file else ""
        return f"hf://{self.repository}{revision}{file}"


def parse(name: str | os.PathLike[str] | Source) -> Source | None:
    """The parts of a name on the Hub; None for any other name. ValueError if it lacks owner or name."""
    if isinstance(name, Source):
        return name
    text = str(name)
    if not text.startswith("hf:/"):
        return None
    match = _URI.fullmatch(text)
    if match is None:
        raise ValueError(f"checkpoint: must be hf://OWNER/NAME[@REVISION][/FILE], got {text!r}")
    return Source(match[1], match[2] and unquote(match[2]), match[3])


def local_file(name: str | os.PathLike[str] | Source, **options: Any) -> Path:
    """The file of a checkpoint's name: downloaded from the Hub, the weights in a folder, or `name` itself.

    Args:
        options: `token`, `cache_dir`, `force_download`, `local_files_only` of huggingface_hub.

    Raises:
        FileNotFoundError: the Hub has no such repository, revision or file.
        PermissionError: the repository's owner must grant access first.
        ConnectionError: the Hub cannot be reached and the cache has no such file, or the download broke off.
        ValueError: a name of another form, or a file that differs from its hash.
    """
    source = parse(name)
    if source is not None:
        return _download(source, options)
    path = Path(os.path.expanduser(str(name)))
    return next((path / file for file in NAMES if (path / file).is_file()), path)


def _download(source: Source, options: dict[str, Any]) -> Path:
    """The weights of `source`, and beside them their config.json and shards."""
    try:
        first = _cached(source, options)
        known = _known(source, first, options) if first else None
        path = _weights(source, first, options)
        is_new = str(path) != known or options.get("force_download", False)
        folder = path.parent
        # Of one commit, whatever is pushed meanwhile.
        snapshot = path.parents[(source.file or "").count("/")]
        others = source._replace(revision=snapshot.name)
        if path.name.endswith(".index.json"):
            _shards(path, others, options)
        beside = (folder / CONFIG).relative_to(snapshot).as_posix()
        _optional(others._replace(file=beside), options, is_new)
        if is_new:
            card = _optional(others._replace(file="README.md"), options, is_new)
            print(f"{source}: licence {licence(card)}, see {_page(source)}", file=sys.stderr)
    # Of several HTTP libraries, with messages of several lines.
    except Exception as error:
        raise _explained(source, error) from error
    return path


def _known(source: Source, file: str, options: dict[str, Any]) -> Any:
    """The path of a file in the cache; None if nothing is known of it, else a mark that the Hub has none."""
    return try_to_load_from_cache(
        source.repository, file, cache_dir=options.get("cache_dir"), revision=source.revision
    )


def _cached(source: Source, options: dict[str, Any]) -> str | None:
    """The name of the weights that the cache has."""
    files = (source.file,) if source.file else NAMES
    return next((file for file in files if isinstance(_known(source, file, options), str)), None)


def _weights(source: Source, first: str | None, options: dict[str, Any]) -> Path:
    """`first`, which the cache has, is asked for first: offline every other name would cost the time limit."""
    if source.file:
        return _file(source, options)
    for name in sorted(NAMES, key=lambda name: name != first):
        try:
            return _file(source._replace(file=name), options)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"{source}: has none of {', '.join(NAMES)}; name a file: {source}/FILE")


def _shards(index: Path, source: Source, options: dict[str, Any]) -> None:
    from .state_files import shard_names

    for name in shard_names(index):
        _file(source._replace(file=name), options)


def _optional(source: Source, options: dict[str, Any], is_new: bool) -> Path | None:
    """A file that the repository need not have. Offline, beside weights of the cache, it may be missing there."""
    known = _known(source, str(source.file), options)
    if not (known is None or isinstance(known, str)):
        return None
    try:
        return _file(source, options)
    except EntryNotFoundError as error:
        if is_new and isinstance(error, LocalEntryNotFoundError):
            raise
        return None


def _file(source: Source, options: dict[str, Any]) -> Path:
    """One file through huggingface_hub's cache, checked against the hash that names it there."""
    path = Path(
        hf_hub_download(
            source.repository,
            source.file or WEIGHTS,
            revision=source.revision,
            library_name="frd_model",
            **options,
        )
    )
    # The cache's names are sha256 of large files, Git's sha1 of small ones; without symbolic links it has none.
    expected = Path(os.readlink(path)).name if path.is_symlink() else ""
    if not _differs(path, expected):
        return path
    damaged = path.parent / os.readlink(path)
    path.unlink()
    damaged.unlink(missing_ok=True)
    raise ValueError(f"{source}: differs from its checksum {expected[:12]}, and was removed: try again")


def _differs(path: Path, expected: str) -> bool:
    if re.fullmatch(r"[0-9a-f]{64}", expected):
        with path.open("rb") as stream:
            return sha_fileobj(stream).hex() != expected
    return bool(re.fullmatch(r"[0-9a-f]{40}", expected)) and git_hash(path.read_bytes()) != expected


def licence(card: Path | None) -> str:
    """The licence in the metadata of a model card: its identifier, with the name of one that is "other"."""
    try:
        metadata = metadata_load(card) if card is not None else None
    # Metadata that is no YAML, text that is no UTF-8.
    except Exception:
        metadata = None
    values = metadata or {}
    found = values.get("license")
    text = ", ".join(map(str, found)) if isinstance(found, list) else str(found or "unknown")
    named = values.get("license_name")
    return " ".join(f"{text} ({named})".split()) if named else text


def _page(source: Source) -> str:
    return f"{constants.ENDPOINT}/{source.repository}"


def _explained(source: Source, error: Exception) -> Exception:
    """One line that says what to do."""
    from .state_files import first_line

    if isinstance(error, HFValidationError):
        return ValueError(f"{source}: no name of a repository: {first_line(error)}")
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{source}: ask for access at {_page(source)}, then run `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        where = f"{constants.ENDPOINT} has no such repository"
        return FileNotFoundError(f"{source}: {where}, or it is private: run `hf auth login` or set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{source}: the repository has no revision {source.revision!r}")
    if isinstance(error, LocalEntryNotFoundError):
        reason = first_line(error.__cause__) if error.__cause__ else "local_files_only is set"
        return ConnectionError(
            f"{source}: not in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} was not reached "
            f"({reason}): load it once online, or give a local file or folder"
        )
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundError(f"{source}: the repository has no such file, see {_page(source)}/tree/main")
    if isinstance(error, (ValueError, FileNotFoundError)):
        return error
    return ConnectionError(f"{source}: the download failed, try again: {first_line(error)}")
