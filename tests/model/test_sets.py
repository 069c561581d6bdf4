"""The public data sets' layouts on tiny trees, and the ways to name data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from frd_model.data.dataset import JoinedDataset, PairDataset
from frd_model.data.files import ImageError
from frd_model.data.pairing import DatasetError
from frd_model.data.sets import open_set, open_sets, parse_spec

H, W = 40, 48
MASK = np.zeros((H, W), np.uint8)
MASK[8:20, 10:30] = 255


def photo(path: Path) -> Path:
    """A photo unlike those of other names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    Image.fromarray(rng.integers(0, 256, (H, W, 3), np.uint8)).save(path)
    return path


def mask(path: Path, values: npt.NDArray[np.uint8] = MASK) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def casia1(root: Path) -> None:
    photo(root / "Au/Au_ani_0001.jpg")
    photo(root / "Tp/Sp/Sp_D_NRN_A_1.jpg")
    photo(root / "Tp/CM/Sp_S_NRN_A_2.jpg")
    mask(root / "CASIA 1.0 groundtruth/Sp/Sp_D_NRN_A_1_gt.png")
    mask(root / "CASIA 1.0 groundtruth/CM/Sp_S_NRN_A_2_gt.png")


def casia2(root: Path) -> None:
    photo(root / "Au/Au_ani_00001.jpg")
    photo(root / "Tp/Tp_D_1.tif")
    photo(root / "Tp/Tp_D_2.jpg")
    mask(root / "CASIA 2 Groundtruth/Tp_D_1_gt.png")
    mask(root / "CASIA 2 Groundtruth/Tp_D_2_gt.png")


def columbia(root: Path) -> None:
    photo(root / "4cam_auth/canong3_02_sub_01.tif")
    colours = np.zeros((H, W, 3), np.uint8)
    colours[:, :, 0] = 200
    colours[MASK > 0] = (0, 200, 0)
    for name in ("a_b_sub_01", "a_b_sub_02"):
        photo(root / f"4cam_splc/{name}.tif")
        path = root / f"4cam_splc/edgemask/{name}_edgemask.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(colours).save(path, quality=100, subsampling=0)
    (root / "4cam_auth/edgemask").mkdir()
    Image.fromarray(colours).save(root / "4cam_auth/edgemask/canong3_02_sub_01_edgemask.jpg")


def cover(root: Path) -> None:
    photo(root / "image/1.tif")
    for name in ("1", "12"):
        photo(root / f"image/{name}t.tif")
        for part in ("forged", "copy", "paste"):
            mask(root / f"mask/{name}{part}.tif")


def nist16(root: Path) -> None:
    lines = ["TaskID|ProbeFileID|ProbeFileName|ProbeMaskFileName|IsTarget"]
    for number, target in ((1, "Y"), (2, "Y"), (3, "N")):
        photo(root / f"probe/NC2016_{number}.jpg")
        name = f"reference/manipulation/mask/NC2016_9{number}.png"
        lines.append(
            f"manipulation|{number}|probe/NC2016_{number}.jpg|{name if target == 'Y' else ''}|{target}"
        )
        if target == "Y":
            mask(root / name, 255 - MASK)
    (root / "reference/manipulation/NC2016-manipulation-ref.csv").write_text("\n".join(lines) + "\n")


def cocoglide(root: Path) -> None:
    photo(root / "real/dining table_114871.png")
    for kind, number in (("dining table", 114871), ("bus", 2592)):
        photo(root / f"fake/glide_inpainting_val2017_{number}_up.png")
        mask(root / f"mask/{kind}_{number}_mask.png")


def imd2020(root: Path) -> None:
    photo(root / "1a1ogs/1a1ogs_orig.jpg")
    photo(root / "1a1ogs/c8tf5mq_0.png")
    mask(root / "1a1ogs/c8tf5mq_0_mask.png")
    photo(root / "z28/00065_fake.jpg")
    mask(root / "z28/00065_fake_mask.png")


