"""Augmentation of a photo and its mask: a random crop at the photo's own scale, then random changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]


class Augmentation:
    """(photo [H,W,3], mask [H,W]) of any size -> photo and mask of `crop` x `crop` pixels.

    A random crop, never resized; smaller photos are first padded by reflection, which keeps the photo's noise and makes
    no edge at its border. The mask is reflected too, so that labels stay correct. To add a change, append it to the
    list of torchvision's v2 transforms here: each gets photo and mask together.

    Args:
        crop: side of the result, in pixels.
        flip, turn, colour, blur, jpeg: probabilities of a horizontal mirroring, of a turn by 90, 180 or 270 degrees,
            of changed brightness, contrast, saturation and hue, of a Gaussian blur, and of a JPEG compression.
        blur_sigma, jpeg_quality: ranges, in pixels and in JPEG's 1 to 100.
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
    ) -> None:
        self.crop = crop
        turns = v2.RandomChoice([v2.RandomRotation((angle, angle)) for angle in (90, 180, 270)])
        self.transforms = v2.Compose(
            [
                v2.RandomCrop(crop),
                v2.RandomHorizontalFlip(flip),
                v2.RandomApply([turns], turn),
                v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2, 0.02)], colour),
                v2.RandomApply([v2.GaussianBlur(7, blur_sigma)], blur),
                v2.RandomApply([v2.JPEG(jpeg_quality)], jpeg),
            ]
        )

    def __call__(self, image: UInt8, mask: Bool, seed: int) -> tuple[UInt8, Bool]:
        """The result depends on the arguments only; torch's random state does not change."""
        with _seeded(seed):
            image, mask = self._pad(image, mask)
            photo = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
            photo, marked = self.transforms(photo, tv_tensors.Mask(torch.from_numpy(mask)))
        return np.ascontiguousarray(photo.permute(1, 2, 0).numpy()), np.ascontiguousarray(marked.numpy())

    def _pad(self, image: UInt8, mask: Bool) -> tuple[UInt8, Bool]:
        """Pad photo and mask to sides of at least `crop`, with the photo at a random place."""
        missing = [max(0, self.crop - side) for side in mask.shape]
        if not any(missing):
            return image, mask
        before = [int(torch.randint(n + 1, ())) for n in missing]
        widths = [(b, n - b) for b, n in zip(before, missing, strict=True)]
        # By NumPy: torchvision's reflection cannot be wider than the photo.
        return np.pad(image, [*widths, (0, 0)], mode="reflect"), np.pad(mask, widths, mode="reflect")


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
