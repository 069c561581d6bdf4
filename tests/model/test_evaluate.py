"""Evaluation: per-image figures, their means, the all-white mask, and `frd evaluate`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from frd_model import create_model, save_model
from frd_model.cli import main
from frd_model.data.images import write_png
from frd_model.evaluate import PIXEL_METRICS, evaluate
from frd_model.evaluate_output import format_summary
from frd_model.labelled import Labelled, forged_samples
from frd_model.metrics import image_metrics


class Redness(nn.Module):
    """The logit of a pixel is its normalised red plane."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]


def sample(name: str, kind: str, marked: slice, red: slice) -> Labelled:
    """A black photo with red columns, of which the columns `marked` were edited."""
    image, mask = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), bool)
    image[:, red, 0] = 255
    mask[:, marked] = True
    return Labelled(name, kind, image, mask)


@pytest.fixture
def samples() -> list[Labelled]:
    return [
        sample("found", "splicing", slice(0, 20), slice(0, 20)),
        sample("half", "removal", slice(0, 20), slice(10, 30)),
        sample("quiet", "authentic", slice(0, 0), slice(0, 0)),
        sample("alarm", "authentic", slice(0, 0), slice(0, 15)),
    ]


def test_figures_and_means(samples: list[Labelled]) -> None:
    report = evaluate(samples, Redness())
    found, half, quiet, alarm = report.rows
    assert found["f1"] == 1 and found["auc"] == 1 and found["iou"] == 1
    assert half["f1"] == pytest.approx(0.5) and half["iou"] == pytest.approx(1 / 3)
    assert found["white_f1"] == pytest.approx(2 * (1 / 3) / (1 + 1 / 3))
    assert "f1" not in quiet and quiet["alarm"] == 0 and alarm["alarm"] == 0.25
    summary = report.summary()
    assert summary["forged"]["images"] == 2 and summary["forged"]["f1"] == pytest.approx(0.75)
    assert summary["by_kind"]["removal"]["f1"] == pytest.approx(0.5)
    assert summary["white_mask"]["auc"] == 0.5
    assert summary["authentic"]["pixel_false_alarm"] == pytest.approx(0.125)
    assert summary["authentic"]["score_auc"] == pytest.approx(0.75)  # one alarm ties with both forgeries
    assert "all-white mask" in format_summary(summary | {"checkpoint": "x"})


def test_forged_samples_are_balanced_and_reproducible() -> None:
    first, again = (forged_samples("val", 1, 3) for _ in range(2))
    made = list(first.samples)
    assert len(made) == first.length == 10
    assert [m.kind for m in made[:5]] == ["splicing", "copy_move", "removal", "retouch", "authentic"]
    assert all(m.mask.any() == (m.kind != "authentic") for m in made)
    for one, other in zip(made, again.samples, strict=True):
        assert np.array_equal(one.image, other.image) and np.array_equal(one.mask, other.mask)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = create_model(
        "frdnet_mit_b0", preset="lite", stages=(1, 2), blocks=1, pyramid_width=8, trace_widths=(8, 8)
    )
    save_model(model, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_command_writes_figures(
    tmp_path: Path, samples: list[Labelled], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for made in samples:
        write_png(tmp_path / "images" / f"{made.name}.png", made.image)
        if made.mask.any():
            write_png(tmp_path / "masks" / f"{made.name}.png", made.mask)
    argv: list[Any] = ["evaluate", "--images", tmp_path / "images", "--masks", tmp_path / "masks"]
    argv += [
        "--checkpoint",
        checkpoint,
        "--csv",
        tmp_path / "rows.csv",
        "--json-out",
        tmp_path / "means.json",
    ]
    assert main([str(a) for a in argv]) == 0
    assert "all-white mask" in capsys.readouterr().out
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["name"] for r in rows} == {"found.png", "half.png", "quiet.png", "alarm.png"}
    means = json.loads((tmp_path / "means.json").read_text())
    assert means["forged"]["images"] == 2 and means["authentic"]["images"] == 2
    aucs = [float(r["auc"]) for r in rows if r["auc"]]
    assert means["forged"]["auc"] == pytest.approx(np.mean(aucs), abs=1e-6)


def test_only_untouched_photos(tmp_path: Path, checkpoint: Path) -> None:
    write_png(tmp_path / "images" / "quiet.png", np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "masks").mkdir()
    out = tmp_path / "means.json"
    argv = ["evaluate", "--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    assert main([*argv, "--checkpoint", str(checkpoint), "--json-out", str(out)]) == 0
    means = json.loads(out.read_text())
    assert means["forged"] == {"images": 0, **dict.fromkeys(PIXEL_METRICS)}
    assert means["authentic"]["images"] == 1 and means["authentic"]["score_auc"] is None


def test_a_constant_map_scores_as_chance() -> None:
    mask = np.zeros((8, 8), bool)
    mask[:2] = True
    assert image_metrics(np.full((8, 8), 0.3, np.float32), mask)["auc"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "photos"], "--images needs --masks"),
        (["--sample", "val", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--json", "nothing.json"], "nothing.json"),
    ],
)
def test_bad_sources_are_one_line(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *arguments, "--checkpoint", str(checkpoint)]) == (
        1 if "--json" in arguments else 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
