"""How the public data sets lie on disk: for each, its photos, their masks and what a mask file holds.

A reader takes the folder of a data set and returns its pairs. A mask whose file is missing stays in its pair, so that
loading this pair fails with its name and the others are used.
"""

from __future__ import annotations

import csv
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .files import scan_folder
from .images import ImageError, read_image, read_mask
from .pairing import DatasetError, Pair

Bool = npt.NDArray[np.bool_]
Reader = Callable[[Path], list[Pair]]
# (mask file, (H, W) of the photo, whether black is edited) -> bool [H, W]
MaskReader = Callable[..., Bool]


class Layout(NamedTuple):
    """A public data set.

    about: one line for the help. read: its pairs. counts: known numbers of forged and of untouched photos, in the
    versions in use; None: not checked. invert: its masks are black where edited. read_mask: for files that are
    not black-and-white images.
    """

    about: str
    read: Reader
    counts: tuple[tuple[int, int | None], ...] = ()
    invert: bool = False
    read_mask: MaskReader = read_mask


def _folder(root: Path, *names: str) -> Path:
    """The first of the folders `names` below root, whatever their letter case.

    Raises:
        DatasetError: none is there.
    """
    if not root.is_dir():
        raise DatasetError(f"data set {str(root)!r} must be a folder, got none there")
    for name in names:
        found = root
        for part in name.split("/"):
            below = (entry for entry in found.iterdir() if entry.is_dir())
            found = next((entry for entry in below if entry.name.lower() == part.lower()), root / "\0")
            if found.name == "\0":
                break
        else:
            return found
    raise DatasetError(
        f"data set {str(root)!r} must hold the folder {' or '.join(map(repr, names))}, got none of them"
    )


def _has(root: Path, *names: str) -> bool:
    try:
        _folder(root, *names)
    except DatasetError:
        return False
    return True


def _images(folder: Path) -> list[Path]:
    try:
        return scan_folder(folder, recursive=True).images
    except ImageError as error:
        raise DatasetError(str(error)) from None


def _untouched(files: Iterable[Path]) -> list[Pair]:
    return [Pair(file, None) for file in files]


def _forged(photos: Iterable[Path], masks: Path, key: Callable[[str], str], expected: str) -> list[Pair]:
    """Photos with the masks below `masks` of the same key; `expected` names a mask that is not there."""
    found = {key(file.stem): file for file in _images(masks)}
    return [Pair(p, found.get(key(p.stem), masks / expected.format(p.stem))) for p in photos]


def _casia(root: Path) -> list[Pair]:
    """Au, Tp, and masks NAME_gt.png; the folders of the masks have many names."""
    forged = _images(_folder(root, "Tp", "tampered", "Modified Tp"))
    masks = _folder(
        root, "Gt", "groundtruth", "mask", "masks", "CASIA 1.0 groundtruth", "CASIA1_groundtruth",
        "CASIA 2 Groundtruth", "CASIA2_groundtruth", "CASIA 2.0 groundtruth",
    )  # fmt: skip
    pairs = _forged(forged, masks, lambda name: re.sub("_gt$", "", name, flags=re.IGNORECASE), "{}_gt.png")
    untouched = _images(_folder(root, "Au", "authentic")) if _has(root, "Au", "authentic") else []
    return pairs + _untouched(untouched)


def _columbia(root: Path) -> list[Pair]:
    """4cam_splc, its folder edgemask (NAME_edgemask.jpg), 4cam_auth."""
    spliced = _folder(root, "4cam_splc")
    photos = [file for file in _images(spliced) if file.parent == spliced]
    pairs = _forged(
        photos,
        _folder(root, "4cam_splc/edgemask"),
        lambda name: name.removesuffix("_edgemask"),
        "{}_edgemask.jpg",
    )
    if _has(root, "4cam_auth"):
        untouched = _folder(root, "4cam_auth")
        pairs += _untouched(file for file in _images(untouched) if file.parent == untouched)
    return pairs


def _read_columbia_mask(path: Path, size: tuple[int, int] | None = None, invert: bool = False) -> Bool:
    """Green is the spliced part, red the rest; the darker half of each colour lies along the border."""
    colours = read_image(path)
    if size is not None and colours.shape[:2] != size:
        got = f"{colours.shape[1]} x {colours.shape[0]}"
        raise ImageError.of(
            "size", f"mask {str(path)!r} must have its photo's size {size[1]} x {size[0]}, got {got}"
        )
    return np.asarray((colours[:, :, 1] > 120) != invert)


def _cover(root: Path) -> list[Pair]:
    """image/N.tif, image/Nt.tif and mask/Nforged.tif."""
    photos = _images(_folder(root, "image"))
    masks = _folder(root, "mask")
    forged = [file for file in photos if file.stem.endswith("t")]
    found = {file.stem: file for file in _images(masks)}
    pairs = []
    for photo in forged:
        name = f"{photo.stem[:-1]}forged"
        pairs.append(Pair(photo, found.get(name, masks / f"{name}.tif")))
    return pairs + _untouched(file for file in photos if not file.stem.endswith("t"))


