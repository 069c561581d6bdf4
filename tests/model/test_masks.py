import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from frd_model.data.images import ImageError, read_mask

MASK = np.zeros((64, 96), bool)
MASK[8:24, 16:40] = True
GREY = MASK.astype(np.uint8) * 255


def tiff(path, array):
    """Through OpenCV, which keeps 16 and 32 bit."""
    assert cv2.imwrite(str(path), array, [cv2.IMWRITE_TIFF_COMPRESSION, 1])


def palette(array, colours, **options):
    image = Image.fromarray(array.astype(np.uint8), "P")
    image.putpalette([v for colour in colours for v in colour], **options)
    return image


def over(alpha, colour=(255, 255, 255)):
    return np.dstack([np.full((*MASK.shape, 3), colour, np.uint8), alpha.astype(np.uint8)])


GOOD = {
    "one_bit.png": lambda p: Image.fromarray(MASK).save(p),
    "one_bit.tif": lambda p: Image.fromarray(MASK).save(p),
    "grey.pbm": lambda p: Image.fromarray(MASK).save(p),
    "grey.png": lambda p: Image.fromarray(GREY).save(p),
    "grey.bmp": lambda p: Image.fromarray(GREY).save(p),
    "grey.gif": lambda p: Image.fromarray(GREY).save(p),
    "grey.tga": lambda p: Image.fromarray(GREY).save(p),
    "grey.pgm": lambda p: Image.fromarray(GREY).save(p),
    "maxval_1.pgm": lambda p: p.write_bytes(b"P5 96 64 1\n" + MASK.astype(np.uint8).tobytes()),
    "rgb.png": lambda p: Image.fromarray(GREY).convert("RGB").save(p),
    "rgb.webp": lambda p: Image.fromarray(GREY).convert("RGB").save(p, lossless=True),
    "cmyk.tif": lambda p: Image.fromarray(GREY).convert("RGB").convert("CMYK").save(p),
    "opaque.png": lambda p: Image.fromarray(GREY).convert("RGBA").save(p),
    "alpha.png": lambda p: Image.fromarray(over(GREY)).save(p),
    "grey_alpha.png": lambda p: Image.merge(
        "LA", [Image.new("L", (96, 64), 255), Image.fromarray(GREY)]
    ).save(p),
    "transparent_black.png": lambda p: Image.fromarray(GREY).save(p, transparency=0),
    "transparent_index.gif": lambda p: Image.fromarray(GREY).save(p, transparency=0),
    "u16_65535.png": lambda p: cv2.imwrite(str(p), GREY.astype(np.uint16) * 257),
    "u16_255.png": lambda p: cv2.imwrite(str(p), GREY.astype(np.uint16)),
    "u16_65280.png": lambda p: cv2.imwrite(str(p), GREY.astype(np.uint16) * 256),
    "u16_255.tif": lambda p: tiff(p, GREY.astype(np.uint16)),
    "u16_255.pgm": lambda p: cv2.imwrite(str(p), GREY.astype(np.uint16)),
    "u16_rgb_65535.png": lambda p: cv2.imwrite(str(p), np.dstack([GREY.astype(np.uint16) * 257] * 3)),
    "u16_rgb_255.png": lambda p: cv2.imwrite(str(p), np.dstack([GREY.astype(np.uint16)] * 3)),
    "u16_rgb_255.tif": lambda p: tiff(p, np.dstack([GREY.astype(np.uint16)] * 3)),
    "u16_rgba.png": lambda p: cv2.imwrite(
        str(p), np.dstack([GREY.astype(np.uint16)] * 3 + [GREY * np.uint16(257)])
    ),
    "i32_255.tif": lambda p: tiff(p, GREY.astype(np.int32)),
    "i32_65535.tif": lambda p: tiff(p, GREY.astype(np.int32) * 257),
    "i32_full.tif": lambda p: tiff(p, MASK.astype(np.int32) * (2**31 - 1)),
    "f32_1.tif": lambda p: Image.fromarray(MASK.astype(np.float32)).save(p),
    "f32_255.tif": lambda p: Image.fromarray(GREY.astype(np.float32)).save(p),
    "f32_65535.tif": lambda p: Image.fromarray(GREY.astype(np.float32) * 257).save(p),
    "f32.pfm": lambda p: Image.fromarray(MASK.astype(np.float32)).save(p),
    "palette.png": lambda p: palette(MASK, [(0, 0, 0), (255, 255, 255)]).save(p),
    "palette_turned.png": lambda p: palette(~MASK, [(255, 255, 255), (0, 0, 0)]).save(p),
    "palette_4_bit.png": lambda p: palette(MASK * 7, [(0, 0, 0)] * 7 + [(255, 255, 255)] * 9).save(p, bits=4),
    "nearly.png": lambda p: Image.fromarray(np.where(MASK, 250, 4).astype(np.uint8)).save(p),
    "one_bit_transparent.png": lambda p: Image.fromarray(MASK).save(p, transparency=0),
    "palette_alpha.png": lambda p: palette(MASK, [(255, 255, 255)] * 2).save(p, transparency=b"\x00\xff"),
    "off_white.png": lambda p: Image.fromarray(
        np.where(MASK[..., None], (255, 250, 240), 0).astype(np.uint8)
    ).save(p),
}


