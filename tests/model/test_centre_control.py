"""The centre control: a map that looks at no pixel, beside the net, saved maps and the all-white mask."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from frd_model.centre_control import centre_map
from frd_model.cli import main
from frd_model.cli.arguments import Checkpoint
from frd_model.data.forged_folder import forge_folder
from frd_model.data.images import write_png
from frd_model.evaluate import evaluate
from frd_model.evaluate_output import format_summary
from frd_model.labelled import Labelled
from frd_model.metrics import THRESHOLDS, auc, f1, iou, permute_f1


class Redness(nn.Module):
    """The logit of a pixel is its normalised red plane."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


def square(name: str, kind: str, top: int, left: int, red: bool = True) -> Labelled:
    image, mask = np.zeros((41, 61, 3), np.uint8), np.zeros((41, 61), bool)
    mask[top : top + 9, left : left + 9] = True
    image[..., 0] = 255 * (mask == red)
    return Labelled(name, kind, image, mask)


MIDDLE = square("middle", "splicing", 16, 26)
OFF = square("off", "splicing", 5, 30)
CORNER = square("corner", "removal", 0, 0)


def test_the_map() -> None:
    control = centre_map(3, 5)
    assert control.dtype == np.float32 and control.shape == (3, 5)
    assert control[1, 2] == 1 and (control[::2, ::4] == 0).all()
    assert control[0, 2] == pytest.approx(1 - 1 / 5**0.5) and control[1, 0] == pytest.approx(1 - 2 / 5**0.5)
    assert np.array_equal(control, control[::-1, ::-1]) and centre_map(1, 1) == 1
    assert len(np.unique(centre_map(2, 2))) == 1


def test_figures_of_the_control() -> None:
    samples = [MIDDLE, OFF, CORNER]
    untouched = Labelled("quiet", "authentic", MIDDLE.image, np.zeros((41, 61), bool))
    report = evaluate([*samples, untouched], Redness())
    control = centre_map(41, 61)
    assert [r["centre_auc"] for r in report.rows[:3]] == [auc(control, s.mask) for s in samples]
    assert "centre_auc" not in report.rows[3]
    assert report.rows[0]["centre_auc"] > 0.999 and report.rows[2]["centre_auc"] < 0.1

    found = report.summary(resamples=200)["centre_control"]
    assert found["images"] == 3 and found["auc"] == pytest.approx(
        np.mean([auc(control, s.mask) for s in samples])
    )
    for name, metric in (("f1", f1), ("permute_f1", permute_f1), ("iou", iou)):
        means = [np.mean([metric(control, s.mask, t) for s in samples]) for t in THRESHOLDS]
        assert found[name] == pytest.approx(max(means))
        assert found["thresholds"][name] == THRESHOLDS[int(np.argmax(means))]
        alone = metric(control, CORNER.mask, found["thresholds"][name])
        assert found["by_kind"]["removal"][name] == pytest.approx(alone)
    assert set(found["by_kind"]) == {"splicing", "removal"} and found["by_kind"]["splicing"]["images"] == 2


def test_how_far_the_net_is_above() -> None:
    inverted = square("inverted", "removal", 16, 26, red=False)
    report = evaluate([MIDDLE, inverted], Redness())
    assert [r["auc"] for r in report.rows] == [1, 0]
    found = report.summary(resamples=200)["centre_control"]
    centre = auc(centre_map(41, 61), MIDDLE.mask)
    above = found["above"]
    assert above["mean"] == pytest.approx(0.5 - centre) and above["images"] == 2
    assert above["low"] == pytest.approx(-centre) and above["high"] == pytest.approx(1 - centre)
    assert found["by_kind"]["removal"]["above"]["mean"] == pytest.approx(-centre)
    text = format_summary(report.summary())
    assert f"AUC above the centre control: {0.5 - centre:+.4f}" in text
    assert f"AUC above the centre control of removal: {-centre:+.4f}" in text
    row = next(line for line in text.splitlines() if line.startswith("centre control"))
    assert row.split()[2] == "2" and row.split()[5] == f"{centre:.4f}"


def test_undefined_figures_are_left_out() -> None:
    everything = Labelled("all", "", MIDDLE.image, np.ones((41, 61), bool))
    summary = evaluate([everything, MIDDLE], Redness()).summary(resamples=50)["centre_control"]
    assert summary["images"] == 2 and summary["above"]["images"] == 1 and not np.isnan(summary["auc"])
    none = evaluate([], Redness()).summary()["centre_control"]
    assert (
        none["images"] == 0 and np.isnan(none["auc"]) and none["by_kind"] == {} and none["thresholds"] == {}
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forgeries of noise, named by their kinds, and maps that are their masks."""
    monkeypatch.setattr(
        "frd_model.cli.evaluate.open_checkpoint",
        lambda name, *_, **__: Checkpoint(Redness().eval(), str(name)),
    )
    rng = np.random.default_rng(0)
    photos = {name: rng.integers(0, 256, (96, 128, 3), np.uint8) for name in ("a", "b")}
    forge_folder(photos, tmp_path / "set", 6, authentic=0.3)
    for mask in (tmp_path / "set" / "masks").iterdir():
        (tmp_path / "maps").mkdir(exist_ok=True)
        (tmp_path / "maps" / mask.name).write_bytes(mask.read_bytes())
    return tmp_path


@pytest.mark.parametrize("source", ["folders", "data", "sample", "maps", "benco"])
def test_command(source: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = ["--images", f"{folder}/set/images", "--masks", f"{folder}/set/masks"]
    listed = folder / "list.json"
    names = sorted(p.name for p in (folder / "set" / "images").iterdir())
    listed.write_text(json.dumps([[f"set/images/{n}", f"set/masks/{n}"] for n in names]))
    arguments = {
        "folders": pairs,
        "data": ["--data", f"json:{listed}"],
        "sample": ["--sample", "val", "--repeats", "1"],
        "maps": [*pairs, "--predictions", f"{folder}/maps"],
        "benco": [*pairs, "--preset", "benco-512"],
    }[source]
    out = ["--json-out", f"{folder}/m.json", "--csv", f"{folder}/r.csv"]
    assert main(["evaluate", *arguments, *out]) == 0
    printed = capsys.readouterr().out
    assert "all-white mask" in printed and "centre control" in printed
    found: dict[str, Any] = json.loads((folder / "m.json").read_text())
    with (folder / "r.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["auc"]]
    centre = found["centre_control"]
    assert centre["images"] == found["forged"]["images"] == len(rows) > 0
    assert centre["auc"] == pytest.approx(np.mean([float(r["centre_auc"]) for r in rows]))
    assert centre["by_kind"].keys() == found["by_kind"].keys() != set()
    assert "authentic" not in centre["by_kind"]
    if source == "maps":
        assert centre["above"]["mean"] == pytest.approx(1 - centre["auc"])
        assert centre["by_kind"]["removal"]["images"] == sum(r["kind"] == "removal" for r in rows)


def test_a_folder_without_kinds(tmp_path: Path, folder: Path) -> None:
    write_png(tmp_path / "own" / "x.png", MIDDLE.image)
    write_png(tmp_path / "gt" / "x.png", MIDDLE.mask)
    argv = ["evaluate", "--images", f"{tmp_path}/own", "--masks", f"{tmp_path}/gt"]
    assert main([*argv, "--json-out", f"{tmp_path}/m.json"]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["centre_control"]["by_kind"] == {}