def fantasticreality(root: Path) -> None:
    photo(root / "dataset/ColorRealImages/1.jpg")
    (root / "dataset/SegmentationFake").mkdir(parents=True)
    for name in ("a", "b"):
        photo(root / f"dataset/ColorFakeImages/{name}.jpg")
        np.savez(root / f"dataset/SegmentationFake/{name}.npz", (MASK > 0)[:, :, None] * np.int16(7))


def tampcoco(root: Path) -> None:
    photo(root / "cm_images/1_000000000009_aligned_Q76.jpg")
    mask(root / "cm_masks/1_000000000009.png", (MASK > 0).astype(np.uint8))
    photo(root / "bcmc_images/98_5_aligned_Q76.jpg_5_aligned_Q76.jpg_RT35.6_RS0.95_aligned_Q62.jpg")
    mask(root / "bcm_masks/98_5.png_5.png_RT35.6_RS0.95.png")


def dso1(root: Path) -> None:
    photo(root / "DSO-1/normal-01.png")
    for name in ("splicing-01", "splicing-02"):
        photo(root / f"DSO-1/{name}.png")
        mask(root / f"DSO-1-Fake-Images-Masks/{name}.png", 255 - MASK)


TREES: dict[str, tuple[Callable[[Path], None], int]] = {
    tree.__name__: (tree, untouched)
    for tree, untouched in (
        (casia1, 1), (casia2, 1), (columbia, 1), (cover, 1), (nist16, 1), (cocoglide, 1), (imd2020, 1),
        (fantasticreality, 1), (tampcoco, 0), (dso1, 1),
    )
}  # fmt: skip


@pytest.mark.parametrize("layout", TREES)
def test_a_public_layout(layout: str, tmp_path: Path) -> None:
    make, untouched = TREES[layout]
    make(tmp_path)
    data = open_set(f"{layout}:{tmp_path}")
    assert len(data) == 2 + untouched and len(set(data.names)) == len(data)
    assert sum(pair.mask is None for pair in data.pairs) == untouched
    for index, pair in enumerate(data.pairs):
        image, edited = data.load(index)
        assert image.shape == (H, W, 3)
        np.testing.assert_array_equal(edited, (MASK > 0) if pair.mask else np.zeros_like(edited))
    assert data.inverted_masks() == ""
    assert not data.inspect().faults


@pytest.mark.parametrize("layout", [name for name in TREES if name not in ("nist16",)])
def test_a_missing_mask_is_the_error_of_its_photo(layout: str, tmp_path: Path) -> None:
    TREES[layout][0](tmp_path)
    first = next(pair for pair in open_set(f"{layout}:{tmp_path}").pairs if pair.mask is not None)
    assert first.mask is not None
    first.mask.unlink()
    data = open_set(f"{layout}:{tmp_path}")
    bad = [i for i, pair in enumerate(data.pairs) if pair.image == first.image]
    with pytest.raises(ValueError, match="mask"):
        data.load(bad[0])
    good = next(i for i, pair in enumerate(data.pairs) if pair.mask is not None and i not in bad)
    assert data.load(good)[1].any()


def test_a_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    photo(tmp_path / "images/1.jpg")
    for layout in TREES:
        with pytest.raises(DatasetError, match=r"must (hold|be)"):
            open_set(f"{layout}:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("casia1:d/CASIA1", ("casia1", "casia1", Path("d/CASIA1"))),
        ("mine=json:a/b.json", ("mine", "json", Path("a/b.json"))),
        ("Cover:C:/x", ("cover", "cover", Path("C:/x"))),
        ("mani:data/x", ("x", "mani", Path("data/x"))),
    ],
)
def test_names_of_data_sets(spec: str, expected: tuple[str, str, Path]) -> None:
    assert parse_spec(spec) == expected


@pytest.mark.parametrize("spec", ["", "casia1", "casia3:x", "=cover:x", "cover:", "data/CASIA1"])
def test_what_names_no_data_set(spec: str) -> None:
    with pytest.raises(DatasetError, match=r"data set .* must"):
        parse_spec(spec)