@pytest.mark.parametrize("name", GOOD)
def test_two_valued_files_of_any_kind(tmp_path, name):
    GOOD[name](tmp_path / name)
    np.testing.assert_array_equal(read_mask(tmp_path / name, MASK.shape), MASK)
    np.testing.assert_array_equal(read_mask(tmp_path / name, invert=True), ~MASK)


def test_unsigned_32_bit(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for white in (255, 65535, 2**32 - 1):
        tifffile.imwrite(tmp_path / "a.tif", MASK.astype(np.uint32) * np.uint32(white))
        np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), MASK)
    tifffile.imwrite(tmp_path / "a.tif", -MASK.astype(np.int32))
    with pytest.raises(ImageError, match=r"must hold samples in \[0, 4294967295\], got -1 to 0"):
        read_mask(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["grey.png", "u16_rgb_255.png", "f32_1.tif", "palette.png"])
def test_rotation_applies_to_masks_of_any_kind(tmp_path, kind):
    GOOD[kind](tmp_path / kind)
    with Image.open(tmp_path / kind) as image:
        if kind.startswith("u16"):  # Pillow writes no such file: put the tag into the one there is
            exif = Image.Exif()
            exif[0x0112] = 6
            chunk = b"eXIf" + exif.tobytes()[6:]
            data = (tmp_path / kind).read_bytes()
            size = (len(chunk) - 4).to_bytes(4, "big")
            chunk = size + chunk + zlib.crc32(chunk).to_bytes(4, "big")
            (tmp_path / kind).write_bytes(data[:33] + chunk + data[33:])
        else:
            image.load()
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(tmp_path / kind, exif=exif)
    np.testing.assert_array_equal(read_mask(tmp_path / kind, MASK.T.shape), np.rot90(MASK, -1))


def labels(*values, dtype=np.uint8):
    """Stripes of the values, black around them."""
    array = np.zeros((64, 96), dtype)
    for index, value in enumerate(values):
        array[10:50, 10 + 12 * index : 22 + 12 * index] = value
    return array


def grey(*values):
    return lambda p: Image.fromarray(labels(*values)).save(p)


def colour(*values):
    def save(path):
        array = np.zeros((64, 96, 3), np.uint8)
        for index, value in enumerate(values):
            array[10:50, 10 + 20 * index : 30 + 20 * index] = value
        Image.fromarray(array).save(path)

    return save


