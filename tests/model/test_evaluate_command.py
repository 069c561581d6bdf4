"""`frd evaluate` on sets with bad pairs, its outputs, and its sources."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from frd_model.cli import main
from frd_model.cli.arguments import Checkpoint
from frd_model.data.images import write_json, write_png
from frd_model.evaluate import Report, evaluate
from frd_model.evaluate_output import format_summary
from frd_model.labelled import Labelled
from frd_model.metrics import image_metrics

WIDTH_OF_NAN = 77


class Net(nn.Module):
    """The logit of a pixel is its red plane, NaN for one width."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] * (float("nan") if x.shape[3] == WIDTH_OF_NAN else 1.0)


@pytest.fixture(autouse=True)
def net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "frd_model.cli.evaluate.open_checkpoint", lambda name, *_, **__: Checkpoint(Net().eval(), str(name))
    )


def pair(folder: Path, name: str, width: int = 60, *, invert: bool = False) -> None:
    """A black photo whose left half is red and edited."""
    image, mask = np.zeros((40, width, 3), np.uint8), np.zeros((40, width), bool)
    image[:, : width // 2, 0] = 255
    mask[:, : width // 2] = True
    write_png(folder / "Tp" / name, image)
    write_png(folder / "Gt" / name, ~mask if invert else mask)


def run(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def folders(root: Path) -> tuple[object, ...]:
    return "--images", root / "Tp", "--masks", root / "Gt"


def test_bad_pairs_do_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("good.png", "other_size.png", "labels.png", os.fsdecode(b"z\xff.png")):
        pair(tmp_path, name)
    pair(tmp_path, "nan.png", WIDTH_OF_NAN)
    write_png(tmp_path / "Gt" / "other_size.png", np.eye(40, 50) > 0)
    write_png(tmp_path / "Gt" / "labels.png", np.ones((40, 60), np.uint8))
    (tmp_path / "Tp" / "cut.png").write_bytes((tmp_path / "Tp" / "good.png").read_bytes()[:60])
    write_png(tmp_path / "Gt" / "cut.png", np.eye(40, 60) > 0)
    outputs = tmp_path / "new" / "rows.csv", tmp_path / "new" / "means.json"

    assert run(*folders(tmp_path), "--csv", outputs[0], "--json-out", outputs[1]) == 1

    error = capsys.readouterr().err
    bad = {"cut.png", "labels.png", "nan.png", "other_size.png"}
    assert all(sum(name in line for line in error.splitlines()) == 1 for name in bad)
    assert "4 of 6 images could not be scored" in error
    with outputs[0].open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {name for name, row in rows.items() if row["error"]} == bad
    assert float(rows["good.png"]["f1"]) == 1 and float(rows[os.fsdecode(b"z\xff.png")]["f1"]) == 1
    means = json.loads(outputs[1].read_text())
    assert means["forged"]["images"] == 2 and means["forged"]["f1"] == 1
    assert {failed["name"] for failed in means["failed"]} == bad
    assert "logits must be finite" in next(f["error"] for f in means["failed"] if f["name"] == "nan.png")


def test_missing_files_of_a_list_do_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        pair(tmp_path, name)
    bad = ["gone.png", "\ud800.png", "x" * 300 + ".png", "n\0l.png", "b.png"]
    entries = [["Tp/a.png", "Gt/a.png"], *([f"Tp/{name}", f"Gt/{name}"] for name in bad[:-1])]
    (tmp_path / "list.json").write_text(json.dumps([*entries, ["Tp/b.png", "Gt/B.png"]]))

    assert run("--json", tmp_path / "list.json", "--csv", tmp_path / "rows.csv") == 1

    error = capsys.readouterr().err
    assert "5 of 6 images could not be scored" in error and "gone.png" in error
    assert "entry 5 must name files" in error and "'b.png', differs in letter case" in error
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a.png", "gone.png", "\ufffd.png", *bad[2:]]
    assert float(rows[0]["f1"]) == 1 and all(row["error"] for row in rows[1:])


def test_all_bad_pairs_still_write(tmp_path: Path) -> None:
    pair(tmp_path, "nan.png", WIDTH_OF_NAN)
    assert run(*folders(tmp_path), "--json-out", tmp_path / "m.json") == 1
    means = json.loads((tmp_path / "m.json").read_text())
    assert means["forged"]["images"] == 0 and means["forged"]["f1"] is None and len(means["failed"]) == 1


def test_every_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path / "a", "x.png")
    pair(tmp_path / "b", "x.png", invert=True)
    pair(tmp_path / "c", "sub/x.png")
    pair(tmp_path / "c", "x.png")
    (tmp_path / "c" / "Tp" / "notes.txt").write_text("")
    write_json(tmp_path / "list.json", [["a/Tp/x.png", "a/Gt/x.png"], ["a/Tp/x.png", "Negative"]])
    cases: list[tuple[tuple[object, ...], int]] = [
        (folders(tmp_path / "a"), 1),
        (("--mani", tmp_path / "a"), 1),
        (("--mani", tmp_path / "b", "--invert-masks"), 1),
        ((*folders(tmp_path / "b"), "--invert-masks"), 1),
        ((*folders(tmp_path / "c"), "--recursive"), 2),
        (("--mani", tmp_path / "c", "--recursive"), 2),
        (("--json", tmp_path / "list.json"), 1),
    ]
    for source, forged in cases:
        assert run(*source, "--json-out", tmp_path / "m.json", "--overwrite") == 0
        means = json.loads((tmp_path / "m.json").read_text())
        assert means["forged"]["images"] == forged and means["forged"]["f1"] == 1, source
    assert "notes.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sample", "val", "--seed", "-1"), "--seed must be at least 0, got -1"),
        (("--sample", "val", "--invert-masks"), "--invert-masks needs masks in files"),
        (("--json", "l.json", "--masks", "m"), "--masks needs --images"),
        (("--sample", "val", "--recursive"), "--recursive goes with folders, got --sample"),
        (("--mani", "missing"), "missing"),
    ],
)
def test_sources_that_do_not_fit(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == (1 if "missing" in arguments else 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--csv", "--json-out"])
def test_outputs_are_checked_before_the_work(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair(tmp_path, "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(
            "frd_model.cli.evaluate.open_checkpoint", lambda *_, **__: pytest.fail("work was begun")
        )
        (tmp_path / "there").write_text("kept")
        for file in (tmp_path, tmp_path / "there" / "x", "/proc/x", tmp_path / "there", "/dev/null"):
            assert run(*folders(tmp_path), flag, file) == 1
            error = capsys.readouterr().err
            assert flag in error and error.count("\n") == 1
        assert run(*folders(tmp_path), "--csv", tmp_path / "x", "--json-out", f"{tmp_path}/./x") == 2
    assert (tmp_path / "there").read_text() == "kept"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(*folders(tmp_path), f"{flag}=~/there", "--overwrite") == 0
    assert "kept" not in (tmp_path / "there").read_text()


def test_false_alarms_follow_the_threshold() -> None:
    report = Report(
        0.3, [{"name": "a", "kind": "", "edited": 0.0, "score": 0.4, "alarm": 0.1, "seconds": 0.0}]
    )
    assert report.summary()["authentic"]["photo_false_alarm"] == 1
    assert "a score above 0.3: 100.0 %" in format_summary(report.summary())
    assert "nan" not in format_summary(report.summary())
    assert "no forged photo was scored" in format_summary(report.summary())
    assert Report(0.5, report.rows).summary()["authentic"]["photo_false_alarm"] == 0


def test_the_white_mask_has_the_figures_of_a_map_of_ones() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for mask in (rng.random((40, 60)) < 0.3, np.ones((40, 60), bool)):
        (row,) = evaluate([Labelled("a", "", image, mask)], Net()).rows
        want: dict[str, Any] = image_metrics(np.ones((40, 60), np.float32), mask)
        for name, value in want.items():
            np.testing.assert_equal(row[f"white_{name}"], value)


def test_arguments_are_checked_before_the_samples() -> None:
    with pytest.raises(ValueError, match="size must be one of"):
        evaluate(iter([]), Net(), size="huge")