def _nist16(root: Path) -> list[Pair]:
    """probe/, and the mask of each probe in the reference tables, whose columns "|" divides."""
    table = _folder(root, "reference/manipulation") / "NC2016-manipulation-ref.csv"
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="|"))
        columns = [(row["ProbeFileName"], row["ProbeMaskFileName"], row["IsTarget"]) for row in rows]
    except OSError as error:
        raise DatasetError(f"table {str(table)!r} must be readable, got: {error.strerror}") from None
    except (KeyError, ValueError) as error:
        raise DatasetError(
            f"table {str(table)!r} must have the columns ProbeFileName, ProbeMaskFileName and IsTarget, "
            f"got none of the name {error}"
        ) from None
    # The table has a row for each manipulation of a photo.
    pairs = {
        photo: Pair(root / photo, root / mask if target == "Y" and mask else None)
        for photo, mask, target in columns
    }
    return list(pairs.values())


def _cocoglide(root: Path) -> list[Pair]:
    """fake/glide_inpainting_val2017_ID_up.png, mask/CLASS_ID_mask.png and real/CLASS_ID.png."""
    pairs = _forged(_images(_folder(root, "fake")), _folder(root, "mask"), _last_number, "CLASS_{}_mask.png")
    return pairs + _untouched(_images(_folder(root, "real")) if _has(root, "real") else [])


def _last_number(name: str) -> str:
    return (re.findall(r"\d+", name) or [name])[-1]


def _imd2020(root: Path) -> list[Pair]:
    """A folder for each original: NAME_orig.*, and forgeries NAME.* with NAME_mask.png beside them."""
    files = _images(root)
    masks = {(file.parent, file.stem): file for file in files if file.stem.endswith("_mask")}
    pairs = []
    for file in files:
        if file.stem.endswith("_orig"):
            pairs.append(Pair(file, None))
        elif not file.stem.endswith("_mask"):
            name = f"{file.stem}_mask"
            pairs.append(Pair(file, masks.get((file.parent, name), file.with_name(f"{name}.png"))))
    return pairs


def _fantastic_reality(root: Path) -> list[Pair]:
    """ColorFakeImages with SegmentationFake/NAME.npz, and ColorRealImages; possibly below dataset/."""
    root = _folder(root, "dataset") if _has(root, "dataset/ColorFakeImages") else root
    masks = _folder(root, "SegmentationFake", "masks")
    found = {file.stem: file for file in sorted(masks.rglob("*")) if file.is_file()}
    pairs = [
        Pair(p, found.get(p.stem, masks / f"{p.stem}.npz")) for p in _images(_folder(root, "ColorFakeImages"))
    ]
    return pairs + _untouched(
        _images(_folder(root, "ColorRealImages")) if _has(root, "ColorRealImages") else []
    )


