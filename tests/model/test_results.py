"""The kinds of results of `frd predict --save`, each read back and compared with the prediction itself."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from frd_model import predict
from frd_model.cli import main
from frd_model.cli.arguments import Checkpoint
from frd_model.data import images
from frd_model.data.images import read_image, write_png
from frd_model.results import run_lengths
from frd_model.saved_maps import SavedMaps, read_map


class Net(nn.Module):
    """The logit of a pixel is its red plane."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]


@pytest.fixture(autouse=True)
def net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "frd_model.cli.predict.open_checkpoint", lambda name, device, **_: Checkpoint(Net().eval(), "net")
    )


def photo(width: int = 50, height: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def run(*arguments: object) -> int:
    return main(["predict", *map(str, arguments)])


def test_every_kind(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", photo())
    kinds = "map,npz,contour,sheet,rle"
    assert run(tmp_path / "a.png", "--out", tmp_path / "out", "--save", kinds) == 0
    names = {"a.json", "a_map.png", "a_map.npz", "a_contour.png", "a_sheet.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    want = predict(photo(), Net())

    sixteen = cv2.imread(str(tmp_path / "out" / "a_map.png"), cv2.IMREAD_UNCHANGED)
    assert sixteen.dtype == np.uint16
    np.testing.assert_array_equal(sixteen, np.rint(want.probability.astype(np.float64) * 65535))
    with np.load(tmp_path / "out" / "a_map.npz") as saved:
        assert set(saved.files) == {"map", "score", "imgsize"}
        np.testing.assert_array_equal(saved["map"], want.probability)
        assert saved["score"] == want.score and saved["imgsize"].tolist() == [40, 50]
    assert read_map(tmp_path / "out" / "a_map.npz", (40, 50)).score == want.score

    sheet = read_image(tmp_path / "out" / "a_sheet.png")
    assert sheet.shape == (40, 3 * 50 + 2 * 8, 3)
    np.testing.assert_array_equal(sheet[:, :50], photo())
    np.testing.assert_array_equal(sheet[:, 58:108], images.overlay(photo(), want.probability))
    np.testing.assert_array_equal(sheet[:, 116:, 0] == 255, want.mask)
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record["rle"] == run_lengths(want.mask)


def test_only_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_png(tmp_path / "a.png", photo())
    assert run(tmp_path / "a.png", "--out", tmp_path / "out", "--save", "json") == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.json"]
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "a.png", "--out", tmp_path / "out", "--save", "mask,heat")
    assert "--save: must be among mask, overlay, map," in capsys.readouterr().err


def test_a_second_run_adds_kinds_and_leaves_none_behind(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", photo())
    given = [tmp_path / "a.png", "--out", tmp_path / "out"]
    assert run(*given) == 0
    assert run(*given, "--save", "map,rle") == 1, "results are there"
    assert run(*given, "--save", "mask,map,rle", "--resume") == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"a.json", "a_mask.png", "a_map.png"}
    assert "rle" in json.loads((tmp_path / "out" / "a.json").read_text())
    assert run(*given, "--save", "overlay", "--overwrite") == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"a.json", "a_overlay.png"}


@pytest.mark.parametrize("kinds", ["map", "npz", "mask,overlay,map,npz,sheet"])
def test_evaluate_reads_what_predict_wrote(
    kinds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where two photos have one name without suffix, so that their results are named after the folder."""
    red = photo()[:, :, 0]
    write_png(tmp_path / "photos" / "a.png", photo())
    write_png(tmp_path / "masks" / "a.png", red > 130)
    Image.fromarray(photo(seed=1)).save(tmp_path / "photos" / "b.png")
    Image.fromarray(photo(seed=2)).save(tmp_path / "photos" / "b.bmp")
    assert run(tmp_path / "photos", "--out", tmp_path / "maps", "--save", kinds) == 0
    (tmp_path / "photos" / "b.bmp").unlink()
    write_png(tmp_path / "masks" / "b.png", photo(seed=1)[:, :, 0] > 130)
    capsys.readouterr()
    folders = ["--images", str(tmp_path / "photos"), "--masks", str(tmp_path / "masks")]
    given = [*folders, "--predictions", str(tmp_path / "maps"), "--csv", str(tmp_path / "rows.csv")]
    assert main(["evaluate", *given]) == 0
    assert "belong to no photo" in (printed := capsys.readouterr()).err, "that of b.bmp"
    assert "are not maps" not in printed.err
    header, *rows = [line.split(",") for line in (tmp_path / "rows.csv").read_text().splitlines()]
    assert len(rows) == 2 and all(float(row[header.index("auc")]) == 1 for row in rows)
    if "npz" in kinds:
        want = predict(photo(), Net()).score
        assert SavedMaps(tmp_path / "maps").load("a.png", None, (40, 50)).score == want


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        # By pycocotools 2.0.11: runs 5 2 2 2 2 2 5, the fourth and later as differences to the second before.
        (np.pad(np.ones((2, 3), bool), ((1, 1), (1, 1))), "5220003"),
        (np.zeros((3, 3), bool), "9"),
        (np.ones((3, 3), bool), "09"),
    ],
)
def test_run_lengths(mask: np.ndarray, counts: str) -> None:
    assert run_lengths(mask) == {"size": list(mask.shape), "counts": counts}


def test_long_run_lengths() -> None:
    """Runs and differences of several digits, as pycocotools 2.0.11 encodes them."""
    mask = np.zeros((40, 50), bool)
    mask[5:30, 7:9] = mask[0, 0] = True
    assert run_lengths(mask)["counts"] == "01l8h0cG0Sc1"


def test_contour_is_the_outline_of_the_mask() -> None:
    image = np.full((60, 80, 3), 90, np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[20:40, 50:] = True
    got = np.concatenate(list(images.contour_bands(image, mask)))
    yellow = (got == (255, 230, 0)).all(axis=2)
    assert yellow[20, 52:78].all() and yellow[39, 52:78].all() and yellow[22:38, 50].all()
    assert yellow[22:38, 79].all(), "the region ends at the photo's border"
    np.testing.assert_array_equal(got[24:36, 55:75], image[24:36, 55:75])
    np.testing.assert_array_equal(got[:15], image[:15])
    assert (np.concatenate(list(images.contour_bands(image, ~mask & False))) == image).all()


def test_contour_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((60, 80), bool)
    mask[10:50, 10:70] = photo(60, 40)[:, :, 0] > 128
    whole = np.concatenate(list(images.contour_bands(photo(80, 60), mask)))
    monkeypatch.setattr(
        images, "row_bands", lambda height, width: (slice(y, min(y + 3, height)) for y in range(0, height, 3))
    )
    np.testing.assert_array_equal(np.concatenate(list(images.contour_bands(photo(80, 60), mask))), whole)


def test_sheet_of_a_large_photo_is_small() -> None:
    mask = np.zeros((300, 4000), bool)
    mask[:, 2000:] = True
    empty = np.broadcast_to(np.float32(0), mask.shape)
    got = images.sheet(photo(4000, 300), empty, mask)
    assert got.shape == (77, 3 * 1024 + 16, 3)
    assert not got[:, 2064:2500].any() and (got[:, 2600:] == 255).all()


@pytest.mark.parametrize("name", ["viridis", "cividis"])
def test_colour_maps_grow_lighter_with_the_probability(name: str) -> None:
    """On black, and so for those who do not see the hue."""
    probability = np.linspace(0, 1, 64, dtype=np.float32)[None]
    got = images.overlay(np.zeros((1, 64, 3), np.uint8), probability, colour_map=name)
    lightness = cv2.cvtColor(got, cv2.COLOR_RGB2LAB)[0, :, 0].astype(int)
    assert (np.diff(lightness) >= 0).all() and lightness[-1] - lightness[0] > 100
    with pytest.raises(ValueError, match="colour_map must be one of viridis, cividis, got 'jet'"):
        images.overlay(got, probability, colour_map="jet")
