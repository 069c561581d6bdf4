import errno
import json
import os
import struct
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from frd_model import inspect_photo
from frd_model.data import images
from frd_model.data.images import ImageError, read_file, read_image, read_mask, write_png


def photo(height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, array, mode=None, **options):
    Image.fromarray(array, mode).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:4, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", stored, exif=exif)
    upright = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}
    turned = stored.transpose(1, 0, 2)
    upright |= {5: turned, 6: turned[:, ::-1], 7: turned[::-1, ::-1], 8: turned[::-1]}
    np.testing.assert_array_equal(read_image(path), upright[orientation])


def test_grey_palette_bilevel(tmp_path):
    grey = photo()[:, :, 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / "g.png", grey)), np.dstack([grey] * 3))
    Image.fromarray(photo() // 128 * 255).convert("P").save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").shape == (20, 30, 3)
    Image.fromarray(grey > 100).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_image(tmp_path / "b.png")[:, :, 0], (grey > 100) * 255)


def test_sixteen_bit(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / "g16.png"), values)
    np.testing.assert_array_equal(read_image(tmp_path / "g16.png")[0, :, 0], [0, 1, 128, 255])
    cv2.imwrite(str(tmp_path / "rgb16.png"), np.dstack([values, values, values[:, ::-1]]))
    got = read_image(tmp_path / "rgb16.png")
    np.testing.assert_array_equal(got[0, :, 1], [0, 1, 128, 255])
    np.testing.assert_array_equal(got[0, :, 0], [255, 128, 1, 0])


