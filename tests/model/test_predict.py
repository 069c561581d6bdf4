"""Prediction at the photo's own size, whole and in tiles; bad input; `frd predict`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from frd_model import create_model, predict, save_model
from frd_model.cli import main
from frd_model.cli.predict_jobs import name_jobs
from frd_model.data.images import ImageError, read_image, write_png
from frd_model.device import available_devices, parse_device
from frd_model.predict import PredictionError, blend_windows, probability_map, tile_starts

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
        ({"device": "gpu"}, "device must be auto, cpu, mps, cuda or cuda:N, got 'gpu'"),
        ({"device": "meta"}, "device must be one that torch can use here, got 'meta'"),
        ({"threshold": float("nan")}, "threshold must lie"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(photo(8, 8), Brightness(), **change)


@pytest.mark.parametrize("change", [{"threshold": "0.5"}, {"tile": None}, {"tile": 64.0}])
def test_arguments_of_another_type(change: dict) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(change))} must be"):
        predict(photo(8, 8), Brightness(), **change)


def test_pictures_that_hold_their_values_otherwise() -> None:
    """Premultiplied alpha, and a tensor whose sign is kept as a flag."""
    grey = photo(40, 50)[:, :, 0]
    alike = Image.merge("LA", [Image.fromarray(grey), Image.new("L", (50, 40), 255)])
    flagged = torch.complex(torch.zeros(40, 50), torch.from_numpy(grey) / -255).conj().imag
    assert flagged.is_neg()
    want = predict(grey, Brightness()).probability
    np.testing.assert_array_equal(predict(alike.convert("La"), Brightness()).probability, want)
    np.testing.assert_array_equal(predict(flagged, Brightness()).probability, want)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (np.zeros((4, 4, 3), np.int64), TypeError),
        (np.zeros((4, 4, 3), bool), TypeError),
        (np.full((4, 4, 3), 255.0), ValueError),
        (np.full((4, 4, 3), -0.5, np.float32), ValueError),
        (np.full((4, 4, 3), np.nan), ValueError),
        (np.zeros((0, 4, 3), np.uint8), ValueError),
        (np.zeros((3, 40, 40), np.uint8), ValueError),
        (np.zeros((1, 4, 4, 3), np.uint8), ValueError),
        (torch.zeros(1, 3, 40, 40), ValueError),
        (torch.zeros(40, 40, 3), ValueError),
        (torch.zeros(3, 40, 40, dtype=torch.int64), TypeError),
        (torch.full((3, 40, 40), 2.0), ValueError),
        (12, TypeError),
        (b"photo.png", ImageError),
        (b"", ImageError),
    ],
)
def test_bad_arrays(image: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^image (of floats |'bytes' )?must"):
        predict(image, Brightness())  # type: ignore[arg-type]


def test_photos_in_one_batch_are_those_alone(model: nn.Module) -> None:
    """Of several sizes, whole and in tiles, with one that fills a batch by itself."""
    photos = [photo(*shape, seed=n) for n, shape in enumerate([(64, 96), (40, 40), (64, 96), (200, 150)] * 2)]
    for options in ({"size": "whole"}, {"size": "tiles", "tile": 64, "overlap": 8}, {"size": "resize"}):
        together = predict(photos, model, batch_size=5, **options)
        for image, found in zip(photos, together, strict=True):
            alone = predict(image, model, **options)
            np.testing.assert_allclose(found.probability, alone.probability, atol=1e-5)
            assert found.size == image.shape[:2] and found.score == pytest.approx(alone.score, abs=1e-5)


def test_photos_of_one_size_share_a_forward_pass() -> None:
    batches: list[tuple[int, ...]] = []

    class Noting(Brightness):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batches.append(tuple(x.shape))
            return super().forward(x)

    photos = [photo(40, 50), photo(60, 50), photo(40, 50), photo(40, 50)]
    predict(photos, Noting(), batch_size=3)
    assert batches == [(2, 3, 40, 50), (1, 3, 60, 50), (1, 3, 40, 50)]
    batches.clear()
    predict([photo(64, 120), photo(70, 64)], Noting(), batch_size=4, size="tiles", tile=64, overlap=8)
    assert batches == [(4, 3, 64, 64)], "tiles of both photos"


def test_a_batch_that_does_not_fit_is_halved() -> None:
    class Small(Brightness):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    image = photo(200, 200)
    found = predict(image, Small(), size="tiles", tile=64, overlap=8, batch_size=8)
    np.testing.assert_allclose(found.probability, predict(image, Brightness()).probability, atol=2e-6)


def test_device_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(cuda: int, mps: bool) -> list[str]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        return [str(device) for device in available_devices()]

    assert found(0, False) == ["cpu"] and str(parse_device("auto")) == "cpu"
    assert found(0, True) == ["mps", "cpu"] and found(2, False) == ["cuda:0", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert found(8, False)[0] == "cuda:3" and found(2, False)[0] == "cuda:1"


def as_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image)


@pytest.mark.parametrize(
    "convert",
    [
        as_pillow,
        lambda image: as_pillow(image).convert("RGBA"),
        lambda image: image.astype(np.uint16) * 257,
        lambda image: (image.astype(np.uint16) * 257).astype(">u2"),
        lambda image: image / 255,
        lambda image: (image / 255).astype(np.float32)[::1, ::1].copy(order="F"),
        lambda image: np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]),
        lambda image: torch.from_numpy(image).permute(2, 0, 1),
        lambda image: (torch.from_numpy(image).permute(2, 0, 1).double() / 255).requires_grad_(),
    ],
)
def test_every_kind_of_picture_gives_the_same(convert: Callable[[np.ndarray], object]) -> None:
    image = photo(40, 50)
    want = predict(image, Brightness()).probability
    np.testing.assert_array_equal(predict(convert(image), Brightness()).probability, want)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_pillow_modes_are_read_as_files_are(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(photo(40, 50))
    image = image.convert("L").convert(mode) if mode in ("I", "F", "I;16", "PA") else image.convert(mode)
    got = predict(image, Brightness())
    assert got.size == (40, 50)
    if mode in ("1", "L", "P", "LA", "I;16"):
        image.save(tmp_path / "a.png")
        np.testing.assert_array_equal(got.probability, predict(tmp_path / "a.png", Brightness()).probability)


def test_a_pillow_image_is_turned_as_its_exif_says() -> None:
    image = Image.fromarray(photo(40, 60))
    image.getexif()[0x0112] = 6
    got = predict(image, Brightness())
    assert got.size == (60, 40)
    assert image.size == (60, 40)  # Pillow's (width, height): the caller's image is as it was
    np.testing.assert_array_equal(
        got.probability, np.rot90(predict(photo(40, 60), Brightness()).probability, -1)
    )


def test_grey_and_transparent_arrays() -> None:
    grey = photo(40, 50)[:, :, 0]
    want = predict(np.repeat(grey[:, :, None], 3, axis=2), Brightness()).probability
    for picture in (grey, grey[:, :, None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        np.testing.assert_array_equal(predict(picture, Brightness()).probability, want)
    clear = np.dstack([photo(40, 50), np.zeros((40, 50), np.uint8)])
    white = predict(np.full((40, 50, 3), 255, np.uint8), Brightness()).probability
    np.testing.assert_array_equal(predict(clear, Brightness()).probability, white)


def test_lists_come_back_as_lists(tmp_path: Path) -> None:
    images = [photo(40, 50), photo(33, 70, seed=1)]
    path = write_png(tmp_path / "a.png", images[0])
    got = predict((path, images[1]), Brightness())
    assert isinstance(got, list)
    for result, image in zip(got, images, strict=True):
        np.testing.assert_array_equal(result.probability, predict(image, Brightness()).probability)
    assert predict([], Brightness()) == []
    assert [r.size for r in predict(list(torch.zeros(2, 3, 40, 50)), Brightness())] == [(40, 50)] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", ["whole", "tiles", "resize"])
def test_output_that_is_not_finite_is_an_error(value: float, size: str) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x[:, :1].clone()
            y[-1, 0, -1, -1] = value
            return y

    with pytest.raises(PredictionError, match="logits must be finite, got NaN or infinity in 1 of"):
        predict(photo(40, 50), Broken(), size=size, tile=64, overlap=16)


def test_output_of_another_shape_is_an_error() -> None:
    with pytest.raises(PredictionError, match=r"logits \[1, 1, 40, 50\], got \[1, 3, 40, 50\]"):
        predict(photo(40, 50), nn.Identity())


def test_a_callable_takes_the_same_path(model: nn.Module) -> None:
    want = predict(photo(100, 90), model, size="tiles", tile=64, overlap=16).probability
    model.eval()
    got = probability_map(photo(100, 90), lambda x: model(x), size="tiles", tile=64, overlap=16)
    np.testing.assert_array_equal(got, want)


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
    assert main([*arguments, "--overwrite"]) == 0
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


def test_commands_take_device_auto(checkpoint: Path, tmp_path: Path) -> None:
    """Without a GPU, as by name of the CPU."""
    write_png(tmp_path / "photos" / "a.png", photo(80, 90))
    write_png(tmp_path / "masks" / "a.png", photo(80, 90)[:, :, 0] > 200)
    found = {}
    for device in ("auto", "cpu"):
        given = ["--checkpoint", str(checkpoint), "--device", device]
        assert main(["predict", str(tmp_path / "photos"), *given, "--out", str(tmp_path / device)]) == 0
        sets = ["--images", str(tmp_path / "photos"), "--masks", str(tmp_path / "masks")]
        assert main(["evaluate", *sets, *given, "--csv", str(tmp_path / f"{device}.csv")]) == 0
        found[device] = (tmp_path / device / "a_mask.png").read_bytes()
    assert found["auto"] == found["cpu"]
    tables = [next(csv.DictReader((tmp_path / f"{device}.csv").open())) for device in found]
    assert tables[0] | {"seconds": ""} == tables[1] | {"seconds": ""}
