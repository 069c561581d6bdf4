import os

import numpy as np
import pytest
from PIL import Image

from frd_model.data.files import (
    ImageError,
    Skipped,
    describe_skipped,
    find_images,
    image_extensions,
    scan_images,
)
from frd_model.data.images import read_image


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_find_images(tmp_path):
    touch(*(tmp_path / name for name in ("b.png", "a.JPG", "c.txt", ".hidden.png")))
    (tmp_path / "none").mkdir()
    names = [p.name for p in find_images(tmp_path)]
    assert names == ["a.JPG", "b.png"]
    assert [p.name for p in find_images([tmp_path / "b.png", str(tmp_path / "*.png"), tmp_path])] == names
    assert find_images(tmp_path / "absent.png") == [tmp_path / "absent.png"]
    for paths, words in (
        (tmp_path / "none", "directory .* must hold at least one image, got nothing"),
        (
            str(tmp_path / "*.txt"),
            r"pattern .* at least one image, got 1 x file of no image format \('.*c.txt'",
        ),
        (str(tmp_path / "*.gif"), "pattern .* must hold at least one image, got nothing"),
        ([], "must name at least one file"),
    ):
        with pytest.raises(ImageError, match=words):
            find_images(paths)


def test_a_name_with_brackets_is_a_file(tmp_path):
    touch(tmp_path / "a[1].png")
    assert find_images(tmp_path / "a[1].png") == [tmp_path / "a[1].png"]


def test_formats_are_those_that_pillow_opens():
    assert image_extensions() >= {
        *(".png", ".jpg", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".tga"),
        *(".pbm", ".pgm", ".ppm", ".pnm", ".psd", ".pcx", ".ico", ".sgi", ".qoi"),
    }
    # vector drawings, videos, and data formats of which Pillow knows the head alone; then what it only writes
    assert not image_extensions() & {
        ".eps",
        ".ps",
        ".wmf",
        ".emf",
        ".mpg",
        ".h5",
        ".grib",
        ".pdf",
        ".txt",
        "",
    }


@pytest.mark.parametrize("extension", ["jfif", "JP2", "tga", "pcx", "dib", "pbm", "ico", "qoi", "avif"])
def test_every_such_format_is_read(tmp_path, extension):
    if f".{extension.lower()}" not in image_extensions():
        pytest.skip("not in this build of Pillow")
    array = np.zeros((32, 48, 3), np.uint8)
    array[:, 24:] = 255
    image = Image.fromarray(array)
    if extension == "pbm":
        image = image.convert("1")
    image.save(
        tmp_path / f"a.{extension}",
        format={"ico": "ICO"}.get(extension),
        **({"sizes": [(48, 32)]} if extension == "ico" else {}),
    )
    (path,) = find_images(tmp_path)
    assert abs(read_image(path).astype(int) - array).max() < 8


def test_heic(tmp_path):
    pytest.importorskip("pillow_heif")
    assert {".heic", ".heif"} <= image_extensions()
    Image.new("RGB", (64, 48), (200, 40, 90)).save(tmp_path / "a.HEIC", format="HEIF")
    (path,) = find_images(tmp_path)
    assert read_image(path).shape == (48, 64, 3)
    assert abs(read_image(path)[20, 20].astype(int) - (200, 40, 90)).max() < 8


def test_what_is_passed_over_is_named(tmp_path):
    touch(*(tmp_path / name for name in ("a.png", "notes.txt", "b.raw", "._a.png", "Thumbs.db", "sub/c.png")))
    os.mkfifo(tmp_path / "pipe.png")
    found = scan_images(tmp_path)
    assert found.images == [tmp_path / "a.png"]
    assert {(s.path.name, s.reason) for s in found.skipped} == {
        ("notes.txt", "file of no image format"),
        ("b.raw", "file of no image format"),
        ("Thumbs.db", "file of no image format"),
        ("._a.png", "hidden entry"),
        ("sub", "directory, read only with --recursive"),
        ("pipe.png", "device, pipe or socket"),
    }
    line = describe_skipped(found.skipped, names=2)
    assert f"3 x file of no image format ('{tmp_path}/Thumbs.db', '{tmp_path}/b.raw', and 1 more)" in line
    assert f"1 x directory, read only with --recursive ('{tmp_path}/sub')" in line and "\n" not in line
    assert describe_skipped([]) == ""


def test_recursive(tmp_path):
    touch(*(tmp_path / name for name in ("a.png", "x/b.png", "x/y/c.png", "x/y/d.txt", ".git/e.png")))
    (tmp_path / "x" / "up").symlink_to(tmp_path, target_is_directory=True)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    touch(outside / "f.png")
    (tmp_path / "linked").symlink_to(outside, target_is_directory=True)
    found = scan_images(tmp_path, recursive=True)
    assert [str(p.relative_to(tmp_path)) for p in found.images] == [
        "a.png",
        "linked/f.png",
        "x/b.png",
        "x/y/c.png",
    ]
    assert {s.path.name for s in found.skipped} == {"d.txt", ".git"}
    assert [p.name for p in find_images(str(tmp_path / "x/y*"), recursive=True)] == ["c.png"]


def test_links(tmp_path):
    """A dangling link is handed on, so that reading it is an error that names it; a second name is not."""
    touch(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "d.png").symlink_to(tmp_path / "d.png")
    found = scan_images(tmp_path)
    assert [p.name for p in found.images] == ["a.png", "c.png", "d.png"]
    assert found.skipped == [Skipped(tmp_path / "b.png", "second name of a file")]
    for name in ("c.png", "d.png"):
        with pytest.raises(ImageError, match=rf"{name}' must be a readable file, got: (No such|Too many)"):
            read_image(tmp_path / name)
    assert scan_images([tmp_path / "a.png", tmp_path]).images[0] == tmp_path / "a.png"


@pytest.mark.parametrize("name", ["two\nlines.txt", os.fsdecode(b"caf\xe9.txt"), " .txt", "e\u0301.txt"])
def test_odd_names_are_printable(tmp_path, name):
    touch(tmp_path / name, tmp_path / name.replace(".txt", ".png"))
    found = scan_images(tmp_path)
    assert [p.name for p in found.images] == [name.replace(".txt", ".png")]
    line = describe_skipped(found.skipped)
    assert len(found.skipped) == 1 and "\n" not in line and line.encode()


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "photos" / "a.png")
    assert find_images("~/photos") == [tmp_path / "photos" / "a.png"]
    assert find_images(["~/photos/*.png", "~/photos/a.png"]) == [tmp_path / "photos" / "a.png"]
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "~b.png")
    assert [str(p) for p in find_images("~b.png")] == ["~b.png"]


def test_an_unreadable_directory_inside_is_passed_over(tmp_path, monkeypatch):
    touch(tmp_path / "a.png", tmp_path / "shut" / "b.png")
    listdir = os.listdir

    def refuse(path):  # a mode of 0 would not stop root
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr("os.listdir", refuse)
    found = scan_images(tmp_path, recursive=True)
    assert found.images == [tmp_path / "a.png"]
    assert found.skipped == [Skipped(tmp_path / "shut", "unreadable directory")]
    with pytest.raises(ImageError, match="shut' must be readable, got: Permission denied"):
        find_images(tmp_path / "shut")
