"""The shift test: crops and pairs, nets with a known answer, and `frd evaluate --shift-test`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from frd_model.centre_control import centre_map
from frd_model.cli import main
from frd_model.cli.arguments import Checkpoint
from frd_model.data.images import write_json, write_png
from frd_model.labelled import Labelled
from frd_model.metrics import auc
from frd_model.shift_test import (
    EDGES,
    STEP,
    STRIP,
    ShiftTest,
    Window,
    border_strips,
    box_of,
    crop_pair,
    format_shift_test,
    look_with,
)

SIDE = 128


class Redness(nn.Module):
    """Pixels only: the logit is the normalised red plane."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


class Place(nn.Module):
    """Position only: how near the crop's centre."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(centre_map(*x.shape[2:])).expand(len(x), 1, -1, -1)


class Bottom(nn.Module):
    """Position only: how near the crop's bottom."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.linspace(-4, 4, x.shape[2])
        return rows[:, None].expand(len(x), 1, -1, x.shape[3])


def noise(name: str, box: Window | None, size: tuple[int, int] = (400, 500), seed: int = 0) -> Labelled:
    rng = np.random.default_rng(seed)
    image, mask = rng.integers(0, 256, (*size, 3), np.uint8), np.zeros(size, bool)
    if box is not None:
        box.of(mask)[...] = True
        # redder in the mean, so that its AUC is neither 0.5 nor 1
        box.of(image)[..., 0] |= 96
    return Labelled(name, "splicing" if box else "authentic", image, mask)


EDIT = noise("edit", Window(150, 200, 190, 260))
QUIET = noise("quiet", None)


def run(net: nn.Module, *samples: Labelled) -> ShiftTest:
    test = ShiftTest(look_with(net.eval()), SIDE)
    assert list(test.watch(samples)) == list(samples)
    assert not test.failed
    return test


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(
    "box", [Window(150, 200, 190, 260), Window(129, 131, 193, 195), Window(200, 250, 201, 251)]
)
def test_pairs(edge: str, box: Window) -> None:
    pair = crop_pair(box, (400, 500), SIDE, edge)
    assert pair is not None
    for crop in pair:
        assert crop.top >= 0 and crop.left >= 0 and crop.bottom <= 400 and crop.right <= 500
        assert crop.bottom - crop.top == crop.right - crop.left == SIDE
    axis = EDGES.index(edge) // 2
    assert getattr(pair.border, edge) == getattr(box, edge)
    shift = pair.middle[axis] - pair.border[axis]
    assert shift and shift % STEP == 0 and pair.middle[1 - axis] == pair.border[1 - axis]
    assert (shift < 0) == (edge in ("top", "left"))
    inside = box.within(pair.middle)
    margins = (inside.top, inside.left, SIDE - inside.bottom, SIDE - inside.right)
    assert min(margins) >= SIDE // 4 - STEP // 2 and max(margins) <= SIDE // 2 + STEP // 2


def test_pairs_lie_within_the_photo() -> None:
    size = (200, 300)
    near_top = Window(5, 120, 45, 160)
    assert crop_pair(near_top, size, SIDE, "top") is None
    assert crop_pair(near_top, size, SIDE, "left") is None
    assert crop_pair(Window(60, 120, 100, 160), size, SIDE, "top") is not None
    # the crop that would start at the box ends below the photo
    assert crop_pair(Window(90, 120, 130, 160), size, SIDE, "top") is None
    assert crop_pair(Window(90, 120, 130, 160), size, SIDE, "bottom") is not None


