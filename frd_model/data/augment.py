"""Augmentation of a photo and its mask, in torchvision's v2 transforms: each gets photo and mask together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .transforms import squash

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

# Sides of a photo below which the changes are not defined: their windows and blur kernels need room.
_ROOM = 8


class _Augmentation:
    """(photo [H,W,3], mask [H,W]) of any size -> photo and mask of `side` x `side` pixels.

    Either a random crop, then the changes, or, with `resize`, the changes at the photo's own size, then a resize that
    does not keep the aspect ratio. `scale` comes before both.
    """

    def __init__(
        self, side: int, scale: Sequence[v2.Transform], changes: Sequence[v2.Transform], resize: bool
    ) -> None:
        self.side = side
        self.resize = resize
        view = [_Pad(_ROOM)] if resize else [_Pad(side), v2.RandomCrop(side)]
        self.transforms = v2.Compose([*scale, *view, *changes])

    def __call__(self, image: UInt8, mask: Bool, seed: int) -> tuple[UInt8, Bool]:
        """The result depends on the arguments only; torch's random state does not change."""
        with _seeded(seed):
            photo = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
            photo, marked = self.transforms(photo, tv_tensors.Mask(torch.from_numpy(mask)))
        image = np.ascontiguousarray(photo.permute(1, 2, 0).numpy())
        mask = np.ascontiguousarray(marked.numpy())
        return squash(image, mask, self.side) if self.resize else (image, mask)


class Augmentation(_Augmentation):
    """(photo [H,W,3], mask [H,W]) of any size -> photo and mask of `crop` x `crop` pixels.

    A random crop, never resized; smaller photos are first padded by reflection, which keeps the photo's noise and makes
    no edge at its border. The mask is reflected too, so that labels stay correct. To add a change, append it to the
    list of transforms here.

    Args:
        crop: side of the result, in pixels.
        flip, turn, colour, blur, jpeg: probabilities of a horizontal mirroring, of a turn by 90, 180 or 270 degrees,
            of changed brightness, contrast, saturation and hue, of a Gaussian blur, and of a JPEG compression.
        blur_sigma, jpeg_quality: ranges, in pixels and in JPEG's 1 to 100.
        resize: in the place of the crop, the whole photo after the changes, resized to a square.
    """

    def __init__(
        self,
        crop: int,
        *,
        flip: float = 0.5,
        turn: float = 0.5,
        colour: float = 0.2,
        blur: float = 0.1,
        blur_sigma: tuple[float, float] = (0.3, 1.5),
        jpeg: float = 0.2,
        jpeg_quality: tuple[int, int] = (70, 100),
        resize: bool = False,
    ) -> None:
        changes = [
            v2.RandomHorizontalFlip(flip),
            v2.RandomApply([_turns(90, 180, 270)], turn),
            v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2, 0.02)], colour),
            v2.RandomApply([v2.GaussianBlur(7, blur_sigma)], blur),
            v2.RandomApply([v2.JPEG(jpeg_quality)], jpeg),
        ]
        super().__init__(crop, [], changes, resize)


class MvssAugmentation(_Augmentation):
    """The augmentation after MVSS-Net, as IMDL-BenCo publishes it, to `side` x `side` pixels.

    Scale by 0.8 to 1.2; with a probability of 0.1 each, a window copied elsewhere and a window inpainted, both of which
    are marked in the mask; both flips; brightness and contrast +-0.1; JPEG 70 to 100; turns; blur of 3 to 7 pixels.

    Args:
        side: of the result, in pixels.
        resize: resize the whole photo after the changes, as published; else cut a random crop after the scaling.
    """

    def __init__(self, side: int, *, resize: bool = False) -> None:
        # OpenCV's sigma of a kernel, which the published code leaves to it.
        blurs = [v2.GaussianBlur(size, 0.3 * ((size - 1) * 0.5 - 1) + 0.8) for size in (3, 5, 7)]
        changes = [
            v2.RandomApply([CopyMove()], 0.1),
            v2.RandomApply([Inpaint()], 0.1),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomVerticalFlip(0.5),
            v2.ColorJitter(brightness=0.1, contrast=0.1),
            v2.RandomApply([v2.JPEG((70, 100))], 0.2),
            v2.RandomApply([_turns(0, 90, 180, 270)], 0.5),
            v2.RandomApply([v2.RandomChoice(blurs)], 0.2),
        ]
        super().__init__(side, [RandomScale(0.8, 1.2)], changes, resize)


