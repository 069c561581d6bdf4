"""Authentic sample photos: those of the installed scikit-image and scikit-learn, or of a folder with the same splits.

Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .files import Found, ImageError, PathLike, describe_skipped, expand_user, scan_folder
from .forge_options import MIN_SIDE

# Fixed by photo: no scene is in two splits (the two motorcycle views are one scene). Held-out and validation photos
# are in colour and show other subjects than training; grey textures and micrographs are for training only. Left out,
# because they are drawings or have no photographic noise: chessboard, colour wheel, horse, logo, phantom.
SPLITS: dict[str, tuple[str, ...]] = {
    "heldout": ("astronaut.png", "china.jpg", "coffee.png"),
    "val": ("chelsea.png", "rocket.jpg"),
    "train": (
        "brick.png",
        "camera.png",
        "cell.png",
        "coins.png",
        "flower.jpg",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "page.png",
        "retina.jpg",
        "text.png",
    ),
}

_FOLDERS = (("skimage", "data"), ("sklearn", "datasets/images"))


def sample_photos(split: str = "all", folder: PathLike | None = None) -> dict[str, npt.NDArray[np.uint8]]:
    """Name to uint8 RGB photo [H,W,3], of a split or "all", sorted by file name.

    Args:
        split: train, val, heldout or all.
        folder: take the photos of folder/train, folder/val and folder/heldout, as `tools/fetch_photos.py` makes them,
            in the place of those of the packages.

    The name is that of the file without its extension, or, where two photos would share it, split/file.

    Raises:
        RuntimeError: scikit-image or scikit-learn is not installed, or its package lacks the photo.
        ImageError: the folder of a split cannot be listed or holds no image, or a photo cannot be used.
    """
    # Not at the top: the help of the commands needs SPLITS, but no OpenCV.
    from .images import read_image

    files = sample_files(split, folder).images
    shared = Counter(file.stem for file in files)
    photos = {}
    for file in files:
        photo = read_image(file)
        height, width = photo.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise ImageError(
                f"photo {str(file)!r} must have sides of at least {MIN_SIDE}, got {width} x {height}"
            )
        photos[file.stem if shared[file.stem] == 1 else f"{file.parent.name}/{file.name}"] = photo
    return photos


def sample_files(split: str = "all", folder: PathLike | None = None) -> Found:
    """The files of `sample_photos`, and the entries of the folders that are no photos. Raises as it does."""
    if split != "all" and split not in SPLITS:
        raise ValueError(f"split must be one of train, val, heldout, all, got {split!r}")
    splits = [key for key in SPLITS if split in ("all", key)]
    if folder is None:
        folders = _folders()
        return Found(
            [_locate(name, folders) for name in sorted(n for key in splits for n in SPLITS[key])], []
        )
    found = [_scan(expand_user(folder) / key) for key in splits]
    images = [image for part in found for image in part.images]
    skipped = [entry for part in found for entry in part.skipped]
    return Found(sorted(images, key=lambda image: (image.name, image)), skipped)


def _scan(folder: Path) -> Found:
    found = scan_folder(folder)
    if not found.images:
        entries = describe_skipped(found.skipped) or "nothing"
        raise ImageError(f"photo folder {str(folder)!r} must hold at least one image, got {entries}")
    return found


def _folders() -> list[Path]:
    """The photo folders of both packages, found without importing them."""
    folders = []
    for package, folder in _FOLDERS:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError(
                f"the sample photos need the package {package}, which is not installed: "
                "run `pip install scikit-image scikit-learn`"
            )
        folders.append(Path(next(iter(spec.submodule_search_locations)), folder))
    return folders


def _locate(name: str, folders: list[Path]) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise RuntimeError(
        f"sample photo {name} must lie in {' or '.join(map(str, folders))}, got no such file: "
        "run `pip install --force-reinstall scikit-image scikit-learn`"
    )