@pytest.mark.parametrize("size", [(400, 500), (176, 500), (160, 500), (201, 161), (128, 128), (2000, 129)])
def test_strips(size: tuple[int, int]) -> None:
    for edge, strip in border_strips(size, SIDE).items():
        pair = crop_pair(strip, size, SIDE, edge)
        length = size[0] if edge in ("top", "bottom") else size[1]
        # a crop can be moved as far as the photo is larger
        assert (pair is not None) == (length - SIDE >= STEP)
        if pair is not None:
            assert getattr(pair.border, edge) == getattr(strip, edge)
            assert sorted((strip.bottom - strip.top, strip.right - strip.left)) == [STRIP, SIDE // 2]


def test_a_net_that_looks_at_pixels_only() -> None:
    test = run(Redness(), EDIT, noise("other", Window(100, 180, 160, 200), seed=1), QUIET)
    assert [r["pairs"] for r in test.forged] == [4, 4] and [r["pairs"] for r in test.untouched] == [4]
    assert all(r["middle"] == r["border"] for r in test.forged + test.untouched)
    found = test.summary(resamples=100)
    for figures in (found["forged"]["auc"], found["untouched"]["probability"]):
        assert figures["difference"] == {"mean": 0, "low": 0, "high": 0}
    assert 0.55 < found["forged"]["auc"]["middle"]["mean"] < 0.95
    assert found["untouched"]["lower_at_border"] == 0


def test_a_net_that_looks_at_the_place_only() -> None:
    test = run(Place(), EDIT, QUIET)
    row, strip = test.forged[0], test.untouched[0]
    control, aucs, crop_aucs = centre_map(SIDE, SIDE), [], []
    for edge in EDGES:
        pair = crop_pair(box_of(EDIT.mask), (400, 500), SIDE, edge)
        assert pair is not None
        shared = pair.middle.shared(pair.border)
        aucs.append([auc(shared.within(c).of(control), shared.of(EDIT.mask)) for c in pair])
        crop_aucs.append([auc(control, c.of(EDIT.mask)) for c in pair])
    assert [row["middle"], row["border"]] == pytest.approx(np.mean(aucs, axis=0))
    assert [row["crop_middle"], row["crop_border"]] == pytest.approx(np.mean(crop_aucs, axis=0))
    assert (
        row["middle"] > 0.9 and row["border"] < 0.6 and row["crop_middle"] > 0.95 > row["crop_border"] + 0.3
    )
    assert strip["middle"] > strip["border"] + 0.05
    summary = test.summary(resamples=100)
    assert summary["forged"]["auc"]["difference"]["mean"] == pytest.approx(row["middle"] - row["border"])
    assert summary["untouched"]["lower_at_border"] == 1
    lines = format_shift_test(summary).splitlines()
    assert f"{row['middle']:.4f} in the middle, {row['border']:.4f} beside a border" in lines[1]
    assert f"difference {row['middle'] - row['border']:+.4f}" in lines[1]


def test_every_edge_counts() -> None:
    """The bottom is above the middle's mean as much as the top is below it."""
    sigmoid = 1 / (1 + np.exp(-np.linspace(-4, 4, SIDE)))
    row = run(Bottom(), QUIET).untouched[0]
    middle = SIDE // 2 - STRIP // 2
    border = (sigmoid[:STRIP].mean() + sigmoid[-STRIP:].mean()) / 4 + sigmoid[
        middle : middle + STRIP
    ].mean() / 2
    assert row["border"] == pytest.approx(border, abs=2e-3)


def test_what_is_skipped() -> None:
    samples = [
        noise("small", Window(40, 40, 60, 60), (127, 500)),
        noise("quiet and small", None, (500, 127)),
        noise("no room", None, (150, 159)),
        noise("frame", Window(0, 0, 30, 30)),
        noise("wide", Window(50, 50, 60, 300)),
        noise("wider", Window(10, 10, 300, 300), (600, 600)),
    ]
    test = run(Redness(), EDIT, *samples)
    assert [r["name"] for r in test.forged] == ["edit"] and not test.untouched
    assert test.skipped == {
        "photo smaller than a crop": 2,
        "no room to move a crop": 1,
        "edit too near the frame": 1,
        "edit larger than half the photo": 1,
        "edit larger than 256 pixels": 1,
    }
    assert "  skipped: 2 x photo smaller than a crop" in format_shift_test(test.summary()).splitlines()


def test_larger_edits_get_larger_crops() -> None:
    row = run(Redness(), noise("large", Window(150, 170, 220, 270))).forged[0]
    assert row["side"] == 224 and row["middle"] == row["border"]


def test_no_images() -> None:
    summary = ShiftTest(look_with(Redness()), SIDE).summary()
    assert summary["forged"]["images"] == 0 and np.isnan(summary["forged"]["auc"]["difference"]["mean"])
    assert format_shift_test(summary).splitlines()[1:] == ["  no image could be tested"]
    alone = format_shift_test(run(Redness(), EDIT).summary())
    assert (
        "AUC of 1 edits" in alone
        and "untouched" not in alone
        and "nan" not in alone.replace("+nan to +nan", "")
    )


def test_an_error_of_the_net_does_not_stop_the_others() -> None:
    class Fails(Redness):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (float("nan") if float(x[0, 2].max()) < -1 else 1)

    black = Labelled("black", "splicing", np.zeros_like(EDIT.image), EDIT.mask)
    test = ShiftTest(look_with(Fails().eval()), SIDE)
    list(test.watch([black, EDIT]))
    assert [r["name"] for r in test.forged] == ["edit"]
    assert test.failed[0]["name"] == "black" and "must be finite" in test.failed[0]["error"]
    assert "skipped: 1 x could not be predicted" in format_shift_test(test.summary())


@pytest.mark.parametrize("side", [64, 130, 0])
def test_sides(side: int) -> None:
    with pytest.raises(ValueError, match=f"side must be a multiple of 32 from 128, got {side}"):
        ShiftTest(look_with(Redness()), side)


@pytest.fixture(params=[Redness, Place])
def net(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    kind: type[nn.Module] = request.param
    monkeypatch.setattr(
        "frd_model.cli.evaluate.open_checkpoint", lambda name, *_, **__: Checkpoint(kind().eval(), str(name))
    )
    return kind


@pytest.mark.parametrize("source", ["folders", "data", "sample"])
def test_command(
    source: str, net: type[nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    for made in (EDIT, QUIET, noise("frame", Window(0, 0, 30, 30))):
        write_png(images / f"{made.name}.png", made.image)
        write_png(masks / f"{made.name}.png", made.mask)
    names = sorted(p.name for p in images.iterdir())
    write_json(tmp_path / "list.json", [[f"images/{n}", f"masks/{n}"] for n in names])
    arguments = {
        "folders": ["--images", str(images), "--masks", str(masks)],
        "data": ["--data", f"json:{tmp_path}/list.json"],
        "sample": ["--sample", "val", "--repeats", "1"],
    }[source]
    argv = ["evaluate", *arguments, "--shift-test", "128", "--json-out", f"{tmp_path}/m.json"]
    assert main(argv) == 0
    assert "shift test: crops of 128 x 128 pixels" in capsys.readouterr().out
    means: dict[str, Any] = json.loads((tmp_path / "m.json").read_text())
    found = means["shift_test"]
    assert found["side"] == 128 and not found["failed"]
    used = found["forged"]["images"] + found["untouched"]["images"]
    assert used + sum(found["skipped"].values()) == means["forged"]["images"] + means["authentic"]["images"]
    assert found["forged"]["images"] > 0 and found["untouched"]["images"] > 0
    difference = (
        found["forged"]["auc"]["difference"]["mean"],
        found["untouched"]["probability"]["difference"]["mean"],
    )
    assert difference == (0, 0) if net is Redness else min(difference) > 0.05


def test_the_default_side(net: type[nn.Module], tmp_path: Path) -> None:
    argv = ["evaluate", "--sample", "val", "--repeats", "1", "--json-out", f"{tmp_path}/m.json"]
    assert main([*argv, "--shift-test"]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["shift_test"]["side"] == 256
    assert main([*argv, "--overwrite"]) == 0
    assert "shift_test" not in json.loads((tmp_path / "m.json").read_text())


@pytest.mark.parametrize("side", ["100", "64", "-256", "x", "256.0"])
def test_a_side_that_does_not_fit(side: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--sample", "val", f"--shift-test={side}"])
    assert f"must be a multiple of 32 from 128, got {side!r}" in capsys.readouterr().err


def test_saved_maps_have_no_crops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--sample", "val", "--shift-test", "--predictions", str(tmp_path)]) == 2
    assert "takes maps as they are and no --shift-test" in capsys.readouterr().err