def test_text_lists(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "with space 1.png")
    mask(tmp_path / "a_gt.png")
    for lines in (
        "a.jpg a_gt.png\nwith space 1.png None\n",
        "a.jpg,a_gt.png\nwith space 1.png,Negative\n",
        "# comment\n\na.jpg a_gt.png 1\nwith space 1.png\n",
        "a.jpg,a_gt.png,jpg/a.jpg\nwith space 1.png\n",
        "a.jpg\ta_gt.png\t1\r\nwith space 1.png\tNone\t0\r\n",
    ):
        (tmp_path / "list.txt").write_text(lines)
        data = open_set(f"txt:{tmp_path / 'list.txt'}")
        assert [(p.image.name, p.mask and p.mask.name) for p in data.pairs] == [
            ("a.jpg", "a_gt.png"),
            ("with space 1.png", None),
        ]
        assert data.load(0)[1].sum() == (MASK > 0).sum() and not data.load(1)[1].any()


def test_collections(tmp_path: Path) -> None:
    photo(tmp_path / "one/Tp/1.png")
    mask(tmp_path / "one/Gt/1.png")
    photo(tmp_path / "2.png")
    (tmp_path / "two.json").write_text(json.dumps([["2.png", "Negative"], ["one/Tp/1.png", "one/Gt/1.png"]]))
    (tmp_path / "test.json").write_text(json.dumps({"first": "one", "second": "two.json"}))
    sets = open_sets([f"collection:{tmp_path / 'test.json'}"])
    assert {name: len(data) for name, data in sets.items()} == {"first": 1, "second": 2}
    (tmp_path / "train.json").write_text(
        '[\n["ManiDataset", "one"],\n// ["ManiDataset", "gone"],\n["JsonDataset", "two.json"]\n]'
    )
    joined = open_set(f"collection:{tmp_path / 'train.json'}")
    assert isinstance(joined, JoinedDataset) and joined.parts == {"one": range(1), "two": range(1, 3)}
    assert [joined.load(i)[1].any() for i in range(3)] == [True, False, True]
    assert joined.subset([2]).load(0)[1].any() and joined.subset([2]).names == ["two/1.png"]


def test_a_missing_member_of_a_collection_is_named_with_it(tmp_path: Path) -> None:
    for text in ('{"gone": "nowhere"}', '[["ManiDataset", "nowhere"]]', '[["JsonDataset", "nowhere"]]'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(
            DatasetError, match=r"^collection '.*c\.json', 'nowhere': (folder|list) '.*nowhere"
        ):
            open_sets([f"collection:{tmp_path / 'c.json'}"])


@pytest.mark.parametrize(
    "text", ["[]", "{}", "3", '{"a": 3}', '[["OtherDataset", "x"]]', '[["ManiDataset"]]', "["]
)
def test_what_is_no_collection(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DatasetError, match=r"collection .* must be"):
        open_sets([f"collection:{tmp_path / 'c.json'}"])


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    dso1(tmp_path)
    with pytest.raises(DatasetError, match="'dso1' twice"):
        open_sets([f"dso1:{tmp_path}", f"dso1:{tmp_path}"])
    assert list(open_sets([f"dso1:{tmp_path}", f"again=dso1:{tmp_path}"])) == ["dso1", "again"]


def test_untouched_photos(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("x")
    data = open_set(f"untouched:{tmp_path}")
    assert data.pairs[0].mask is None and len(data.skipped) == 1
    assert isinstance(data, PairDataset)


def test_what_is_no_segmentation(tmp_path: Path) -> None:
    fantasticreality(tmp_path)
    data = open_set(f"fantasticreality:{tmp_path}")
    first = data.pairs[0].mask
    assert first is not None
    np.savez(first, np.zeros((H, W + 1)))
    with pytest.raises(ImageError, match=f"must have its photo's size {W} x {H}, got {W + 1} x {H}"):
        data.load(0)
    np.savez(first, np.zeros((H, W, 3)))
    with pytest.raises(ImageError, match="must be a plane of class numbers"):
        data.load(0)
    first.write_bytes(first.read_bytes()[:40])
    with pytest.raises(ImageError, match="must be a readable npz file"):
        data.load(0)
