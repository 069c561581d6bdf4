"""`frd robustness`: what each distortion does, and runs that are measured, interrupted and continued."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import frd_model.cli.robustness as command
from frd_model import robustness
from frd_model.cli import main
from frd_model.cli.arguments import Checkpoint
from frd_model.data.images import write_png
from frd_model.evaluate import evaluate
from frd_model.labelled import Labelled, Unusable
from frd_model.robustness import CLEAN, GRIDS, Condition, conditions, distort, distorted


class Net(nn.Module):
    """The logit of a pixel is its red plane."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] * self.gain


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two photos whose left half is redder and edited, and an untouched one."""
    monkeypatch.setattr(
        command, "open_checkpoint", lambda name, *_, **__: Checkpoint(Net().eval(), str(name))
    )
    for i, edited in enumerate((True, True, False)):
        photo, mask = np.full((24, 32, 3), 100 + i, np.uint8), np.zeros((24, 32), bool)
        if edited:
            photo[:, :16, 0], mask[:, :16] = 110, True
        write_png(tmp_path / "Tp" / f"{i}.png", photo)
        write_png(tmp_path / "Gt" / f"{i}.png", mask)
    return tmp_path


def run(folder: Path, *arguments: object) -> int:
    given = (
        "--mani",
        folder,
        "--preset",
        "original",
        "--checkpoint",
        "net",
        "--out",
        folder / "out",
        *arguments,
    )
    return main(["robustness", *map(str, given)])


def rows(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    found = json.loads((folder / "out" / "robustness.json").read_text())["rows"]
    return {(row["distortion"], row["level"]): row for row in found}


def grey(value: int = 128, side: int = 200) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


@pytest.mark.parametrize("level", GRIDS["noise-sigma"])
def test_noise_has_the_variance_or_the_standard_deviation_that_its_name_says(level: int) -> None:
    for kind, sigma in (("noise-variance", math.sqrt(level)), ("noise-sigma", float(level))):
        values = distort(grey(), Condition(kind, level), 0, "a").astype(float)
        # Rounding adds 1/12 to the variance.
        assert values.std() == pytest.approx(math.hypot(sigma, math.sqrt(1 / 12)), rel=0.02)
        assert abs(values.mean() - 128) < 4 * sigma / 346
        assert len(np.unique(values[..., 0] - values[..., 1])) > 3, "each channel has noise of its own"


def test_noise_clips_and_does_not_wrap() -> None:
    dark, bright = (distort(grey(v), Condition("noise-sigma", 23), 0, "a") for v in (0, 255))
    assert dark.max() < 150 and bright.min() > 105
    assert (dark == 0).mean() == pytest.approx(0.5, abs=0.03)


def test_noise_depends_on_seed_and_name_alone() -> None:
    condition = Condition("noise-sigma", 11)
    first = distort(grey(), condition, 0, "a")
    assert np.array_equal(first, distort(grey(), condition, 0, "a"))
    for seed, name in ((1, "a"), (0, "b")):
        assert not np.array_equal(first, distort(grey(), condition, seed, name))
    # One draw at every level: pixels move the same way.
    stronger = distort(grey(), Condition("noise-sigma", 23), 0, "a").astype(int)
    moved = first.astype(int) != 128
    assert (np.sign(stronger - 128) == np.sign(first.astype(int) - 128))[moved].all()
    assert np.array_equal(
        distort(grey(), Condition("noise-variance", 9), 0, "a"),
        distort(grey(), Condition("noise-sigma", 3), 0, "a"),
    )


@pytest.mark.parametrize("level", GRIDS["blur"][1:])
def test_blur_is_a_gaussian_whose_sigma_follows_from_the_kernel(level: int) -> None:
    step = grey(0, 64)
    step[:, 32:] = 200
    sigma = 0.3 * ((level - 1) * 0.5 - 1) + 0.8
    offsets = np.arange(level) - level // 2
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    want = np.convolve(np.pad(step[32, :, 0].astype(float), level // 2, mode="reflect"), kernel, "valid")
    found = distort(step, Condition("blur", level), 0, "a")
    assert np.abs(found[32, :, 0] - want).max() <= 1.5
    # A small kernel is a table of OpenCV's: 1/4, 1/2, 1/4.
    assert distort(step, Condition("blur", 3), 0, "a")[5, 30:34, 0].tolist() == [0, 50, 150, 200]


@pytest.mark.parametrize("level", GRIDS["gamma"])
def test_gamma_is_a_power_of_the_value(level: int) -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    want = [round(255 * (v / 255) ** (level / 100)) for v in range(256)]
    assert distort(image, Condition("gamma", level), 0, "a")[..., 1].flatten().tolist() == want


def test_jpeg_has_the_tables_of_its_quality(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = np.repeat(np.repeat(rng.integers(0, 256, (8, 8, 3), np.uint8), 8, 0), 8, 1)
    errors = []
    for level in GRIDS["jpeg"]:
        Image.fromarray(image).save(tmp_path / "a.jpg", quality=level, subsampling="4:2:0")
        other = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int)
        found = distort(image, Condition("jpeg", level), 0, "a").astype(int)
        assert np.abs(found - other).mean() < 1, "Pillow's encoder, with the colours in the same order"
        errors.append(np.abs(found - image).mean())
    assert errors == sorted(errors)


def test_conditions_are_the_figures_and_the_clean_photos_once() -> None:
    found = conditions(["noise-variance", "blur", "jpeg", "gamma"])
    assert found[0] == CLEAN and len(set(found)) == len(found) == 1 + 6 + 6 + 6 + 4
    assert Condition("gamma", 100) not in found
    with pytest.raises(ValueError, match=r"distortion must be one of noise-variance, .*, got 'rain'"):
        conditions(["rain"])


def test_a_photo_that_cannot_be_distorted_is_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = (Labelled(name, "", grey(side=8), np.eye(8) > 0) for name in ("bad", "good"))
    real = robustness.distort

    def fails(image: Any, condition: Condition, seed: int, name: str) -> Any:
        if name == "bad":
            raise MemoryError("no room")
        return real(image, condition, seed, name)

    monkeypatch.setattr(robustness, "distort", fails)
    found = list(distorted([bad, Unusable("gone", "why"), good], Condition("blur", 3), 0))
    assert found[:2] == [Unusable("bad", "out of memory: no room"), Unusable("gone", "why")]
    assert isinstance(found[2], Labelled) and found[2].name == "good"


def test_every_figure_is_what_evaluate_gives_for_the_distorted_photos(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--noise", "both", "--method", "red") == 0
    found = rows(folder)
    assert list(found) == conditions(list(GRIDS))
    mask = np.zeros((24, 32), bool)
    mask[:, :16] = True
    for condition in (
        CLEAN,
        Condition("noise-variance", 23),
        Condition("noise-sigma", 23),
        Condition("jpeg", 50),
    ):
        photos = []
        for i in range(2):
            image = np.full((24, 32, 3), 100 + i, np.uint8)
            image[:, :16, 0] = 110
            photos.append(Labelled(f"{i}.png", "", distort(image, condition, 0, f"{i}.png"), mask))
        want = evaluate(photos, Net().eval()).summary()["means"]
        for metric in ("permute_f1_opt", "auc", "f1"):
            assert found[condition][metric]["mean"] == pytest.approx(want[metric]["mean"]), (
                condition,
                metric,
            )
    assert found[CLEAN]["permute_f1_opt"]["mean"] == 1 and found[CLEAN]["images"] == 2
    assert (
        found["noise-sigma", 23]["permute_f1_opt"]["mean"]
        < found["noise-variance", 23]["permute_f1_opt"]["mean"]
    )
    printed = capsys.readouterr().out
    assert (folder / "out" / "robustness.md").read_text() == printed
    assert "## Gaussian noise: variance (as published)" in printed
    assert "## Gaussian noise: standard deviation" in printed
    assert "| method, set | 130 | 115 | 100 | 85 | 70 |" in printed
    with (folder / "out" / "robustness.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found)
    assert float(lines[0]["permute_f1_opt_mean"]) == 1 and lines[0]["distortion"] == "clean"


def test_the_figure_has_a_panel_for_each_distortion(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run(folder, "--distortions", "gamma", "blur") == 0
    with Image.open(folder / "out" / "robustness.png") as two:
        assert two.width == 2 * 504
    assert run(folder, "--distortions", "jpeg", "--beside", folder / "out" / "robustness.json") == 0
    with Image.open(folder / "out" / "robustness.png") as three:
        assert three.width == 3 * 504


def test_results_beside_are_shown_by_the_same_metric(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, here = folder / "other", ("--distortions", "gamma", "--metric", "iou")
    assert run(folder, "--out", other, "--distortions", "gamma", "--method", "theirs", "--metric", "auc") == 0
    capsys.readouterr()
    assert run(folder, *here, "--beside", other / "robustness.json") == 0
    found = rows(folder)
    means = [found.get(("gamma", level), found[CLEAN])["iou"]["mean"] for level in GRIDS["gamma"]]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| theirs")]
    assert [float(cell) for cell in lines[0].split("|")[2:-1]] == pytest.approx(means, abs=1e-4)
    assert run(folder, "--out", other, "--preset", "cat-fixed", "--distortions", "gamma", "--overwrite") == 0
    for text in (None, "{}", "[]", '{"settings": {}, "rows": []}', '{"settings": [], "rows": 1}'):
        if text is not None:
            (other / "robustness.json").write_text(text)
        capsys.readouterr()
        assert run(folder, *here, "--beside", other / "robustness.json") == 1
        wanted = "must be of preset original, got cat-fixed" if text is None else "got another kind of file"
        error = capsys.readouterr().err
        assert wanted in error and error.count("\n") == 1


def test_without_matplotlib_there_is_all_but_the_plot(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(folder, "--distortions", "gamma") == 0
    assert "no plot: plots need matplotlib: pip install 'frd-kernels[plots]'" in capsys.readouterr().err
    made = {path.suffix for path in (folder / "out").iterdir()}
    assert made == {".json", ".md", ".csv"}


def test_an_interrupted_run_goes_on_where_it_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int]] = []
    real = command._watch

    def stops(name: str, condition: Condition, source: Any) -> Iterator[Any]:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(condition)
        return iter(real(name, condition, source))

    monkeypatch.setattr(command, "_watch", stops)
    assert run(folder, "--distortions", "noise") == 130
    assert list(rows(folder)) == seen == conditions(["noise-variance"])[:4]
    first, seen[:] = rows(folder), []
    monkeypatch.setattr(command, "_watch", lambda *given: seen.append(given[1]) or real(*given))
    assert run(folder, "--distortions", "noise") == 0
    assert "4 of 7 evaluations are done already" in capsys.readouterr().err
    assert seen == conditions(["noise-variance"])[4:]
    continued = rows(folder)
    assert {key: continued[key] for key in first} == first
    assert run(folder, "--distortions", "noise", "--overwrite") == 0
    assert rows(folder) == continued, "as an uninterrupted run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--noise-seed", "1"), "must be of the same noise_seed"),
        (("--preset", "benco-512"), "must be of the same preset"),
        (("--invert-masks", "--metric", "mass"), "--metric must be one of f1, permute_f1, "),
        (("--beside", "nothing.json"), "must be a robustness.json of `frd robustness`, got No such file"),
    ],
)
def test_refuses_in_one_line(
    folder: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--distortions", "gamma") == 0
    before = rows(folder)
    capsys.readouterr()
    assert run(folder, "--distortions", "gamma", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert rows(folder) == before


def test_other_weights_are_another_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(folder, "--distortions", "gamma") == 0
    other = Net().eval()
    other.gain.data.fill_(2)
    monkeypatch.setattr(command, "open_checkpoint", lambda *_, **__: Checkpoint(other, "net"))
    assert run(folder, "--distortions", "gamma") == 1


def test_a_photo_that_was_replaced_is_another_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--distortions", "gamma") == 0 == run(folder, "--distortions", "gamma")
    photo = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    write_png(folder / "Tp" / "1.png", photo)
    capsys.readouterr()
    assert run(folder, "--distortions", "gamma", "jpeg") == 1
    assert "must be of the same files to go on with it" in capsys.readouterr().err


def test_sets_of_one_name_and_size_are_another_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("one", "other"):
        for part in ("Tp", "Gt"):
            for i in range(2):
                content = (folder / part / f"{i}.png").read_bytes()
                target = folder / place / part / f"{i}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
    arguments = ["--preset", "original", "--out", str(folder / "out"), "--distortions", "gamma"]

    def of(first: str) -> int:
        sets = ["--data", f"a=mani:{folder / first}", "--data", f"b=mani:{folder / 'other'}"]
        return main(["robustness", *sets, *arguments])

    assert of("one") == 0
    assert len(json.loads((folder / "out" / "robustness.json").read_text())["rows"]) == 2 * 5
    assert of("other") == 1
    assert "must be of the same data" in capsys.readouterr().err


def test_a_bad_photo_is_named_once_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "Tp" / "0.png").write_bytes(b"no image")
    assert run(folder, "--distortions", "gamma") == 1
    assert capsys.readouterr().err.count("0.png") == 1
    assert all((row["failed"], row["images"]) == (1, 1) for row in rows(folder).values())
    (folder / "Tp" / "1.png").write_bytes(b"no image")
    assert run(folder, "--distortions", "gamma", "--overwrite") == 1
    assert "must hold a forged photo that can be scored, got none" in capsys.readouterr().err
