"""The rule of masks is one for all commands that read them."""

import json

import numpy as np
import pytest
from PIL import Image

from frd_model.cli import main

TINY = {"stages": [1, 2], "blocks": 1, "pyramid_width": 8, "trace_widths": [8, 8]}
SIZE = (64, 48)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Four photos of several formats, with masks of several kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    rng = np.random.default_rng(0)
    grey = np.zeros(SIZE[::-1], np.uint8)
    grey[8:24, 16:40] = 255
    masks = {
        "a": ("jpg", Image.fromarray(grey), "jpg"),
        "b": ("png", Image.fromarray(grey.astype(np.uint16)), "png"),
        "c": ("webp", Image.fromarray(grey > 0), "tif"),
        "d": ("tif", Image.fromarray(grey).convert("RGBA"), "webp"),
    }
    for name, (photo_format, mask, mask_format) in masks.items():
        pixels = rng.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.{photo_format}")
        mask.save(tmp_path / "masks" / f"{name}.{mask_format}", **({"lossless": True} if name == "d" else {}))
    return tmp_path


def check():
    return main(["data", "check", "--images", "images", "--masks", "masks"])


def train(*flags):
    small = [
        "--crop",
        "32",
        "--batch-size",
        "2",
        "--epochs",
        "1",
        "--workers",
        "0",
        "--output",
        "runs",
        *flags,
    ]
    options = ["--set", f"model.options={json.dumps(TINY)}", "--set", "optim.warmup_epochs=0"]
    return main(["train", "--images", "images", "--masks", "masks", *small, *options])


def evaluate(*flags):
    return main(["evaluate", "--images", "images", "--masks", "masks", "--size", "resize", *flags])


def test_all_kinds_are_read(folders, capsys):
    assert check() == 0
    assert "4 photos, 0 of them untouched, 0 findings" in capsys.readouterr().out
    assert train() == 0
    assert "inverted" not in capsys.readouterr().err


@pytest.mark.parametrize("values", [(0, 2), (0, 100), (0, 128)])
def test_labels_are_named_by_all(folders, capsys, values):
    labels = np.full(SIZE[::-1], values[0], np.uint8)
    labels[8:24, 16:40] = values[1]
    Image.fromarray(labels).save(folders / "masks" / "c.tif")
    words = f"got the values {values[0]}, {values[1]}"
    assert check() == 1
    out = capsys.readouterr().out
    assert "c.tif' must be black where untouched and white (255) where edited" in out and words in out
    assert train("--set", "data.max_bad=0") == 1
    assert words in capsys.readouterr().err
    assert evaluate() == 1
    assert words in capsys.readouterr().err


def test_inverted_masks_are_warned_of_by_all(folders, capsys):
    for path in (folders / "masks").iterdir():
        Image.fromarray(np.uint8(255) - np.asarray(Image.open(path).convert("L"))).save(
            path.with_suffix(".png")
        )
        if path.suffix != ".png":
            path.unlink()
    # 16-bit samples are lost in convert("L"), so this one is written anew
    white = np.full(SIZE[::-1], 255, np.uint8)
    white[:8] = 0
    Image.fromarray(white).save(folders / "masks" / "b.png")
    assert check() == 1
    assert capsys.readouterr().out.count("(inverted?)") == 4
    assert train() == 0
    assert "masks read mark more than half of their photo" in capsys.readouterr().err
    assert evaluate() == 0
    assert "4 of 4 masks read mark more than half of their photo" in capsys.readouterr().err
    assert evaluate("--invert-masks") == 0
    assert "masks read" not in capsys.readouterr().err