class RandomScale(v2.Transform):
    """Resize by a random factor between `low` and `high`; the aspect ratio stays."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = self.low + (self.high - self.low) * float(torch.rand(()))
        return {"size": [max(1, round(factor * side)) for side in F.get_size(flat_inputs[0])]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            # torch does not resize bool.
            resized = F.resize(tv_tensors.Mask(inpt.to(torch.uint8)), params["size"])
            return tv_tensors.Mask(resized.to(torch.bool))
        return F.resize(inpt, params["size"])


class CopyMove(v2.Transform):
    """Copy a window of the photo to another place, and mark that place. Photo uint8 and mask bool, at least 8 x 8."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = F.get_size(flat_inputs[0])
        h, w = _window(height, width)
        rows, columns = height - h + 1, width - w + 1
        # Two different places of the window.
        target = int(torch.randint(rows * columns, ()))
        source = int(torch.randint(rows * columns - 1, ()))
        source += source >= target
        return {
            name: (
                ...,
                slice(place // columns, place // columns + h),
                slice(place % columns, place % columns + w),
            )
            for name, place in (("source", source), ("target", target))
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        changed = inpt.clone()
        is_mask = isinstance(inpt, tv_tensors.Mask)
        changed[params["target"]] = True if is_mask else inpt[params["source"]]
        return tv_tensors.wrap(changed, like=inpt)


class Inpaint(v2.Transform):
    """Fill a window of the photo by OpenCV's inpainting, after Telea or by Navier-Stokes, and mark it."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = F.get_size(flat_inputs[0])
        h, w = _window(height, width)
        top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
        hole = np.zeros((height, width), np.uint8)
        hole[top : top + h, left : left + w] = 1
        return {"hole": hole, "method": (cv2.INPAINT_TELEA, cv2.INPAINT_NS)[int(torch.randint(2, ()))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(inpt | torch.from_numpy(params["hole"] > 0), like=inpt)
        photo = np.ascontiguousarray(inpt.permute(1, 2, 0).numpy())
        filled = cv2.inpaint(photo, params["hole"], 3, params["method"])
        return tv_tensors.wrap(torch.from_numpy(filled).permute(2, 0, 1), like=inpt)


class _Pad(v2.Transform):
    """Pad photo and mask by reflection to sides of at least `side`, with the photo at a random place."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        missing = [max(0, self.side - length) for length in F.get_size(flat_inputs[0])]
        if not any(missing):
            return {}
        before = [int(torch.randint(n + 1, ())) for n in missing]
        return {"widths": [(b, n - b) for b, n in zip(before, missing, strict=True)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not params:
            return inpt
        # By NumPy: torchvision's reflection cannot be wider than the photo.
        widths = [(0, 0)] * (inpt.ndim - 2) + params["widths"]
        return tv_tensors.wrap(torch.from_numpy(np.pad(inpt.numpy(), widths, mode="reflect")), like=inpt)


def _turns(*angles: int) -> v2.Transform:
    return v2.RandomChoice([v2.RandomRotation((angle, angle), expand=True) for angle in angles])


def _window(height: int, width: int) -> tuple[int, int]:
    """Height and width of a random window, each 5 to 80 % of the photo's."""
    h, w = (max(1, round((0.05 + 0.75 * float(torch.rand(()))) * side)) for side in (height, width))
    return h, w


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator within the block; `torch.manual_seed` would change the GPUs' generators too."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