BAD = {
    "labels_1.png": (grey(1), "got the values 0, 1"),
    "labels_2.png": (grey(2), "the values 0, 2"),
    "labels_100.png": (grey(100), "the values 0, 100"),
    "labels_128.png": (grey(128), "the values 0, 128"),
    "labels_200.png": (grey(200), "the values 0, 200"),
    "classes.png": (grey(1, 2, 3), "the values 0, 1, 2, 3"),
    "levels.png": (grey(85, 170, 255), r"15\.\d% grey away from edges among the values 0, 85, 170, 255"),
    "trimap.png": (grey(128, 255), "grey away from edges among the values 0, 128, 255"),
    "void.png": (grey(1, 255), "grey away from edges among the values 0, 1, 255"),
    "many.png": (grey(*range(40, 46), 255), r"8 values: 0, 40, 41, 42, 43, 44, \.\.\. up to 255"),
    "ramp.png": (
        lambda p: Image.fromarray(np.tile(np.arange(96, dtype=np.uint8) * 2, (64, 1))).save(p),
        "96 values",
    ),
    "two_greys.png": (
        lambda p: Image.fromarray(np.where(MASK, 255, 100).astype(np.uint8)).save(p),
        "values 100, 255",
    ),
    "constant.png": (lambda p: Image.new("L", (96, 64), 100).save(p), "got the value 100"),
    "red.png": (colour((255, 0, 0)), r"got the colours \(0, 0, 0\), \(255, 0, 0\)"),
    "red.jpg": (colour((255, 0, 0)), r"must be black where untouched and white where edited, .* colours"),
    "yellow.png": (colour((255, 255, 0)), r"among the colours \(0, 0, 0\), \(255, 255, 0\)|got the colours"),
    "classes_rgb.png": (
        colour((128, 0, 0), (255, 255, 255)),
        r"among the colours \(0, 0, 0\), \(128, 0, 0\)",
    ),
    "palette.png": (
        lambda p: palette(labels(1, 2), [(0, 0, 0), (128, 0, 0), (0, 128, 0)]).save(p),
        r"\(128, 0, 0\)",
    ),
    "palette_grey.png": (lambda p: palette(MASK, [(i, i, i) for i in range(256)]).save(p), r"\(1, 1, 1\)"),
    "alpha_of_black.png": (
        lambda p: Image.fromarray(over(GREY, (0, 0, 0))).save(p),
        r"the colour \(0, 0, 0\)",
    ),
    "wholly_transparent.png": (lambda p: Image.fromarray(over(GREY * 0)).save(p), r"the colour \(0, 0, 0\)"),
    "white_transparent.png": (
        lambda p: Image.fromarray(GREY).save(p, transparency=255),
        r"the colour \(0, 0, 0\)",
    ),
    "half_alpha.png": (lambda p: Image.fromarray(over(MASK * 128)).save(p), r"\(128, 128, 128\)"),
    "u16_labels.png": (lambda p: cv2.imwrite(str(p), labels(1, 2, dtype=np.uint16)), "the values 0, 1, 2"),
    "u16_4095.png": (lambda p: cv2.imwrite(str(p), labels(4095, dtype=np.uint16)), "the values 0, 4095"),
    "u16_rgb.png": (
        lambda p: cv2.imwrite(str(p), np.dstack([labels(9, dtype=np.uint16)] * 3)),
        "values 0, 9",
    ),
    "u16_red.png": (
        lambda p: cv2.imwrite(str(p), np.dstack([labels(d, dtype=np.uint16) for d in (0, 0, 255)])),
        "values 0, 85",
    ),
    "i32.tif": (lambda p: tiff(p, labels(7, dtype=np.int32)), r"white \(255\) where edited, .* values 0, 7"),
    "negative.tif": (
        lambda p: tiff(p, labels(-1, dtype=np.int32)),
        r"samples in \[0, 4294967295\], got -1 to 0",
    ),
    "f32.tif": (
        lambda p: Image.fromarray(labels(0.5, dtype=np.float32)).save(p),
        r"white \(1\) .* values 0, 0\.5",
    ),
    "f32_7.tif": (
        lambda p: Image.fromarray(labels(7, dtype=np.float32)).save(p),
        r"white \(255\) .* values 0, 7",
    ),
    "nan.tif": (lambda p: Image.fromarray(labels(np.nan, 1, dtype=np.float32)).save(p), "got nan to nan"),
    "matte.png": (
        lambda p: Image.fromarray(GREY).filter(ImageFilter.GaussianBlur(9)).save(p),
        "must be black where untouched and white",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused(tmp_path, name):
    save, words = BAD[name]
    save(tmp_path / name)
    with pytest.raises(ImageError, match=words) as caught:
        read_mask(tmp_path / name)
    assert str(caught.value).startswith(f"mask {str(tmp_path / name)!r} must ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_small_class_is_found_in_a_large_mask(tmp_path):
    array = np.zeros((600, 800), np.uint8)
    array[100:200, 100:200] = 255
    array[400:440, 400:440] = 128
    Image.fromarray(array).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"0\.3% grey away from edges among the values 0, 128, 255"):
        read_mask(tmp_path / "a.png")


@pytest.mark.parametrize("quality", [50, 75, 90, 95])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("inner", [False, True])
def test_jpeg(tmp_path, quality, mode, inner):
    """Compression moves samples near the border by a little; the marked pixels stay."""
    mask = Image.new("L", (160, 120))
    ImageDraw.Draw(mask).ellipse((20, 30, 110, 90), fill=255)
    mask.convert(mode).save(tmp_path / "a.jpg", quality=quality)
    path = tmp_path / "a.jpg"
    if inner:  # and as a lossless copy of the JPEG
        path = tmp_path / "a.png"
        Image.open(tmp_path / "a.jpg").save(path)
    assert len(np.unique(np.asarray(Image.open(path)))) > 10
    wrong = read_mask(path) != (np.asarray(mask) > 127)
    assert wrong.mean() < 0.004


@pytest.mark.parametrize("method", ["BOX", "BILINEAR", "BICUBIC", "LANCZOS"])
@pytest.mark.parametrize("factor", [2, 3, 5])
def test_soft_edges(tmp_path, method, factor):
    large = Image.new("L", (96 * factor, 64 * factor))
    ImageDraw.Draw(large).polygon([(n * factor + 1) for n in (10, 12, 80, 20, 50, 55)], fill=255)
    small = large.resize((96, 64), Image.Resampling[method])
    small.save(tmp_path / "a.png")
    assert len(np.unique(np.asarray(small))) > 3
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), np.asarray(small) > 127)


