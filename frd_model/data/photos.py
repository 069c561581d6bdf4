"""Authentic sample photos from the installed scikit-image and scikit-learn. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

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


def sample_photos(split: str = "all") -> dict[str, npt.NDArray[np.uint8]]:
    """Name (without extension) to uint8 RGB photo [H,W,3], of a split or "all", sorted by name.

    Raises:
        RuntimeError: scikit-image or scikit-learn is not installed, or its package lacks the photo.
    """
    if split != "all" and split not in SPLITS:
        raise ValueError(f"split must be one of train, val, heldout, all, got {split!r}")
    files = sorted(name for key, names in SPLITS.items() if split in ("all", key) for name in names)
    folders = _folders()
    # Not at the top: the help of the commands needs SPLITS, but no OpenCV.
    from .images import read_image

    return {Path(name).stem: read_image(_locate(name, folders)) for name in files}


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
