"""A folder of forgeries with their masks and a manifest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from frd_model.output import check_output_folder

from .files import PathLike, expand_user
from .forge import Forger, Forgery
from .forge_options import KINDS, METHODS, ForgeOptions
from .handoff import view_side
from .images import write_jpeg, write_json, write_png
from .transforms import random_view

UInt8 = npt.NDArray[np.uint8]

# The files that `forge_folder` writes into images/ and masks/.
_FORGED = re.compile(rf"\d{{5,}}_({'|'.join((*KINDS, 'authentic'))})_[0-9A-Za-z-]*\.(png|jpg)")


def kind_of(name: str) -> str:
    """The kind, or "authentic", of a file that `forge_folder` named; "" for other names."""
    found = _FORGED.fullmatch(PurePath(name).name)
    return found[1] if found else ""


def forge_folder(
    photos: Mapping[str, UInt8],
    out_dir: PathLike,
    count: int,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    size: int | None = None,
    authentic: float = 0.0,
    extension: str = "png",
    options: ForgeOptions | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Write `count` forgeries: images/NAME.png or .jpg, masks/NAME.png and manifest.json in out_dir.

    Forgery i depends on (seed, i) and the photos only. The photos take turns as host. With `extension` "jpg"
    the file's own compression is the final one. Untouched photos (a fraction `authentic`) get a black mask.

    Args:
        photos: name to uint8 RGB [H,W,3].
        kinds: the kinds to draw from, in equal parts; None for the options' weights.
        methods: the operations to draw from; None for the options' own. Kinds to which none belongs are left out.
        size: side of a random square view of the host; None forges the whole photo.
        overwrite: replace the forgeries of an earlier call in out_dir, which are an error otherwise.

    Returns:
        The manifest's items: name, kind, host, donor, parameters.
    """
    _check_arguments(photos, count, seed, authentic, extension)
    options = options or ForgeOptions()
    if kinds is not None:
        options = replace(options, kinds=dict.fromkeys(kinds, 1.0))
    if methods is not None:
        possible = {k: w for k, w in options.kinds.items() if set(METHODS.get(k, ())) & set(methods)}
        options = replace(options, kinds=possible or options.kinds, methods=tuple(methods))
    if authentic < 1:
        options.check_donors(len(photos))
    quality = options.final_quality
    if extension == "jpg":
        options = replace(options, final_jpeg=0.0)
    out_dir = expand_user(out_dir)
    for file in check_output(out_dir, overwrite):
        file.unlink()
    items = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        forgery, host, donor = _forge_one(rng, photos, index, size, authentic, options)
        name = f"{index:05d}_{forgery.kind}_{re.sub('[^0-9A-Za-z-]+', '-', host)[:100]}"
        image_file = Path(out_dir, "images", f"{name}.{extension}")
        if extension == "jpg":
            forgery.parameters["final"]["jpeg"] = int(rng.integers(quality[0], quality[1] + 1))
            write_jpeg(image_file, forgery.image, forgery.parameters["final"]["jpeg"])
        else:
            write_png(image_file, forgery.image)
        write_png(Path(out_dir, "masks", f"{name}.png"), forgery.mask)
        items.append(
            {
                "name": name,
                "image": f"images/{image_file.name}",
                "mask": f"masks/{name}.png",
                "kind": forgery.kind,
                "host": host,
                "donor": donor,
                "parameters": forgery.parameters,
            }
        )
    manifest = {"seed": seed, "size": size, "count": count, "photos": sorted(photos), "items": items}
    write_json(Path(out_dir, "manifest.json"), manifest)
    return items


def check_output(out_dir: Path, overwrite: bool) -> list[Path]:
    """Create the folders of a run and return the files of an earlier one, to be removed first.

    With forgeries of two runs in one folder the manifest would not describe the data set.

    Raises:
        ValueError: a folder cannot be written, or holds such files or a manifest and `overwrite` is False.
    """
    folders = [out_dir / name for name in ("images", "masks")]
    for folder in folders:
        check_output_folder("output folder", folder)
    old = [file for folder in folders for file in folder.iterdir() if _FORGED.fullmatch(file.name)]
    manifest = out_dir / "manifest.json"
    # Remove the manifest first: a run that stops here must not leave one that lists missing files.
    old = [manifest, *old] if manifest.exists() else old
    if old and not overwrite:
        raise ValueError(
            f"output folder {str(out_dir)!r} must hold no forgeries yet, got {len(old)} files of an earlier run "
            f"such as {str(old[0])!r}; take another folder, or replace them with --overwrite (overwrite=True)"
        )
    return old


def _check_arguments(
    photos: Mapping[str, UInt8], count: int, seed: int, authentic: float, extension: str
) -> None:
    if not photos:
        raise ValueError("photos must hold at least one photo, got none")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if not 0 <= authentic <= 1:
        raise ValueError(f"authentic must be in [0, 1], got {authentic}")
    if extension not in ("png", "jpg"):
        raise ValueError(f"extension must be png or jpg, got {extension!r}")


def _forge_one(
    rng: np.random.Generator,
    photos: Mapping[str, UInt8],
    index: int,
    size: int | None,
    authentic: float,
    options: ForgeOptions,
) -> tuple[Forgery, str, str | None]:
    names = sorted(photos)
    host = names[index % len(names)]
    photo, shape = photos[host], None
    if size is not None:
        photo, shape = random_view(rng, photo, view_side(rng, size, options)), (size, size)
    forger = Forger(rng, options)
    if rng.random() < authentic:
        return forger.authentic(photo, shape), host, None
    donor = None
    if len(names) > 1:
        donor = names[(index + 1 + int(rng.integers(len(names) - 1))) % len(names)]
    forgery = forger.forge(photo, None if donor is None else photos[donor], size=shape)
    return forgery, host, donor if forgery.kind == "splicing" else None
