"""Classical localization on made images whose answer is known, and the command that compares methods."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import cv2
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks.localization import compare, methods, splicebuster
from frd_model import create_model, load_model, predict, save_model
from frd_model.data import read_image, write_png
from frd_model.data.forged_folder import forge_folder
from frd_model.data.images import read_mask
from frd_model.metrics import auc, permute_f1

REGION = np.s_[96:192, 128:256]
MAPS = {name: entrant for name, entrant in compare.baselines().items() if name not in ("centre", "all white")}


def scene(rng: np.random.Generator, height: int = 320, width: int = 400) -> np.ndarray:
    """Smooth shapes and texture, float32 [H, W, 3] about 40 to 215."""
    waves = sum(
        cv2.resize(
            rng.normal(size=(height // side, width // side, 3)),
            (width, height),
            interpolation=cv2.INTER_CUBIC,
        )
        * side**0.5
        for side in (4, 16, 64)
    )
    low, high = waves.min(), waves.max()
    return (40 + 175 * (waves - low) / (high - low)).astype(np.float32)


def edited() -> np.ndarray:
    mask = np.zeros((320, 400), np.bool_)
    mask[REGION] = True
    return mask


def eight_bit(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["noise variance", "noise level", "Splicebuster"])
@pytest.mark.parametrize("inside, outside", [(8.0, 3.0), (1.0, 6.0)])
def test_a_part_with_another_noise_is_found(name: str, inside: float, outside: float) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(320, 400, 3)) * np.where(edited()[..., None], inside, outside)
    found = MAPS[name].run(eight_bit(scene(rng) + noise))
    assert auc(found.map, edited()) > 0.99
    assert permute_f1(found.marked, edited()) > 0.7


@pytest.mark.parametrize("name, least", [("JPEG ghosts", 0.95), ("error level", 0.9)])
def test_a_part_with_a_lower_quality_than_the_rest_is_found(name: str, least: float) -> None:
    rng = np.random.default_rng(1)
    photo = eight_bit(scene(rng) + rng.normal(size=(320, 400, 3)) * 6)
    pasted = methods.recompressed(photo, 60)
    image = np.where(edited()[..., None], pasted, photo)
    assert auc(MAPS[name].run(methods.recompressed(image, 90)).map, edited()) > least


def test_farids_ghost_has_its_minimum_at_the_quality_of_the_part() -> None:
    rng = np.random.default_rng(2)
    photo = eight_bit(scene(rng) + rng.normal(size=(320, 400, 3)) * 6)
    image = np.where(edited()[..., None], methods.recompressed(photo, 60), photo)
    errors = [
        np.square(image.astype(np.float32) - methods.recompressed(image, quality))[REGION].mean()
        for quality in (50, 55, 60, 65, 70)
    ]
    assert int(np.argmin(errors)) == 2


@pytest.mark.parametrize("name", compare.baselines())
def test_maps_of_flat_small_and_odd_photos(name: str) -> None:
    run, rng = compare.baselines()[name].run, np.random.default_rng(3)
    for size in ((1, 1), (2, 3), (7, 9), (61, 130)):
        for photo in (np.full((*size, 3), 255, np.uint8), rng.integers(0, 256, (*size, 3), np.uint8)):
            found = run(photo)
            assert (found.map.dtype, found.map.shape) == (np.float32, size)
            assert (found.marked.dtype, found.marked.shape) == (np.bool_, size)
            assert np.isfinite(found.map).all() and np.isfinite(found.score)
            assert np.array_equal(found.map, run(photo).map)


def test_a_flat_photo_has_no_deviating_pixel() -> None:
    for name, entrant in MAPS.items():
        found = entrant.run(np.full((64, 80, 3), 90, np.uint8))
        assert np.ptp(found.map) == 0, name
        assert not found.marked.any()


def test_the_white_mask_marks_everything() -> None:
    found = compare.baselines()["all white"].run(np.zeros((5, 6, 3), np.uint8))
    assert found.marked.shape == (5, 6) and found.marked.all()


def test_deviation_is_in_robust_standard_deviations() -> None:
    values = np.random.default_rng(4).normal(5, 2, (300, 300)).astype(np.float32)
    assert np.allclose(methods.deviation(values), np.abs(values - 5) / 2, atol=0.06)


def test_words_are_counted_with_their_mirror_images_and_negatives() -> None:
    words = np.indices((3, 3, 3, 3)).reshape(4, -1).T
    bins, place = splicebuster.BINS, np.array([27, 9, 3, 1])
    assert len(set(bins)) == 25 and np.array_equal(words @ place, np.arange(81))
    assert np.array_equal(bins[words[:, ::-1] @ place], bins) and np.array_equal(
        bins[(2 - words) @ place], bins
    )
    levels = np.random.default_rng(5).integers(0, 3, (16, 24))
    counts = splicebuster.cell_counts(levels, axis=1)
    expected = np.zeros((2, 3, 25))
    for row, column in np.ndindex(16, 20):
        expected[row // 8, column // 8, bins[levels[row, column : column + 4] @ place]] += 1
    # the last three words of a row are cut by the border
    assert np.array_equal(counts[:, :2], expected[:, :2])
    assert counts.shape == (2, 3, 25) and (counts.sum(axis=2) == 64).all()


def test_mahalanobis_is_the_distance_in_standard_deviations() -> None:
    points = np.random.default_rng(6).normal([1, -2], [3, 0.5], (20000, 2))
    expected = ((points - [1, -2]) / [3, 0.5]) ** 2
    found = splicebuster.mahalanobis(points, np.ones(len(points)))
    assert np.allclose(found, expected.sum(axis=1), rtol=0.1, atol=0.1)


def test_summary() -> None:
    images = [
        {"kind": kind, "operation": operation, "host": host}
        for kind, operation in (("splicing", "paste"), ("retouch", "warp"), ("authentic", ""))
        for host in "ab"
    ]
    values = {
        "auc": [0.6, 1.0, 0.5, 0.7],
        "permute_f1": [0.2, 0.4, 0.0, 0.1],
        "optimal_f1": [0.3, 0.5, 0.2, 0.2],
    }
    method: dict[str, Any] = {name: [*column, None, None] for name, column in values.items()}
    method |= {"score": [0.9, 0.3, 0.1, 0.2, 0.4, 0.2], "marked": [0.0, 0.0, 0.0, 0.0, 0.5, 0.1]}
    found = compare.summarize(method, images, ["warp"])
    assert list(found) == ["untouched", "seen", "unseen", "splicing", "retouch warp", "splicing paste"]
    # two hosts: the draws are a twice, b twice, or both
    assert found["seen"]["auc"] == [0.8, 0.6, 1.0] and found["unseen"]["permute_f1"] == [0.05, 0.0, 0.1]
    assert found["untouched"] == {"images": 2, "marked": [0.3, 0.1, 0.5]}
    # 0.9 beats both, 0.3 beats 0.2
    assert found["seen"]["score_auc"][0] == 0.75 and found["unseen"]["score_auc"][0] == 0.125
    assert found["seen"]["found"]["0.05"] == [0.5, 0.0, 1.0]
    judged = compare.summarize(method | {"thresholds": {"0.01": 0.5, "0.05": 0.35, "0.10": 0.25}}, images, [])
    assert judged["untouched"]["verdict"]["0.05"][0] == 0.5
    assert judged["untouched"]["marked_after_verdict"][0] == 0.25
    assert judged["splicing"]["verdict"]["0.10"][0] == 1.0 and judged["retouch"]["verdict"]["0.10"][0] == 0.0


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    rng = np.random.default_rng(7)
    photos = {
        name: eight_bit(scene(rng, 96, 128) + rng.normal(size=(96, 128, 3)) * 3) for name in ("one", "two")
    }
    forge_folder(photos, tmp_path / "forged", 6, seed=2, authentic=0.4)
    return tmp_path / "forged"


def test_the_command_compares_and_goes_on(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, out = tmp_path / "small.safetensors", tmp_path / "results.json"
    save_model(create_model("frdnet_mit_b0", preset="lite"), net)
    arguments = ["localization", "--data", str(folder), "--out", str(out)]
    assert command.main(arguments) == 0
    without = json.loads(out.read_text())
    assert list(without["methods"]) == list(compare.baselines())
    # A net is added; the baselines stay as they were measured.
    without["methods"]["error level"]["seconds_per_megapixel"] = 77.0
    out.write_text(json.dumps(without))
    assert command.main([*arguments, "--checkpoint", str(net)]) == 0
    result = json.loads(out.read_text())
    assert {name: result["methods"].pop(name) for name in without["methods"]} == without["methods"]
    assert list(result["methods"]) == ["net small"]
    assert "net small" in capsys.readouterr().out
    check_figures(result["methods"]["net small"], result["images"], folder, net)
    # Another checkpoint of the same name is measured, and what was asked for.
    save_model(create_model("frdnet_mit_b0", preset="lite"), net)
    assert command.main([*arguments, "--checkpoint", str(net)]) == 0
    assert (
        json.loads(out.read_text())["methods"]["net small"]["score"]
        != result["methods"]["net small"]["score"]
    )
    assert command.main([*arguments, "--methods", "error level"]) == 0
    assert json.loads(out.read_text())["methods"]["error level"]["seconds_per_megapixel"] != 77.0


def check_figures(
    method: dict[str, Any], images: list[dict[str, str]], folder: pathlib.Path, net: pathlib.Path
) -> None:
    kinds = [image["kind"] for image in images]
    assert "authentic" in kinds and len(set(kinds)) > 1
    for index, image in enumerate(images):
        found = predict(read_image(folder / "images" / f"{image['name']}.png"), load_model(net))
        mask = read_mask(folder / "masks" / f"{image['name']}.png")
        assert method["marked"][index] == pytest.approx(found.mask.mean(), abs=1e-5)
        assert method["score"][index] == pytest.approx(found.score, abs=1e-5)
        assert (method["auc"][index] is None) == (image["kind"] == "authentic")
        if mask.any():
            assert method["auc"][index] == pytest.approx(auc(found.probability, mask), abs=1e-5)
            assert method["permute_f1"][index] == pytest.approx(permute_f1(found.mask, mask), abs=1e-5)


def test_what_the_command_refuses(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    arguments = ["localization", "--out", str(out), "--methods"]
    assert command.main([*arguments, "centre", "--data", str(tmp_path)]) == 2
    assert "must be folders that frd forge made" in capsys.readouterr().err
    assert command.main([*arguments, "centre,magic", "--data", str(folder)]) == 2
    assert "--methods must be some of error level, " in capsys.readouterr().err
    nets = []
    for name in "ab":
        (tmp_path / name).mkdir()
        save_model(create_model("frdnet_mit_b0", preset="lite"), tmp_path / name / "net.safetensors")
        nets += ["--checkpoint", str(tmp_path / name / "net.safetensors")]
    assert command.main([*arguments, "centre", "--data", str(folder), *nets]) == 2
    assert "must name files of different names" in capsys.readouterr().err
    assert not out.exists()
    assert command.main([*arguments, "centre", "--data", str(folder)]) == 0
    write_png(tmp_path / "photo.png", np.zeros((96, 96, 3), np.uint8))
    forge_folder({"x": np.full((64, 64, 3), 9, np.uint8)}, tmp_path / "other", 1)
    assert command.main([*arguments, "centre", "--data", str(tmp_path / "other")]) == 2
    assert "of others" in capsys.readouterr().err
    next((folder / "masks").iterdir()).unlink()
    assert command.main([*arguments, "centre", "--data", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("benchmarks localization: ")