@pytest.mark.parametrize(("dark", "light"), [(9, 1), (1, 9), (9, 9)])
def test_noise_is_no_label(tmp_path, dark, light):
    rng = np.random.default_rng(0)
    noisy = np.where(MASK, 256 - rng.integers(1, light + 1, MASK.shape), rng.integers(0, dark, MASK.shape))
    Image.fromarray(noisy.astype(np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), MASK)


def test_one_soft_side_alone(tmp_path):
    """A border that covers a tenth of its pixels looks like labels 25 and 255, but stands at an edge."""
    array = GREY.copy()
    array[8:24, 15] = 25
    Image.fromarray(array).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), MASK)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.tif", "a.webp"])
def test_black_and_white_alone(tmp_path, name):
    for value in (0, 255):
        Image.new("L", (40, 24), value).save(
            tmp_path / name, **({"lossless": True} if "webp" in name else {})
        )
        assert (read_mask(tmp_path / name) == bool(value)).all()


def test_size(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "m.png")
    with pytest.raises(ImageError, match=r"m\.png' must have its photo's size 97 x 64, got 96 x 64"):
        read_mask(tmp_path / "m.png", (64, 97))


def test_damaged_masks_raise_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    for name in (
        "u16_rgb_255.png",
        "u16_rgb_255.tif",
        "palette.png",
        "f32_1.tif",
        "i32_255.tif",
        "alpha.png",
    ):
        GOOD[name](tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for turn in range(12):
            data = bytearray(whole[: int(rng.integers(1, len(whole)))] if turn % 2 else whole)
            for place in rng.integers(0, min(len(data), 150), 4 * (1 - turn % 2)):
                data[place] = int(rng.integers(256))
            (tmp_path / name).write_bytes(data)
            try:
                assert read_mask(tmp_path / name).dtype == np.bool_
            except ImageError as error:
                assert "\n" not in str(error)
