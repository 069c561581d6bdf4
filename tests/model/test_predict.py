"""Prediction at the photo's own size, whole and in tiles; bad input; `frd predict`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from frd_model import create_model, predict, save_model
from frd_model.cli import main
from frd_model.data.images import ImageError, read_image, write_png
from frd_model.predict import blend_windows, tile_starts
from frd_model.predict_command import name_jobs

TINY = {"stages": (1, 2), "blocks": 1, "pyramid_width": 8, "trace_widths": (8, 8)}


class Brightness(nn.Module):
    """A network without any context: the logit of a pixel is its red plane."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model("frdnet_mit_b0", preset="lite", **TINY)


@pytest.fixture(scope="module")
def checkpoint(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(model, path, {})
    return path


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", ["auto", "whole", "tiles", "resize"])
@pytest.mark.parametrize("shape", [(1, 1), (37, 200), (130, 97)])
def test_result_has_the_photos_size(model: nn.Module, size: str, shape: tuple[int, int]) -> None:
    result = predict(photo(*shape), model, size=size, tile=64, overlap=16)
    assert result.probability.shape == shape == result.size
    assert result.probability.dtype == np.float32
    assert result.mask.dtype == np.bool_
    assert 0 <= result.probability.min() <= result.probability.max() <= 1
    assert 0 <= result.score <= 1


@pytest.mark.parametrize("shape", [(64, 64), (65, 191), (33, 400)])
@pytest.mark.parametrize("overlap", [0, 16, 32])
def test_tiles_without_context_equal_the_whole(shape: tuple[int, int], overlap: int) -> None:
    image = photo(*shape)
    whole = predict(image, Brightness(), size="whole").probability
    tiles = predict(image, Brightness(), size="tiles", tile=64, overlap=overlap).probability
    np.testing.assert_allclose(tiles, whole, atol=2e-6)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 1000])
def test_windows_cover_and_sum_to_one(length: int) -> None:
    total = np.zeros(length)
    for start, weights in blend_windows(length, 64, 16):
        assert start >= 0
        assert (weights > 0).all()
        total[start : start + len(weights)] += weights
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


def test_neighbouring_tiles_overlap_as_asked() -> None:
    starts = tile_starts(1000, 64, 16)
    assert starts[0] == 0
    assert starts[-1] == 1000 - 64
    assert max(np.diff(starts)) <= 64 - 16


def test_20000_pixels_wide(model: nn.Module) -> None:
    result = predict(photo(8, 20_000), model, size="tiles", tile=512)
    assert result.probability.shape == (8, 20_000)


def test_model_stays_in_its_mode_and_is_deterministic(model: nn.Module) -> None:
    model.train()
    first = predict(photo(50, 60), model).probability
    assert model.training
    np.testing.assert_array_equal(first, predict(photo(50, 60), model).probability)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "huge"}, "size must be one of"),
        ({"tile": 8}, "tile must be at least"),
        ({"tile": 64, "overlap": 40}, "overlap must lie"),
        ({"threshold": 1.5}, "threshold must lie"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(photo(8, 8), Brightness(), **change)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (np.zeros((4, 4, 3), np.float32), TypeError),
        (np.zeros((4, 4), np.uint8), ValueError),
        (np.zeros((0, 4, 3), np.uint8), ValueError),
        (np.zeros((4, 4, 4), np.uint8), ValueError),
        (12, TypeError),
    ],
)
def test_bad_arrays(image: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="image must be"):
        predict(image, Brightness())  # type: ignore[arg-type]


def test_a_path_that_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "note.jpg"
    path.write_text("no image")
    with pytest.raises(ImageError, match=r"note\.jpg"):
        predict(path, Brightness())


def odd_files(folder: Path) -> None:
    """Photos of kinds that a careless reader gets wrong, named by kind."""
    rgb = Image.fromarray(photo(40, 60))
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 20).save(folder / "deep.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(photo(1, 1)).save(folder / "dot.png")
    Image.fromarray(photo(4, 20_000)).save(folder / "wide.png")


def test_command_on_a_folder_of_odd_photos(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "in", tmp_path / "out"
    photos.mkdir()
    odd_files(photos)
    (photos / "text.png").write_text("no image")
    whole = (photos / "turned.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])

    status = main(
        [
            "predict",
            str(photos),
            str(tmp_path / "missing.jpg"),
            "--out",
            str(out),
            "--checkpoint",
            str(checkpoint),
        ]
    )

    assert status == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 3
    for name in ("text.png", "cut.jpg", "missing.jpg"):
        assert sum(name in line for line in errors) == 1
    good = {"cmyk", "deep", "alpha", "turned", "dot", "wide"}
    assert {p.name for p in out.iterdir()} == {
        n + e for n in good for e in ("_mask.png", "_overlay.png", ".json")
    }
    record = json.loads((out / "turned.json").read_text())
    assert record["size"] == {"width": 40, "height": 60}
    assert record["checkpoint"] == str(checkpoint)
    assert read_image(out / "turned_mask.png").shape == (60, 40, 3)
    assert set(np.unique(read_image(out / "wide_mask.png"))) <= {0, 255}


def test_command_json_and_glob(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a1.png", "a2.png", "b.png"):
        write_png(tmp_path / name, photo(33, 34))
    pattern = str(tmp_path / "a*.png")
    arguments = [
        "predict",
        pattern,
        "--out",
        str(tmp_path / "out"),
        "--checkpoint",
        str(checkpoint),
        "--json",
    ]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == ["a1", "a2"]
    assert all(line["seconds"] > 0 for line in lines)


def test_second_run_does_not_take_its_own_results(tmp_path: Path, checkpoint: Path) -> None:
    write_png(tmp_path / "a.png", photo(33, 34))
    arguments = ["predict", str(tmp_path), "--out", str(tmp_path), "--checkpoint", str(checkpoint)]
    assert main(arguments) == 0
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(arguments) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_names_do_not_collide(tmp_path: Path) -> None:
    files = [tmp_path / p for p in ("a/x.png", "b/x.png", "b/X.jpg", "c/y.png", "c/b_x_png.png")]
    names = [job.name for job in name_jobs(files)]
    assert names[3] == "y"
    assert names[4] == "b_x_png"
    assert len({n.lower() for n in names}) == len(files)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all"])
def test_corrupt_checkpoint(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    write_png(tmp_path / "a.png", photo(33, 34))
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    assert (
        main(["predict", str(tmp_path / "a.png"), "--out", str(tmp_path / "o"), "--checkpoint", str(bad)])
        == 1
    )
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert "bad.safetensors" in errors[0]


def test_missing_checkpoint_and_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_png(tmp_path / "a.png", photo(33, 34))
    gone = str(tmp_path / "gone.safetensors")
    assert main(["predict", str(tmp_path / "a.png"), "--out", str(tmp_path / "o"), "--checkpoint", gone]) == 1
    assert "gone.safetensors" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["predict", str(empty), "--out", str(tmp_path / "o")]) == 1
    assert "empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra", [["--threshold", "2"], ["--tile", "3"], ["--size", "odd"], ["--threshold", "x"]]
)
def test_usage_errors(extra: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "a.png", "--out", str(tmp_path), *extra])
    assert stop.value.code == 2