def _read_segmentation(path: Path, size: tuple[int, int] | None = None, invert: bool = False) -> Bool:
    """An array of class numbers in an npz file, 0 where untouched; else an image."""
    if path.suffix.lower() != ".npz":
        return read_mask(path, size, invert=invert)
    try:
        with np.load(path) as arrays:
            classes = np.squeeze(arrays[arrays.files[0]])
    except (OSError, ValueError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ImageError(f"mask {str(path)!r} must be a readable npz file, got: {error}") from None
    if classes.ndim != 2 or classes.dtype.kind not in "biuf":
        got = f"{classes.dtype} {list(classes.shape)}"
        raise ImageError.of("mask", f"mask {str(path)!r} must be a plane of class numbers, got {got}")
    if size is not None and classes.shape != size:
        got = f"{classes.shape[1]} x {classes.shape[0]}"
        raise ImageError.of(
            "size", f"mask {str(path)!r} must have its photo's size {size[1]} x {size[0]}, got {got}"
        )
    return np.asarray((classes > 0) != invert)


# kind -> folders of its photos and of its masks; "bcmc" are the photos of "bcm", compressed once more
_TAMPCOCO = {"cm": "cm", "sp": "sp", "bcm": "bcm", "bcmc": "bcm"}


def _tampcoco(root: Path) -> list[Pair]:
    """The lists {cm,sp,bcm,bcmc}_COCO_list.txt with lines image,mask; without them the folders, paired by name."""
    lists = sorted(root.glob("*_COCO*list.txt")) if root.is_dir() else []
    if lists:
        return [pair for file in lists for pair in read_pair_list(file, root)]
    kinds = [kind for kind in _TAMPCOCO if _has(root, f"{kind}_images")]
    if not kinds:
        _folder(root, *(f"{kind}_images" for kind in _TAMPCOCO))
    pairs = []
    for kind in kinds:
        masks = _folder(root, f"{_TAMPCOCO[kind]}_masks")
        pairs += _forged(_images(_folder(root, f"{kind}_images")), masks, _without_compression, "{}.png")
    return pairs


def _without_compression(name: str) -> str:
    """The name without what compression adds to it: "_aligned_Q76", and the extensions of earlier files."""
    return re.sub(r"_(aligned|crop\w*?|resize_[\d.]+)?_?Q\d+|\.(jpg|png)", "", name)


def _read_labels(path: Path, size: tuple[int, int] | None = None, invert: bool = False) -> Bool:
    """A grey image that is 0 where untouched and 1 or 255 where edited."""
    try:
        return read_mask(path, size, invert=invert)
    except ImageError as error:
        if error.kind != "mask":
            raise
        # By our rule a mask of 0 and 1 is an error, but these files are such.
        values = read_image(path)[:, :, 0]
        if set(np.unique(values)) - {0, 1}:
            raise
        return np.asarray((values > 0) != invert)


def _dso1(root: Path) -> list[Pair]:
    """DSO-1/splicing-N.png and normal-N.png, DSO-1-Fake-Images-Masks/splicing-N.png."""
    photos = _images(_folder(root, "DSO-1"))
    forged = [file for file in photos if file.stem.startswith("splicing")]
    masks = _folder(root, "DSO-1-Fake-Images-Masks")
    untouched = (file for file in photos if not file.stem.startswith("splicing"))
    return _forged(forged, masks, lambda name: name, "{}.png") + _untouched(untouched)


def read_pair_list(path: Path, root: Path | None = None) -> list[Pair]:
    """A text list with a line for each photo: "image mask", "image mask label" (0 or 1) or the image alone, divided by
    spaces, tabs or commas. The mask of an untouched photo is None or Negative, or not there.

    Relative paths start at `root`, the list's folder by default.

    Raises:
        DatasetError: no readable list, or no pair in it.
    """
    root = path.parent if root is None else root
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DatasetError(f"list {str(path)!r} must be a readable file, got: {error.strerror}") from None
    except ValueError as error:
        raise DatasetError(f"list {str(path)!r} must be text, got: {error}") from None
    pairs = []
    for line in lines:
        if line.strip() and not line.lstrip().startswith("#"):
            image, mask = _split_line(line.strip(), root)
            pairs.append(Pair(root / image, root / mask if mask else None))
    if not pairs:
        raise DatasetError(f"list {str(path)!r} must name photos, got none")
    if not any(os.path.isfile(pair.image) for pair in pairs):
        raise DatasetError(
            f"list {str(path)!r} must name files below {str(root)!r}, got {str(pairs[0].image)!r}"
        )
    return pairs


def _split_line(line: str, root: Path) -> tuple[str, str]:
    """Photo and mask, "" for none. A name may hold spaces where tabs or commas divide, or where no mask follows."""
    divider = next((d for d in ("\t", ",") if d in line), None)
    if divider is None and os.path.isfile(root / line):
        return line, ""
    parts = [part.strip() for part in line.split(divider)]
    if len(parts) > 2 and parts[-1] in ("0", "1"):
        parts.pop()
    if len(parts) == 1:
        return parts[0], ""
    # Lists of the field have a third column with other files of the pair.
    image, mask = parts[:2] if divider else (" ".join(parts[:-1]), parts[-1])
    return image, "" if mask.lower() in ("none", "negative") else mask


LAYOUTS: dict[str, Layout] = {
    "casia1": Layout("CASIA v1: Au, Tp, groundtruth", _casia, ((920, 800), (921, 800))),
    "casia2": Layout("CASIA v2: Au, Tp, groundtruth", _casia, ((5123, 7491), (5105, 7491))),
    "columbia": Layout(
        "Columbia: 4cam_auth, 4cam_splc", _columbia, ((180, 183),), read_mask=_read_columbia_mask
    ),
    "cover": Layout("COVERAGE: image, mask", _cover, ((100, 100),)),
    "nist16": Layout("NIST NC2016: probe, reference", _nist16, ((564, None), (160, None)), invert=True),
    "cocoglide": Layout("COCOGlide: fake, mask, real", _cocoglide, ((512, 512),)),
    "imd2020": Layout("IMD2020: a folder for each original", _imd2020, ((2010, 414),)),
    "fantasticreality": Layout(
        "FantasticReality: ColorFakeImages, ColorRealImages, SegmentationFake",
        _fantastic_reality,
        ((19423, 16592),),
        read_mask=_read_segmentation,
    ),
    "tampcoco": Layout(
        "tampered COCO: cm, sp, bcm and bcmc images and masks", _tampcoco, read_mask=_read_labels
    ),
    "dso1": Layout("DSO-1: DSO-1, DSO-1-Fake-Images-Masks", _dso1, ((100, 100),), invert=True),
}
