"""Forgeries of authentic photos: splicing, copy-move, removal and retouching, with masks and a record of what was done.

The edited region differs from its surroundings as in real forgeries: by another noise level, sharpness,
resampling or JPEG history. No single trace means "edited": hosts, donors and untouched photos draw their histories, and
what happens to the finished image, from the same distributions, so only the inconsistency inside one image reveals
an edit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from .forge_options import KINDS, MIN_SIDE, ForgeOptions
from .handoff import finish
from .retouch import FILTERS, blend_gradients, fill_with_patches, warp
from .shapes import follow_content, random_shape
from .traces import random_filter, random_history

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float32]

_ATTEMPTS = 5
# Drawn more often than the other operations of its kind, as it is in life.
_WEIGHTS = {"paste": 2.0}
# Mean absolute change of the edited region in grey levels, where it is replaced and where it is filtered.
_MIN_CHANGE = 4.0
_MIN_FILTER_CHANGE = 1.5


class Forgery(NamedTuple):
    """An image (uint8 RGB [H,W,3]), its mask (bool [H,W], True where edited), the kind and its parameters."""

    image: UInt8
    mask: Bool
    kind: str
    parameters: dict[str, Any]


class _Edit(NamedTuple):
    """Source pixels [h,w,3] for the window at (top, left), and the edited region [h,w] in it."""

    top: int
    left: int
    source: UInt8
    region: Bool


class Forger:
    """Makes random forgeries from a seed or a NumPy generator; the same seed and calls give the same bytes."""

    def __init__(self, seed: int | np.random.Generator = 0, options: ForgeOptions | None = None) -> None:
        self.rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
        self.options = options or ForgeOptions()
        self._makers: dict[str, Callable[..., _Edit]] = {
            "splicing": self._splice,
            "copy_move": self._copy_move,
            "removal": self._remove,
            "retouch": self._retouch,
        }

    def forge(
        self,
        photo: UInt8,
        donor: UInt8 | None = None,
        kind: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> Forgery:
        """Forge one photo (uint8 RGB [H,W,3], sides of at least 32).

        Args:
            donor: another photo, which splicing needs.
            kind: one of `KINDS`; None draws it by the options' weights, splicing only where there is a donor.
            size: (height, width) of the result, at most the photo's; see `handoff.finish`. None: a hand-off may make
                the result smaller than the photo.
        """
        _check_photo("photo", photo)
        if donor is not None:
            _check_photo("donor", donor)
        if kind is None:
            kind = self._draw_kind(donor is not None)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "splicing" and donor is None:
            raise ValueError("donor must be given for splicing, got None")
        host, record = self._history(photo)
        edit, parameters = self._edit(host, donor, kind)
        parameters = {"history": record, **parameters}
        image, mask = self._compose(host, edit, kind, parameters)
        return self._finish(image, mask, kind, parameters, size)

    def authentic(self, photo: UInt8, size: tuple[int, int] | None = None) -> Forgery:
        """An untouched photo with the history and the hand-off that a forgery would have had."""
        _check_photo("photo", photo)
        image, record = self._history(photo)
        mask = np.zeros(photo.shape[:2], np.bool_)
        return self._finish(image, mask, "authentic", {"history": record}, size)

    def _edit(self, host: UInt8, donor: UInt8 | None, kind: str) -> tuple[_Edit, dict[str, Any]]:
        """The first of a few random edits that changes its region visibly, or else the one that changes it most.

        Filling a hole in a clear sky, or copying sky onto sky, leaves nothing to find: its mask would be wrong.
        """
        best: tuple[float, _Edit, dict[str, Any]] | None = None
        methods = self.options.methods_of(kind)
        if not methods:
            raise ValueError(f"methods must hold one that belongs to {kind}, got {self.options.methods}")
        weights = np.array([_WEIGHTS.get(name, 1.0) for name in methods])
        method = str(self.rng.choice(methods, p=weights / weights.sum()))
        enough = _MIN_FILTER_CHANGE if kind == "retouch" else _MIN_CHANGE
        for _ in range(_ATTEMPTS):
            parameters: dict[str, Any] = {"method": method}
            edit = self._makers[kind](host, donor, parameters)
            change = _change(host, edit)
            if best is None or change > best[0]:
                best = change, edit, parameters
            if change >= enough:
                break
        assert best is not None
        return best[1], best[2]

    def _draw_kind(self, has_donor: bool) -> str:
        weights = {k: w for k, w in self.options.kinds.items() if w > 0 and (has_donor or k != "splicing")}
        if not weights:
            raise ValueError("donor must be given where splicing is the only kind, got None")
        names = sorted(weights)
        share = np.cumsum([weights[n] for n in names])
        return names[int(np.searchsorted(share, self.rng.random() * share[-1], side="right"))]

    def _history(self, image: UInt8) -> tuple[UInt8, dict[str, Any]]:
        o = self.options
        return random_history(self.rng, image, o.filter_history, o.jpeg_history, o.history_quality)

    def _finish(
        self,
        image: UInt8,
        mask: Bool,
        kind: str,
        parameters: dict[str, Any],
        size: tuple[int, int] | None,
    ) -> Forgery:
        image, mask, parameters["final"] = finish(self.rng, image, mask, self.options, size)
        parameters["area"] = round(float(mask.mean()), 5)
        return Forgery(image, mask, kind, parameters)

    def _region(self, size: tuple[int, int], area: tuple[float, float], parameters: dict[str, Any]) -> Bool:
        shape = self.options.shapes[int(self.rng.integers(len(self.options.shapes)))]
        parameters["shape"] = shape
        return random_shape(self.rng, size, area, shape, self.options.cut_by_frame)

    def _splice(self, host: UInt8, donor: UInt8, parameters: dict[str, Any]) -> _Edit:
        region = self._region((host.shape[0], host.shape[1]), self.options.area, parameters)
        top, left, height, width = _window(region)
        matrix = self._transform(height, width, (donor.shape[0], donor.shape[1]), parameters)
        centre = self._place(matrix, height, width, (donor.shape[0], donor.shape[1]))
        parameters["from"] = [round(float(c), 1) for c in centre]
        # The donor's history is applied to the part that is used, not to the whole donor.
        cut, centre = _cut(donor, matrix, centre, height, width)
        cut, parameters["donor_history"] = self._history(cut)
        source = _sample(cut, matrix, centre, height, width)
        region = self._refine(source, region[top : top + height, left : left + width], parameters)
        if self.rng.random() < self.options.match_colour:
            around = host[top : top + height, left : left + width]
            share = float(self.rng.uniform(0.4, 0.9))
            source = _shift_colour(source, share * (cv2.mean(around)[0:3] - np.array(cv2.mean(source)[0:3])))
            parameters["match_colour"] = round(share, 2)
        return _Edit(top, left, self._jitter(source, parameters), region)

    def _copy_move(self, host: UInt8, _: UInt8 | None, parameters: dict[str, Any]) -> _Edit:
        size = (host.shape[0], host.shape[1])
        region = self._region(size, self.options.area, parameters)
        top, left, height, width = _window(region)
        matrix = self._transform(height, width, size, parameters)
        centre = self._place(matrix, height, width, size)
        parameters["from"] = [round(float(c), 1) for c in centre]
        source = _sample(host, matrix, centre, height, width)
        region = self._refine(source, region[top : top + height, left : left + width], parameters)
        return _Edit(top, left, self._jitter(source, parameters), region)

    def _remove(self, host: UInt8, _: UInt8 | None, parameters: dict[str, Any]) -> _Edit:
        region = self._region((host.shape[0], host.shape[1]), self.options.removal_area, parameters)
        by_patches = parameters["method"] == "patch"
        box = _window(region, margin=12)
        # Patches come from farther away than what diffuses into a hole.
        reach = max(24, max(box[2:]) // 2) if by_patches else 12
        top, left, height, width = _window(region, margin=reach)
        inside = region[top : top + height, left : left + width]
        window = np.ascontiguousarray(host[top : top + height, left : left + width])
        inside = self._refine(window, inside, parameters)
        # A hole slightly wider than the mask hides the object's rim, as a careful editor would.
        hole = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3), np.uint8))
        if by_patches:
            return _Edit(top, left, fill_with_patches(self.rng, window, hole.astype(np.bool_)), inside)
        radius = int(self.rng.integers(2, 7))
        parameters["radius"] = radius
        flag = cv2.INPAINT_TELEA if parameters["method"] == "telea" else cv2.INPAINT_NS
        source = np.asarray(cv2.inpaint(window, hole, radius, flag), dtype=np.uint8)
        return _Edit(top, left, source, inside)

    def _retouch(self, host: UInt8, _: UInt8 | None, parameters: dict[str, Any]) -> _Edit:
        region = self._region((host.shape[0], host.shape[1]), self.options.area, parameters)
        top, left, height, width = _window(region)
        inside = region[top : top + height, left : left + width]
        window = np.ascontiguousarray(host[top : top + height, left : left + width])
        if parameters["method"] == "warp":
            source, record = warp(self.rng, window, inside)
        else:
            inside = self._refine(window, inside, parameters)
            source, record = FILTERS[parameters["method"]](self.rng, window)
        parameters |= record
        return _Edit(top, left, source, inside)

    def _transform(
        self, height: int, width: int, source: tuple[int, int], parameters: dict[str, Any]
    ) -> npt.NDArray[np.float64]:
        """The 2x2 map from offsets in the window to offsets in the source, shrunk until the window fits."""
        scale, angle, mirror = 1.0, 0.0, False
        if self.rng.random() < self.options.transform:
            low, high = np.log(self.options.scale)
            scale = float(np.exp(self.rng.uniform(low, high)))
            if self.rng.random() < 0.5:
                angle = float(self.rng.uniform(-1, 1)) * self.options.rotation
            mirror = bool(self.rng.random() < 0.3)
        cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
        matrix = np.array([[cos, -sin], [sin, cos]]) / scale
        if mirror:
            matrix[:, 0] *= -1
        reach = np.abs(matrix) @ np.array([width, height])
        grow = float(np.max(reach / (np.array([source[1], source[0]]) - 2)))
        if grow > 1:
            matrix, scale = matrix / grow, scale * grow
        parameters |= {"scale": round(scale, 3), "rotation": round(angle, 1), "mirror": mirror}
        return matrix

    def _place(
        self, matrix: npt.NDArray[np.float64], height: int, width: int, source: tuple[int, int]
    ) -> npt.NDArray[np.float64]:
        """A random centre (x, y) in the source such that the mapped window lies inside it.

        Without resampling the window must fall on whole pixels, or interpolation would blur every plain copy.
        """
        half = np.abs(matrix) @ np.array([width, height]) / 2
        room = np.maximum(np.array([source[1], source[0]]) - 1 - 2 * half, 0)
        centre = half + self.rng.uniform(0, 1, 2) * room
        whole = np.array([(width - 1) / 2, (height - 1) / 2])
        return np.floor(centre - whole) + whole

    def _refine(self, source: UInt8, region: Bool, parameters: dict[str, Any]) -> Bool:
        if self.rng.random() < self.options.follow_content:
            part = follow_content(self.rng, source, np.ascontiguousarray(region))
            if part is not None:
                parameters["follows_content"] = True
                return part
        return region

    def _jitter(self, source: UInt8, parameters: dict[str, Any]) -> UInt8:
        if self.rng.random() >= self.options.colour:
            return source
        gain = self.rng.uniform(0.85, 1.18) * self.rng.uniform(0.95, 1.05, 3)
        shift = self.rng.uniform(-14, 14)
        parameters["colour"] = [round(float(g), 3) for g in gain] + [round(float(shift), 1)]
        return _shift_colour(source, np.full(3, shift), gain)

    def _compose(self, host: UInt8, edit: _Edit, kind: str, parameters: dict[str, Any]) -> tuple[UInt8, Bool]:
        """Blend the edit into the host; the mask is where at least half of the pixel comes from the edit."""
        source = edit.source
        # A retouch is the trace itself.
        if kind != "retouch" and self.rng.random() < self.options.local_trace:
            source, parameters["local"] = random_filter(self.rng, source)
        height, width = edit.region.shape
        window = (slice(edit.top, edit.top + height), slice(edit.left, edit.left + width))
        if parameters["method"] == "poisson":
            source = blend_gradients(source, host[window], edit.region)
        alpha = edit.region.astype(np.float32)
        if self.rng.random() >= self.options.hard_border:
            sigma = float(self.rng.uniform(*self.options.feather))
            parameters["feather"] = round(sigma, 2)
            alpha = np.asarray(
                cv2.GaussianBlur(alpha, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE), np.float32
            )
        image = host.copy()
        weight = cv2.merge([alpha, alpha, alpha])
        under = host[window].astype(np.float32)
        mixed = under + weight * (source.astype(np.float32) - under)
        image[window] = np.rint(mixed).astype(np.uint8)
        mask = np.zeros(host.shape[:2], np.bool_)
        mask[window] = alpha >= 0.5
        # A region so thin that its soft border never reaches one half.
        if not mask.any():
            mask[window] = edit.region
        return image, mask


def _check_photo(name: str, photo: UInt8) -> None:
    if not isinstance(photo, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(photo).__name__}")
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or min(photo.shape[:2]) < MIN_SIDE:
        raise ValueError(
            f"{name} must be uint8 [H,W,3] with sides of at least {MIN_SIDE}, got {photo.dtype} {photo.shape}"
        )


def _change(host: UInt8, edit: _Edit) -> float:
    """Mean absolute change of the edited region, in grey levels."""
    height, width = edit.region.shape
    under = host[edit.top : edit.top + height, edit.left : edit.left + width]
    return float(np.mean(cv2.mean(cv2.absdiff(under, edit.source), edit.region.astype(np.uint8))[:3]))


def _window(region: Bool, margin: int = 8) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the box around a region [H,W], widened by margin within the image."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    top, left = max(int(rows[0]) - margin, 0), max(int(columns[0]) - margin, 0)
    bottom = min(int(rows[-1]) + 1 + margin, region.shape[0])
    right = min(int(columns[-1]) + 1 + margin, region.shape[1])
    return top, left, bottom - top, right - left


def _cut(
    donor: UInt8, matrix: npt.NDArray[np.float64], centre: npt.NDArray[np.float64], height: int, width: int
) -> tuple[UInt8, npt.NDArray[np.float64]]:
    """The part of the donor that a window samples, with a margin of 8, and the centre in it."""
    half = np.abs(matrix) @ np.array([width, height]) / 2 + 8
    low = np.maximum(np.floor(centre - half), 0).astype(int)
    high = np.minimum(np.ceil(centre + half).astype(int) + 1, (donor.shape[1], donor.shape[0]))
    return np.ascontiguousarray(donor[low[1] : high[1], low[0] : high[0]]), centre - low


def _sample(
    source: UInt8, matrix: npt.NDArray[np.float64], centre: npt.NDArray[np.float64], height: int, width: int
) -> UInt8:
    """Window pixels [height,width,3] read through the map about `centre`, by bicubic interpolation."""
    offset = centre - matrix @ np.array([(width - 1) / 2, (height - 1) / 2])
    warp = np.column_stack([matrix, offset])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return np.asarray(
        cv2.warpAffine(source, warp, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    )


def _shift_colour(
    image: UInt8, shift: npt.NDArray[np.float64], gain: npt.NDArray[np.float64] | None = None
) -> UInt8:
    """gain * image + shift for each channel, through a look-up table."""
    levels = np.arange(256)[:, None] * (np.ones(3) if gain is None else gain) + shift
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8).reshape(1, 256, 3)
    return np.asarray(cv2.LUT(image, table), dtype=np.uint8)
