"""The augmentation after MVSS-Net: what each change does to photo and mask, and squares of whole photos."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from frd_model.data.augment import Augmentation, CopyMove, Inpaint, MvssAugmentation, RandomScale
from frd_model.data.transforms import squash

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]


def photo(height: int, width: int, seed: int = 0) -> UInt8:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def apply(change: v2.Transform, image: UInt8, mask: Bool, seed: int) -> tuple[UInt8, Bool]:
    torch.manual_seed(seed)
    changed, marked = change(
        tv_tensors.Image(torch.from_numpy(image.copy()).permute(2, 0, 1)),
        tv_tensors.Mask(torch.from_numpy(mask.copy())),
    )
    return changed.permute(1, 2, 0).numpy(), marked.numpy()


@pytest.mark.parametrize("change", [CopyMove(), Inpaint()], ids=["copy-move", "inpaint"])
@pytest.mark.parametrize("size", [(8, 8), (40, 96), (61, 17)])
def test_windows_are_marked_and_nothing_else_changes(change: v2.Transform, size: tuple[int, int]) -> None:
    image, before = photo(*size), np.zeros(size, np.bool_)
    before[0, :2] = True
    sides: list[tuple[float, float]] = []
    for seed in range(40):
        changed, mask = apply(change, image, np.zeros(size, np.bool_), seed)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        window = np.ix_(rows, columns)
        assert mask[window].all()
        assert np.array_equal(np.diff(rows), np.ones(len(rows) - 1))
        assert np.array_equal(np.diff(columns), np.ones(len(columns) - 1))
        assert np.array_equal(changed[~mask], image[~mask])
        # Noise: nearly every pixel of the window has another value.
        assert (changed != image).any(2)[window].mean() > 0.8
        assert np.array_equal(apply(change, image, before, seed)[1], mask | before)
        sides.append((len(rows) / size[0], len(columns) / size[1]))
    low, high = np.min(sides), np.max(sides)
    assert low <= 0.25
    assert 0.05 - 0.5 / min(size) <= low
    assert 0.6 <= high <= 0.8 + 0.5 / min(size)


def test_copy_move_copies_from_the_photo() -> None:
    image = photo(24, 20)
    changed, mask = apply(CopyMove(), image, np.zeros((24, 20), np.bool_), 3)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    pasted = changed[np.ix_(rows, columns)]
    h, w = pasted.shape[:2]
    places = [
        (top, left)
        for top in range(24 - h + 1)
        for left in range(20 - w + 1)
        if np.array_equal(image[top : top + h, left : left + w], pasted)
    ]
    assert len(places) == 1
    assert places != [(rows[0], columns[0])]


def test_scale() -> None:
    image, mask = photo(50, 100), np.zeros((50, 100), np.bool_)
    mask[:, 50:] = True
    shapes = set()
    for seed in range(60):
        scaled, marked = apply(RandomScale(0.8, 1.2), image, mask, seed)
        assert scaled.shape[:2] == marked.shape
        assert marked.dtype == np.bool_
        assert abs(scaled.shape[1] - 2 * scaled.shape[0]) <= 1
        assert abs(marked.mean() - 0.5) < 0.02
        shapes.add(scaled.shape[0])
    assert 40 <= min(shapes) < 43
    assert 57 < max(shapes) <= 60


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("size", [(3, 90), (40, 56), (70, 33)])
def test_mvss_depends_on_the_seed_only(size: tuple[int, int], resize: bool) -> None:
    augment = MvssAugmentation(32, resize=resize)
    image, mask = photo(*size), np.zeros(size, np.bool_)
    mask[:2, :20] = True
    state = torch.get_rng_state()
    made = [augment(image, mask, seed) for seed in range(30)]
    assert torch.equal(torch.get_rng_state(), state)
    for seed, (changed, marked) in enumerate(made):
        assert changed.shape == (32, 32, 3)
        assert marked.shape == (32, 32)
        assert (changed.dtype, marked.dtype) == (np.uint8, np.bool_)
        again = augment(image, mask, seed)
        assert np.array_equal(changed, again[0])
        assert np.array_equal(marked, again[1])
    assert len({changed.tobytes() for changed, _ in made}) == 30


def test_mvss_has_the_published_probabilities() -> None:
    """Of what the mask tells: windows, 0.1 each, and the orientation of a photo whose corner is marked."""
    size, draws = 24, 600
    untouched = np.zeros((size, size), np.bool_)
    corner = untouched.copy()
    corner[:3, :3] = True
    augment = MvssAugmentation(size, resize=True)
    forged, corners = 0, np.zeros(4)
    for seed in range(draws):
        forged += bool(augment(photo(size, size), untouched, seed)[1].any())
        marked = augment(photo(size, size), corner, seed)[1]
        if marked.sum() <= 25:
            corners += [marked[0, 0], marked[0, -1], marked[-1, 0], marked[-1, -1]]
    assert abs(forged / draws - (1 - 0.9**2)) < 0.06
    # Two flips make the corners equally likely.
    assert np.all(np.abs(corners / corners.sum() - 0.25) < 0.07)


def test_whole_photos_become_squares() -> None:
    image, mask = photo(30, 60), np.zeros((30, 60), np.bool_)
    mask[:, :30] = True
    still = {"flip": 0.0, "turn": 0.0, "colour": 0.0, "blur": 0.0, "jpeg": 0.0}
    changed, marked = Augmentation(40, resize=True, **still)(image, mask, 0)
    expected = squash(image, mask, 40)
    assert np.array_equal(changed, expected[0])
    assert np.array_equal(marked, expected[1])
    assert marked[:, :20].all()
    assert not marked[:, 20:].any()