def test_alpha_over_background(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (200, 10, 10, 255)
    path = save(tmp_path / "a.png", rgba)
    assert (read_image(path)[3] == 255).all()
    assert (read_image(path)[0] == (200, 10, 10)).all()
    assert not read_image(path, background=0)[3].any()


def test_cmyk(tmp_path):
    Image.new("CMYK", (6, 5), (255, 0, 0, 0)).save(tmp_path / "c.jpg")
    assert abs(read_image(tmp_path / "c.jpg")[2, 2].astype(int) - (0, 255, 255)).max() < 6


def test_tiny_and_wide(tmp_path):
    assert read_image(save(tmp_path / "one.png", photo(1, 1))).shape == (1, 1, 3)
    assert read_image(save(tmp_path / "wide.png", np.zeros((3, 20_000, 3), np.uint8))).shape == (3, 20_000, 3)


def test_bad_files(tmp_path):
    full = tmp_path / "full.jpg"
    save(full, photo(200, 200))
    (tmp_path / "cut.jpg").write_bytes(full.read_bytes()[:9000])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    png = save(tmp_path / "full.png", photo(50, 50)).read_bytes()
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    cases = {
        "cut.jpg": "must be a complete image, got: .*truncated",
        "cut.png": "must be a complete image, got: ",
        "text.jpg": "must be an image file Pillow can read, got 8 bytes that start with b'no image'",
        "empty.png": "must not be empty, got 0 bytes",
        "absent.png": "must be a readable file, got: No such file",
        ".": "must be a file, got a directory",
    }
    for name, words in cases.items():
        with pytest.raises(ImageError, match=words) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_unreadable(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", photo())

    def refuse(*_args, **_options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # a mode of 0 would not stop root
    with pytest.raises(ImageError, match=r"a\.png' must be a readable file, got: Permission denied"):
        read_image(path)


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "webp", "gif"])
def test_damaged_files_raise_nothing_else(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    Image.fromarray(photo(40, 50)).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for turn in range(24):
        data = bytearray(whole[: int(rng.integers(1, len(whole)))] if turn % 2 else whole)
        for place in rng.integers(0, min(len(data), 150), 4 if turn % 2 == 0 else 0):
            data[place] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            read_image(path)
        except ImageError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 8


def test_pixel_limit(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", photo(20, 30))
    with pytest.raises(ImageError, match="must have at most 599 pixels, got 30 x 20 = 600"):
        read_image(path, max_pixels=599)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="must have at most 120000000 pixels"):
        read_image(path)


def test_writers_round_trip(tmp_path):
    array = photo()
    np.testing.assert_array_equal(read_image(images.write_png(tmp_path / "new" / "a.png", array)), array)
    assert (
        read_mask(images.write_png(tmp_path / "m.png", array[:, :, 0] > 9)).sum()
        == (array[:, :, 0] > 9).sum()
    )
    smooth = np.full((16, 16, 3), (180, 90, 30), np.uint8)
    got = read_image(images.write_jpeg(tmp_path / "a.jpg", smooth))
    assert abs(got.astype(int) - smooth).max() < 4
    images.write_json(tmp_path / "a.json", {"score": 0.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"score": 0.5}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = images.write_json(tmp_path / "a.json", [1])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(images.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        images.write_json(path, [2])
    assert path.read_text() == "[\n  1\n]\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["n" * 251 + ".png", "é" * 125 + ".png", "two\nlines.png"])
def test_names_as_long_as_they_can_be(tmp_path, name):
    images.write_png(tmp_path / name, photo())
    assert [p.name for p in tmp_path.iterdir()] == [name]
    np.testing.assert_array_equal(read_image(tmp_path / name), photo())


def test_names_that_no_file_can_have(tmp_path):
    for name in ("a\0.png", "n" * 300):
        with pytest.raises(ImageError, match="must be a readable file, got: "):
            read_image(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png' must be a file, got a device, pipe or socket"):
        read_image(tmp_path / "a.png")


def test_write_rejects_other_arrays(tmp_path):
    with pytest.raises(ValueError, match=r"array must be uint8 .* got float64 \(2, 2\)"):
        images.write_png(tmp_path / "a.png", np.zeros((2, 2)))


def test_overlay_marks_the_region():
    image = np.full((10, 10, 3), 100, np.uint8)
    probability = np.zeros((10, 10), np.float32)
    probability[:5] = 0.6
    got = images.overlay(image, probability)
    assert got.shape == image.shape and got.dtype == np.uint8
    assert (got[5:] == 100).all() and (got[:5, :, 1] > 120).all() and (got[:5, :, 0] < 100).all()
    with pytest.raises(ValueError, match=r"the image's size \(10, 10\), got \(9, 10\)"):
        images.overlay(image, probability[1:])


def test_bytes_are_read_as_the_file(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    data = read_file(path)
    np.testing.assert_array_equal(read_image("elsewhere", data=data), read_image(path))
    with pytest.raises(ImageError, match="image 'elsewhere' must be a complete image"):
        read_image("elsewhere", data=data[:60])


@pytest.mark.parametrize("head", [b"", b"RIFF\xff\xff\xff\x7fWEBPVP8X", b"\xff\xd8\xff\xe0"])
def test_a_file_that_is_too_large_is_refused_unread(head: bytes, tmp_path: Path) -> None:
    """A sparse file of 64 GB: reading it would end the process."""
    path = tmp_path / "a.webp"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(64 << 30)
    for read in (read_image, read_file, inspect_photo):
        with pytest.raises(ImageError, match="must have at most 1073741824 bytes, got 68719476736"):
            read(path)


def test_a_page_description_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one of a photo's thumbnail, which `test_inspect` has."""
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", fake_ghostscript(tmp_path))
    Image.new("RGB", (20, 20)).save(tmp_path / "a.eps")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.eps").read_bytes())
    for name in ("a.eps", "a.png"):
        with pytest.raises(ImageError, match="must be an image file Pillow can read"):
            read_image(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def fake_ghostscript(folder: Path) -> str:
    """A program that leaves a file `ran` where it is called."""
    (folder / "gs").write_text(f"#!/bin/sh\ntouch '{folder / 'ran'}'\n")
    (folder / "gs").chmod(0o755)
    return str(folder / "gs")


def test_an_icon_that_holds_a_larger_image_than_it_states(tmp_path: Path) -> None:
    Image.new("L", (2000, 1000)).save(tmp_path / "a.png")
    png = (tmp_path / "a.png").read_bytes()
    header = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22)
    (tmp_path / "a.ico").write_bytes(header + png)
    with pytest.raises(ImageError, match="at most 1000 pixels, got 2000 x 1000"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_image(tmp_path / "a.ico", max_pixels=1000)


@pytest.mark.parametrize("big", [False, True], ids=["TIFF", "BigTIFF"])
def test_a_tiff_of_millions_of_strips_is_refused_before_they_are_read(big, tmp_path):
    strips = 1 << 21
    path = save(tmp_path / "a.tif", photo(), **({"big_tiff": True} if big else {}))
    np.testing.assert_array_equal(read_image(path), photo())
    data = bytearray(path.read_bytes())
    order = "<" if data[:2] == b"II" else ">"
    first = (
        struct.unpack_from(f"{order}Q", data, 8)[0] + 8
        if big
        else struct.unpack_from(f"{order}I", data, 4)[0] + 2
    )
    entry = "HHQQ" if big else "HHII"
    for at in range(first, len(data), struct.calcsize(order + entry)):
        tag, kind, _, value = struct.unpack_from(order + entry, data, at)
        if tag == 273:
            struct.pack_into(order + entry, data, at, tag, kind, strips, value)
            break
    path.write_bytes(bytes(data) + bytes(8 * strips))
    for read in (read_image, lambda path: read_image(path, data=path.read_bytes())):
        with pytest.raises(ImageError, match=f"must have at most 1048576 strips, got {strips}"):
            read(path)
