import json
import unicodedata

import numpy as np
import pytest

from frd_model.data.dataset import DatasetError, FolderDataset, JsonDataset
from frd_model.data.images import ImageError, write_png

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def make(root, photos, masks):
    for folder, names in (("images", photos), ("masks", masks)):
        (root / folder).mkdir(exist_ok=True)
        for name in names:
            write_png(root / folder / name, np.arange(64, dtype=np.uint8).reshape(8, 8) // 32 * 255)


def open_folders(root, **options):
    return FolderDataset(root / "images", root / "masks", **options)


@pytest.mark.parametrize(("photo", "mask"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
@pytest.mark.parametrize("suffix", ["", "_gt", "_mask", "_GT", "_Mask"])
def test_accents_and_suffixes(tmp_path, photo, mask, suffix):
    make(tmp_path, [f"{photo}.png", "z.png"], [f"{mask}{suffix}.png", "z.png"])
    data = open_folders(tmp_path)
    assert [(p.image.name, p.mask.name) for p in data.pairs] == [
        (f"{photo}.png", f"{mask}{suffix}.png"),
        ("z.png", "z.png"),
    ]
    assert data.load(0)[1].sum() == 32


def test_the_very_name_comes_first(tmp_path):
    make(tmp_path, ["a.png", "a_gt.png"], ["a.png", "a_gt.png"])
    assert all(p.image.name == p.mask.name for p in open_folders(tmp_path).pairs)


@pytest.mark.parametrize(
    ("photo", "mask", "words"),
    [
        ("IMG_1", "img_1", r"the closest, 'img_1\.png', differs in letter case: 'I' \(U\+0049\) against 'i'"),
        ("a b", "a  b", r"differs in spaces: 'b' \(U\+0062\) against ' ' \(U\+0020\) at character 3"),
        ("ab", "ab ", r"differs in spaces: the end against ' ' \(U\+0020\) at character 3"),
        ("a-b", "a_b", r"differs in signs: '-' \(U\+002D\) against '_' \(U\+005F\)"),
        ("photo\uff11", "photo1", r"differs in signs: '\uff11' \(U\+FF11\) against '1' \(U\+0031\)"),
        ("\u0441at01", "cat01", r"differs: '\u0441' \(U\+0441\) against 'c' \(U\+0063\) at character 1"),
        ("photo_001", "photo_002", r"the closest, 'photo_002\.png', differs: '1' \(U\+0031\) against '2'"),
        ("photo_001", "photo_001_seg", r"differs: the end against '_' \(U\+005F\) at character 10"),
        ("cat", "xyzzy", r"got none$"),
    ],
)
def test_a_mismatch_is_explained(tmp_path, photo, mask, words):
    make(tmp_path, [f"{photo}.png", "z.png"], [f"{mask}.png", "z.png"])
    with pytest.raises(DatasetError, match=rf"photo '.*{photo}\.png' must have a mask of its name .*{words}"):
        open_folders(tmp_path)
    with pytest.raises(DatasetError, match=r"mask '.*' must belong to a photo in .*, got none") as caught:
        open_folders(tmp_path, allow_authentic=True)
    assert ("the closest" in str(caught.value)) == (words != "got none$")
    assert "\n" not in str(caught.value)


def test_lone_files_are_counted(tmp_path):
    make(tmp_path, ["a.png", "b.png", "c.png"], ["a.png"])
    with pytest.raises(DatasetError, match=r"b\.png' must have a mask .*, nor have 1 more photos"):
        open_folders(tmp_path)
    assert [p.mask is None for p in open_folders(tmp_path, allow_authentic=True).pairs] == [False, True, True]


@pytest.mark.parametrize(
    ("photos", "masks", "words"),
    [
        (["a.png", "a.bmp"], ["a.png"], r"must have a name of its own, got 'a\.bmp' beside it"),
        (
            [f"{COMPOSED}.png", f"{DECOMPOSED}.png"],
            ["a.png"],
            r"its own, got .* its extension or Unicode form",
        ),
        (["a.png"], ["a.png", "a.bmp"], r"must have a name of its own"),
        (["a.png"], ["a_gt.png", "a_mask.png"], r"must have one mask, got 'a_gt\.png' and 'a_mask\.png'"),
        ([], ["a.png"], "must hold at least one photo, got nothing"),
    ],
)
def test_names_that_collide(tmp_path, photos, masks, words):
    make(tmp_path, photos, masks)
    with pytest.raises(DatasetError, match=words):
        open_folders(tmp_path, allow_authentic=True)


def test_what_is_no_image_is_kept_apart(tmp_path):
    make(tmp_path, ["a.png", "._a.png"], ["a.png", "._a.png"])
    for name in ("images/Thumbs.db", "images/.DS_Store", "masks/readme.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "images" / "more").mkdir()
    data = open_folders(tmp_path)
    assert data.names == ["a.png"]
    assert sorted(s.path.name for s in data.skipped) == [
        *(".DS_Store", "._a.png", "._a.png", "Thumbs.db"),
        *("more", "readme.txt"),
    ]


def test_a_mask_that_is_no_image_does_not_make_its_photo_untouched(tmp_path):
    make(tmp_path, ["a.png", "b.png"], ["a.png"])
    (tmp_path / "masks" / "b_gt.npy").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"b_gt\.npy' must be an image, got a file of no image format"):
        open_folders(tmp_path, allow_authentic=True)


def test_masks_in_folders_do_not_make_all_photos_untouched(tmp_path):
    make(tmp_path, ["a.png"], [])
    assert open_folders(tmp_path, allow_authentic=True).pairs[0].mask is None
    write_png(tmp_path / "masks" / "sub" / "a.png", np.ones((8, 8), bool))
    with pytest.raises(
        DatasetError, match="must hold masks, got only 1 x directory, read only with --recursive"
    ):
        open_folders(tmp_path, allow_authentic=True)


def test_recursive(tmp_path):
    make(tmp_path, ["x/1.png", "y/1.png", "2.png"], ["x/1.png", "y/1_gt.png", "2.png"])
    data = open_folders(tmp_path, recursive=True)
    assert data.names == ["2.png", "x/1.png", "y/1.png"]
    assert [str(p.mask.relative_to(tmp_path)) for p in data.pairs] == [
        *("masks/2.png", "masks/x/1.png", "masks/y/1_gt.png"),
    ]
    (tmp_path / "masks" / "x").rename(tmp_path / "masks" / "X")
    with pytest.raises(DatasetError, match=r"x/1\.png' must .*closest, 'X/1\.png', differs in letter case"):
        open_folders(tmp_path, recursive=True)


def test_masks_inside_the_photos_folder(tmp_path):
    make(tmp_path, ["a.png"], [])
    write_png(tmp_path / "images" / "gt" / "a.png", np.ones((8, 8), bool))
    data = FolderDataset(tmp_path / "images", tmp_path / "images" / "gt", recursive=True)
    assert data.names == ["a.png"] and data.skipped == []


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path, ["a.png"], ["a.png"])
    assert FolderDataset("~/images", "~/masks").names == ["a.png"]
    (tmp_path / "list.json").write_text(json.dumps([["~/images/a.png", "masks/a.png"]]))
    assert JsonDataset("~/list.json").load(0)[1].sum() == 32


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_lists_name_files_in_either_unicode_form(tmp_path, form):
    make(tmp_path, [f"{COMPOSED}.png"], [f"{DECOMPOSED}.png"])
    entry = [unicodedata.normalize(form, f"{folder}/{COMPOSED}.png") for folder in ("images", "masks")]
    # with the byte order mark that Windows editors write
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps([entry]), encoding="utf-8")
    assert JsonDataset(tmp_path / "list.json").load(0)[1].sum() == 32


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            ["images/A.png", "Negative"],
            r"entry 0 must name files, got .*closest, 'a\.png', differs in letter case",
        ),
        (["Negative", "Negative"], "entry 0 must name an image"),
        (["images/a\0.png", "Negative"], "entry 0 must name files"),
        (["images/\ud800.png", "Negative"], "entry 0 must name files"),
        (["images", "Negative"], "entry 0 must name files, got .*images'"),
        (["images/" + "a" * 300, "Negative"], "entry 0 must name files"),
        (["images/a.png", None], "entry 0 must be"),
    ],
)
def test_lists_with_bad_names(tmp_path, entry, words):
    make(tmp_path, ["a.png"], [])
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    with pytest.raises(DatasetError, match=words) as caught:
        JsonDataset(tmp_path / "list.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_of_a_list_is_the_error_of_its_pair(tmp_path):
    make(tmp_path, ["a.png"], ["a.png"])
    (tmp_path / "images" / "gt").mkdir()
    entries = [
        ["images/a.png", "masks/a.png"],
        ["images/wholly other", "Negative"],
        ["images/gt", "Negative"],
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    data = JsonDataset(tmp_path / "list.json")
    assert data.load(0)[1].sum() == 32
    with pytest.raises(ImageError, match=r"entry 1 must name files, got .*images/wholly other'"):
        data.load(1)
    # a folder of the very name is not its closest file
    missing = [(1, "images/wholly other"), (2, "images/gt")]
    assert data.check() == [
        f"list {str(tmp_path / 'list.json')!r} entry {number} must name files, got {str(tmp_path / name)!r}"
        for number, name in missing
    ]
