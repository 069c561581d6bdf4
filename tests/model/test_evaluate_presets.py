"""Protocols by name, maps that other methods saved, and Table 1, as `frd` runs them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score
from torch import nn

from frd_model.cli import main
from frd_model.cli.arguments import Checkpoint
from frd_model.data.images import write_json, write_png
from frd_model.evaluate import evaluate, evaluate_saved
from frd_model.evaluate_presets import EVAL_PRESETS, eval_preset
from frd_model.evaluate_table import paper_tables, table1
from frd_model.labelled import Labelled, Source
from frd_model.metrics import border_band, optimal_f1, permute_f1
from frd_model.predict import predict
from frd_model.saved_maps import MapError, SavedMaps, read_map

SIZE = (90, 120)


class Redness(nn.Module):
    """The logit of a pixel is its normalised red plane."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]


def photo_and_mask(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy photo that is redder where it was edited."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(SIZE, bool)
    mask[20:60, 30 + 5 * seed : 80 + 5 * seed] = True
    image = rng.integers(0, 160, (*SIZE, 3)).astype(np.uint8)
    image[mask, 0] += 60
    return image, mask


@pytest.fixture
def samples() -> list[Labelled]:
    made = [Labelled(f"{seed}.png", "", *photo_and_mask(seed)) for seed in range(3)]
    quiet = np.zeros((*SIZE, 3), np.uint8)
    return [*made, Labelled("quiet.png", "", quiet, np.zeros(SIZE, bool))]


@pytest.fixture
def folder(tmp_path: Path, samples: list[Labelled]) -> Path:
    """ROOT/set/images and masks, and the maps of the redness in ROOT/maps, as npy."""
    (tmp_path / "maps").mkdir()
    for sample in samples:
        write_png(tmp_path / "set" / "images" / sample.name, sample.image)
        if sample.mask.any():
            write_png(tmp_path / "set" / "masks" / sample.name, sample.mask)
        probability = predict(sample.image, Redness(), size="whole").probability
        np.save(tmp_path / "maps" / f"{Path(sample.name).stem}.npy", probability)
    return tmp_path


def run(folder: Path, *arguments: object) -> int:
    given = "--images", folder / "set" / "images", "--masks", folder / "set" / "masks", *arguments
    return main(["evaluate", *map(str, given)])


def means_of(folder: Path, *arguments: object) -> dict[str, Any]:
    """The summary that a command writes."""
    out = folder / "out.json"
    assert run(folder, *arguments, "--json-out", out, "--overwrite") == 0
    return json.loads(out.read_text())


def test_each_preset_has_its_own_size_threshold_and_means(samples: list[Labelled]) -> None:
    """The same photos and the same net: what each preset must give, by its rule written out."""
    image, mask = photo_and_mask(3)
    image[:, :, 0] = np.where(mask, image[:, :, 0] // 4, image[:, :, 0] // 2 + 120)
    samples.append(Labelled("turned.png", "", image, mask))
    forged = [sample for sample in samples if sample.mask.any()]
    own = [(predict(s.image, Redness(), size="whole").probability, s.mask) for s in forged]
    squares = [
        (
            predict(cv2.resize(s.image, (512, 512), interpolation=cv2.INTER_LINEAR), Redness()).probability,
            cv2.resize(s.mask.astype(np.uint8), (512, 512), interpolation=cv2.INTER_NEAREST) > 0,
        )
        for s in forged
    ]
    bands = [(p, *border_band(m)) for p, m in own]
    want = {
        "original": np.mean([f1_score(m.reshape(-1), (p > 0.5).reshape(-1)) for p, m in own]),
        "cat-fixed": np.mean([permute_f1(p, m) for p, m in own]),
        "trufor-opt": np.mean([optimal_f1(p[scored], edited[scored]).f1 for p, edited, scored in bands]),
        "benco-512": np.mean([f1_score(m.reshape(-1), (p > 0.5).reshape(-1)) for p, m in squares]),
    }
    got = {}
    for name, preset in EVAL_PRESETS.items():
        summary = evaluate(samples, Redness(), preset=name).summary(0)
        got[name] = summary["means"][preset.main]["mean"]
        assert got[name] == pytest.approx(want[name], rel=1e-6), name
        assert summary["means"][preset.main]["images"] == 4
        assert summary["authentic"]["images"] == 1 and summary["preset"]["name"] == name
    assert len({round(value, 4) for value in got.values()}) == 4


def test_presets_of_saved_maps_differ_as_those_of_the_net(samples: list[Labelled], folder: Path) -> None:
    for name in ("original", "cat-fixed", "trufor-opt"):
        net = evaluate(samples, Redness(), preset=name).summary(50)["means"]
        saved = evaluate_saved(samples, SavedMaps(folder / "maps"), preset=name).summary(50)["means"]
        assert net == saved
    # a map at the photo's size is resized to the 512 that are scored
    small = evaluate_saved(samples, SavedMaps(folder / "maps"), preset="benco-512").summary(0)
    assert small["notes"]["map resized to the size that is scored (bilinear)"] == 4
    image = cv2.resize(np.load(folder / "maps" / "0.npy"), (512, 512), interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(samples[0].mask.astype(np.uint8), (512, 512), interpolation=cv2.INTER_NEAREST)
    row = evaluate_saved(samples[:1], SavedMaps(folder / "maps"), preset="benco-512").rows[0]
    assert row["f1"] == pytest.approx(f1_score(mask.reshape(-1), image.reshape(-1) > 0.5))


def test_flags_override_a_preset_or_are_refused() -> None:
    assert eval_preset("cat-fixed", size="tiles", threshold=0.3).describe() == (
        "cat-fixed: size policy tiles, scored at the photo's own size; permute_f1 at threshold 0.3, all pixels; "
        "mean over forged photos"
    )
    with pytest.raises(
        ValueError, match="size must be left out with preset benco-512, which fixes it, got 'whole'"
    ):
        eval_preset("benco-512", size="whole")
    with pytest.raises(ValueError, match="preset must be one of original, cat-fixed"):
        eval_preset("paper")


def save(file: Path, probability: np.ndarray, kind: str) -> None:
    """A map as methods save it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "png8":
        write_png(file, np.rint(255 * probability).astype(np.uint8))
    elif kind == "png16":
        Image.fromarray(np.rint(65535 * probability).astype(np.uint16)).save(file)
    elif kind == "npy":
        np.save(file, probability[None])
    else:
        np.savez(file, map=probability, conf=probability, score=0.25, imgsize=np.array(probability.shape))


@pytest.mark.parametrize(
    ("kind", "name", "step"),
    [
        ("png8", "0.png", 1 / 255),
        ("png16", "0.PNG", 1 / 65535),
        ("npy", "0.npy", 0),
        ("npz", "0.png.npz", 0),
        ("npy", "deep/er/0.npy", 0),
    ],
)
def test_every_kind_of_map(
    kind: str, name: str, step: float, samples: list[Labelled], tmp_path: Path
) -> None:
    probability = predict(samples[0].image, Redness(), size="whole").probability
    save(tmp_path / name, probability, kind)
    got = SavedMaps(tmp_path).load("0.png", None, SIZE)
    assert got.probability.dtype == np.float32
    np.testing.assert_allclose(got.probability, probability, atol=step / 2 + 1e-7)
    assert got.score == (0.25 if kind == "npz" else None)
    row = evaluate_saved(samples[:1], SavedMaps(tmp_path)).rows[0]
    assert row["auc"] == pytest.approx(
        evaluate(samples[:1], Redness(), size="whole").rows[0]["auc"], abs=2e-3
    )
    assert kind != "npz" or row["score"] == 0.25


def test_maps_of_photos_in_folders(tmp_path: Path) -> None:
    for name in ("x.npy", "a/x.npy", "b/x.npy", "c/y.npy", "caf\u0065\u0301.npy"):
        save(tmp_path / name, np.zeros((2, 2), np.float32), "npy")
    maps = SavedMaps(tmp_path)
    assert maps.find("a/x.jpg", "/data/a/x.jpg") == tmp_path / "a" / "x.npy"
    assert maps.find("x.jpg", "/data/b/x.jpg") == tmp_path / "x.npy"
    assert maps.find("caf\u00e9.jpg").name.endswith(".npy")
    assert maps.find("y.jpg", "/data/Tp/y.jpg") == tmp_path / "c" / "y.npy"
    assert maps.unused() == [tmp_path / "b" / "x.npy"]
    with pytest.raises(MapError, match=r"must belong to one photo, got 'x.jpg' and 'x.png'"):
        maps.find("x.png", "/data/x.png")
    with pytest.raises(MapError, match=r"photo 'z.jpg' must have a map in .* got none of that name"):
        maps.find("z.jpg")
    with pytest.raises(MapError, match=r"photo 'd/y.jpg' must have a map"):
        maps.find("d/y.jpg", "/data/d/y.jpg")
    save(tmp_path / "x.png", np.zeros((2, 2), np.float32), "png8")
    with pytest.raises(MapError, match=r"photo 'x.jpg' must have one map, got .*x.npy' and .*x.png'"):
        SavedMaps(tmp_path).find("x.jpg")


def test_folders_of_maps_may_be_links_and_form_circles(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "x.npy", np.zeros((2, 2), np.float32), "npy")
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "maps")
    assert SavedMaps(tmp_path / "maps").find("a/x.jpg") == tmp_path / "maps" / "a" / "x.npy"


def test_a_mask_that_the_scoring_size_loses_is_an_error_of_its_photo(tmp_path: Path) -> None:
    mask = np.zeros((1100, 1100), bool)
    mask[1, 1] = True
    np.save(tmp_path / "a.npy", np.zeros((512, 512), np.float32))
    report = evaluate_saved(
        [Labelled("a", "", mask[..., None], mask)], SavedMaps(tmp_path), preset="benco-512"
    )
    assert "mask must keep an edited pixel at 512 x 512, got none" in report.failed[0]["error"]


GOOD = np.full((4, 6), 0.25, np.float32)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.npy", GOOD * 8, r"in \[0, 1\], got 2 to 2 \(logits"),
        ("a.npy", -GOOD, r"in \[0, 1\], got -0.25 to -0.25"),
        ("a.npy", np.where(GOOD > 0, np.nan, GOOD), "no NaN, got 24 of them"),
        ("a.npy", GOOD.astype(np.int64), "floats, bool, uint8 or uint16, got int64"),
        ("a.npy", np.zeros((3, 4, 6), np.float32), r"shape \[H, W\], got \[3, 4, 6\]"),
        ("a.npy", np.zeros((0, 6), np.float32), r"shape \[H, W\], got \[0, 6\]"),
        ("a.npy", GOOD.T, "must not lie on its side: the photo is 6 x 4, got 4 x 6"),
        ("a.npz", {"pred": GOOD}, "must hold the key map, got pred"),
        ("a.npz", {"map": GOOD, "score": np.float32(1.5)}, r"score must lie in \[0, 1\], got 1.5"),
        ("a.npz", {"map": GOOD, "imgsize": np.array([5, 6])}, r"imgsize must be .* \(4, 6\), got \(5, 6\)"),
        ("a.png", np.stack([GOOD, GOOD, 2 * GOOD], 2), "must be grey, got colours"),
        ("a.npy", b"cut", "a.npy"),
        ("a.npz", b"cut", "must be an npz archive"),
        ("a.png", b"cut", "a.png"),
    ],
)
def test_bad_maps_name_file_rule_and_value(name: str, content: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(file, **content)
    elif content.ndim == 3 and content.shape[2] == 3:
        write_png(file, (255 * content).astype(np.uint8))
    else:
        np.save(file, content)
    with pytest.raises(MapError, match=words) as caught:
        read_map(file, (4, 6))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_scores_saved_maps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    means = means_of(
        folder, "--predictions", folder / "maps", "--preset", "cat-fixed", "--csv", folder / "rows.csv"
    )
    assert means["set"] == "set" and means["method"] == "maps" and means["checkpoint"] is None
    mean = means["means"]["permute_f1"]
    assert mean["low"] <= mean["mean"] <= mean["high"] and mean["images"] == 3
    assert means["skipped"] == {"untouched photo: no pixel metric": 1}
    with (folder / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert np.mean([float(r["permute_f1"]) for r in rows if r["permute_f1"]]) == pytest.approx(mean["mean"])
    out = capsys.readouterr().out
    assert (
        "preset cat-fixed: saved maps, scored at the photo's own size" in out
        and "skipped: 1 x untouched photo" in out
    )


def test_bad_and_missing_maps_are_named_and_the_others_scored(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "maps" / "0.npy").unlink()
    np.save(folder / "maps" / "1.npy", np.full(SIZE, 7.0))
    np.save(folder / "maps" / "stray.npy", np.zeros(SIZE))
    (folder / "maps" / "log.txt").write_text("")
    out = folder / "out.json"
    assert run(folder, "--predictions", folder / "maps", "--json-out", out) == 1
    means, error = json.loads(out.read_text()), capsys.readouterr().err
    assert means["means"]["f1"]["images"] == 1 and means["skipped"]["could not be read or scored"] == 2
    assert "photo '0.png' must have a map" in error and "got 7 to 7" in error
    assert "1 maps belong to no photo" in error and "stray.npy" in error and "1 files" in error


def test_suspicious_maps_are_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (folder / "maps").glob("*.npy"):
        values = np.load(file)
        np.save(file, 1 - values)
    assert run(folder, "--predictions", folder / "maps") == 0
    assert "inverted maps?" in capsys.readouterr().err
    for file in (folder / "maps").glob("*.npy"):
        write_png(file.with_suffix(".png"), (np.load(file) > 0.5).astype(np.uint8))
        file.unlink()
    assert run(folder, "--predictions", folder / "maps") == 0
    assert "no map reaches above 1 / 255" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (("--predictions", "{}/maps", "--checkpoint", "demo"), "--predictions takes maps as they are", 2),
        (("--predictions", "{}/maps", "--size", "whole"), "no --size: leave one of the two out", 2),
        (("--predictions", "{}/none"), "predictions must be a folder of maps", 1),
        (("--predictions", "{}/set/masks/0.png"), "predictions must be a folder of maps", 1),
        (("--preset", "benco-512", "--size", "auto"), "size must be left out with preset benco-512", 1),
        (("--preset", "paper"), "a net's preset goes with --model-preset paper", 2),
        (("--preset", "best"), "must be one of original, cat-fixed, trufor-opt, benco-512, got 'best'", 2),
        (("--resamples", "-1"), "at least 0", 2),
        (("--threshold", "2"), "must be a number in [0, 1]", 2),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: tuple[str, ...], words: str, status: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        got = run(folder, *(a.format(folder) for a in arguments))
    except SystemExit as stop:
        got = stop.code
    error = capsys.readouterr().err
    assert got == status and words in error and error.count("\n") == 1


def test_a_checkpoint_by_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "frd_model.cli.evaluate.open_checkpoint", lambda name, *_, **__: Checkpoint(Redness(), "red")
    )
    whole = means_of(folder, "--preset", "cat-fixed", "--threshold", "0.4")
    saved = means_of(folder, "--preset", "cat-fixed", "--threshold", "0.4", "--predictions", folder / "maps")
    assert whole["means"] == saved["means"] and whole["method"] == "red" and whole["threshold"] == 0.4
    assert whole["means"] != means_of(folder, "--preset", "cat-fixed")["means"]


def test_several_sets_in_one_run(
    folder: Path, samples: list[Labelled], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Maps of each set lie in a folder of its name; one row of the table."""
    for name in ("COVER", "mine"):
        (folder / "maps" / name).mkdir()
        for file in (folder / "maps").glob("*.npy"):
            np.save(folder / "maps" / name / file.name, np.load(file) if name == "mine" else np.zeros(SIZE))
    monkeypatch.setattr(
        "frd_model.cli.evaluate.open_sources",
        lambda _: {name: Source(iter(samples), len(samples), name) for name in ("COVER", "mine")},
    )
    outputs = ("--json-out", folder / "o.json", "--csv", folder / "o.csv", "--table", folder / "o.md")
    assert run(folder, "--predictions", folder / "maps", *outputs) == 0
    cover, mine = json.loads((folder / "o.json").read_text())["sets"]
    assert cover["means"]["f1"]["mean"] == 0 < mine["means"]["f1"]["mean"] and cover["set"] == "COVER"
    with (folder / "o.csv").open(newline="") as file:
        assert [row["set"] for row in csv.DictReader(file)] == ["COVER"] * 4 + ["mine"] * 4
    first, second = (f"{result['means']['permute_f1']['mean']:.3f}" for result in (cover, mine))
    assert first != second
    assert f"| maps | - | {first} | - | - | - | {second} | - |" in (folder / "o.md").read_text()
    assert "\nmine: mine\n" in capsys.readouterr().out
    assert main(["table1", str(folder / "o.json"), "--out", str(folder / "t.md")]) == 0
    assert (folder / "t.md").read_text() == (folder / "o.md").read_text()


def test_table_1_puts_results_beside_the_quoted_rows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps, files = folder / "maps", []
    for preset in ("cat-fixed", "trufor-opt"):
        files.append(folder / f"{preset}.json")
        assert (
            run(folder, "--predictions", maps, "--method", "Red", "--preset", preset, "--json-out", files[-1])
            == 0
        )
    fixed, best = (json.loads(file.read_text())["means"] for file in files)
    capsys.readouterr()
    names = ("Columbia", "cover", "casia1", "nist16", "coco_glide")
    assert main(["table1", *(f"{name}={file}" for name in names for file in files)]) == 0
    text = capsys.readouterr().out
    optimal_half, fixed_half = text.split("## Fixed threshold")
    value = f"{best['permute_f1_opt_band']['mean']:.3f}"
    assert f"| Red | {' | '.join([value] * 6)} |" in optimal_half
    value = f"{fixed['permute_f1']['mean']:.3f}"
    assert f"| Red | {' | '.join([value] * 6)} |" in fixed_half
    assert "| FRD-Net (quoted) | 0.994 | 0.717 | 0.903 | 0.536 | 0.762 | 0.782 |" in optimal_half
    assert "| FRD-Net (quoted) | 0.973 | 0.601 | 0.829 | 0.412 | 0.626 | 0.688 |" in fixed_half
    assert text.count("(quoted) |") == 22 and "skipped 1 x untouched photo" in text

    # a set of one's own is a column of its own, and is in no average
    assert main(["table1", str(files[0]), "--out", str(folder / "t.md")]) == 0
    assert f"| Red | - | - | - | - | - | {value} | - |" in (folder / "t.md").read_text()
    out = folder / "direct.md"
    assert run(folder, "--predictions", maps, "--method", "Red", "--preset", "cat-fixed", "--table", out) == 0
    assert out.read_text() == (folder / "t.md").read_text()


def test_table_1_refuses_what_is_no_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "good.json"
    assert run(folder, "--predictions", folder / "maps", "--json-out", file) == 0
    write_json(folder / "other.json", {"means": 1})
    write_json(folder / "null.json", {"sets": None})
    write_json(folder / "cover.json", json.loads(file.read_text()) | {"set": "cover"})
    (folder / "text.json").write_text("{")
    capsys.readouterr()
    for results, words in (
        ((file, file), "must have one mean for set at the optimal threshold, got a second one"),
        ((folder / "other.json",), "must be a JSON file of `frd evaluate`, got another kind of file"),
        (
            (folder / "null.json",),
            "null.json': result must be a JSON file of `frd evaluate`, got another kind",
        ),
        ((folder / "text.json",), "text.json': result must be a JSON file of `frd evaluate`, got no JSON"),
        (
            (f"columbia={folder / 'cover.json'}",),
            "of COVER must not be named after another set, got 'columbia'",
        ),
        ((file, "--overwrite", "--out", file), "--out must be another file than the results"),
        ((folder / "gone.json",), "No such file"),
        ((f"COVER={folder / 'gone.json'}",), "gone.json"),
    ):
        assert main(["table1", *map(str, results)]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_the_quoted_averages_are_those_of_their_cells() -> None:
    tables = paper_tables()
    for half in ("optimal", "fixed"):
        for method, (*cells, average) in tables["table1"][half].items():
            assert np.mean(cells) == pytest.approx(average, abs=1.1e-3), method
    rows = {name: (np.mean(cells), average) for name, (*cells, average) in tables["table3"]["rows"].items()}
    mean, printed = rows.pop("Segformer-b2")
    # the misprint that the note is about
    assert (round(mean, 4), printed) == (0.6167, 0.6176) and "0.6167" in tables["table3"]["note"]
    assert all(mean == pytest.approx(printed, abs=6e-5) for mean, printed in rows.values())
    assert table1([]).notes == []
