"""`frd ablate`: the nets of the six rows, runs that are done, interrupted and changed, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frd_model.ablate import VARIANTS, net_config, row_config, table3
from frd_model.cli import ablate as command
from frd_model.cli import main
from frd_model.config import PRESETS, FRDNetConfig
from frd_model.data.dataset import ManiDataset
from frd_model.data.images import write_png
from frd_model.evaluate import evaluate
from frd_model.evaluate_table import paper_tables
from frd_model.labelled import labelled_pairs
from frd_model.train import Trainer
from frd_model.train.config import TrainConfig, from_dict
from frd_model.weights import load_model

TINY = (
    *("epochs=2", "batch_size=2", "seed=5", "images_logged=0", "optim.warmup_epochs=0"),
    *("data.crop=32", "data.samples=2", "data.val_samples=2", "data.authentic=0"),
    "model.options={blocks: 1, pyramid_width: 8, trace_widths: [8, 8], stages: [1], grids: [[2, 2], [2, 1]]}",
)


def base(preset: str, **options: Any) -> TrainConfig:
    return from_dict({"model": {"name": "frdnet_mit_b0", "preset": preset, "options": options}})


def net(preset: str, row: str, **options: Any) -> FRDNetConfig:
    return net_config(row_config(base(preset, **options), row, 7, Path("x")))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_rows_differ_in_what_their_names_say(preset: str) -> None:
    full = net(preset, "full")
    assert full == PRESETS[preset].replace(encoder="mit_b0")
    assert net(preset, "icm") == full.replace(dpm=False)
    assert net(preset, "icm-one-round") == full.replace(dpm=False, grids=((2, 1),))
    assert net(preset, "dpm") == full.replace(icm=False)
    assert net(preset, "dpm-central") == full.replace(icm=False, angular=False)
    decoder = {"decoder_kernel": 3, "decoder_skip": False} if full.decoder == "deconv" else {}
    assert net(preset, "baseline") == full.replace(blocks=0, **decoder)


def test_one_round_with_divergent_centres_clusters_once_and_chooses() -> None:
    found = net("paper", "icm-one-round", icm_centres="divergent")
    assert found.grids == ((8, 8), (2, 1)) and found.icm_centres == "divergent"


def test_a_row_changes_the_net_seed_and_output_alone() -> None:
    config = base("lite", blocks=1)
    config.optim.lr = 3e-4
    found = row_config(config, "dpm", 7, Path("there"))
    assert found.model.options == {"blocks": 1, "icm": False} and config.model.options == {"blocks": 1}
    assert (found.seed, found.output) == (7, "there")
    found.seed, found.output, found.model.options = config.seed, config.output, config.model.options
    assert found == config


@pytest.mark.parametrize(
    ("model", "row", "message"),
    [
        ({}, "all", "row must be one of baseline, icm-one-round, icm, dpm-central, dpm, full, got 'all'"),
        ({"name": "segformer_mit_b0"}, "full", "model.name must be frdnet_ENCODER, got 'segformer_mit_b0'"),
        ({"pretrained": "demo"}, "icm", "model.pretrained must be left out, got 'demo'"),
    ],
)
def test_refuses_what_the_rows_cannot_share(model: dict[str, Any], row: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_config(from_dict({"model": model}), row, 0, Path("x"))


def test_the_command_lists_the_rows_that_there_are() -> None:
    assert tuple(VARIANTS) == command.ROWS
    assert [variant.title for variant in VARIANTS.values()] == list(paper_tables()["table3"]["rows"])


def result(row: str, seed: int, sets: dict[str, float]) -> dict[str, Any]:
    return {
        "row": row,
        "seed": seed,
        "model": "segformer_mit_b0, lite",
        "parameters": 1_500_000,
        "macs_at_512": 4_260_000_000,
        "evaluation": {"data": dict.fromkeys(sets, "9 photos")},
        "sets": {
            n: {"images": 9, "failed": [], "means": {"permute_f1": v, "f1": 0.0}} for n, v in sets.items()
        },
    }


def test_the_table_has_the_quoted_rows_and_ours_over_the_seeds() -> None:
    results = [
        result("baseline", 1, {"casia1": 0.5, "cover": 0.2, "own": 0.8}),
        result("baseline", 2, {"casia1": 0.6, "cover": 0.2, "own": 0.7}),
        result("icm", 1, {"casia1": 0.25, "cover": 0.5, "own": 0.75}),
    ]
    lines = table3(results, "cat-fixed").splitlines()
    head = "| Method | CASIAv1 | COVER | COCOglide | own | avg | Parameters | GMAC at 512x512 | seeds |"
    assert head in lines
    assert "| + ICM (quoted) | 0.8030 | 0.5690 | 0.6320 | - | 0.6680 | - | - | - |" in lines
    assert "| + ICM (ours) | 0.2500 | 0.5000 | - | 0.7500 | 0.5000 | 1.50 M | 4.26 | 1 |" in lines
    ours = "0.5500 ± 0.0707 | 0.2000 ± 0.0000 | - | 0.7500 ± 0.0707 | 0.5000 ± 0.0000"
    assert f"| segformer_mit_b0, lite (ours) | {ours} | 1.50 M | 4.26 | 1, 2 |" in lines
    quoted = [line for line in lines if "(quoted)" in line]
    # Six rows and the remark.
    assert len(quoted) == 7
    assert "The average of Segformer-b2 is 0.6167 by its own cells, printed 0.6176." in quoted[-1]
    assert quoted[-1].count("by its own cells") == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(2):
        write_png(tmp_path / "Tp" / f"{i}.png", rng.integers(0, 256, (32, 32, 3), np.uint8))
        write_png(tmp_path / "Gt" / f"{i}.png", np.arange(1024).reshape(32, 32) < 300)
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    rows = [] if "--rows" in arguments else ["--rows", "baseline", "icm"]
    settings = [part for setting in TINY for part in ("--set", setting)]
    out = ["--out", str(folder / "out"), "--eval-preset", "original"]
    return main(["ablate", "--mani", str(folder), *out, *rows, *settings, *arguments])


def results(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "out" / "ablation.json").read_text())["runs"]
    return found


def test_rows_are_trained_evaluated_and_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, epochs = Trainer._train_epoch, []

    def stops(trainer: Trainer, *given: Any) -> dict[str, float]:
        epochs.append((Path(trainer.config.output).parent.name, trainer.epoch))
        if len(epochs) == 4 and "icm" in str(trainer.output):
            raise KeyboardInterrupt
        return real(trainer, *given)

    monkeypatch.setattr(Trainer, "_train_epoch", stops)
    assert run(folder) == 130
    assert [r["row"] for r in results(folder)] == ["baseline"]
    # The first row is done, the second goes on with its second epoch.
    assert run(folder) == 0
    assert epochs == [*(("baseline", e) for e in (0, 1)), *(("icm", e) for e in (0, 1, 1))]
    found = results(folder)
    assert [r["row"] for r in found] == ["baseline", "icm"]
    printed = capsys.readouterr().out
    assert printed.endswith((folder / "out" / "ablation.md").read_text())
    for each in found:
        output = folder / "out" / each["row"] / "seed-5"
        best = load_model(output / each["evaluation"]["weights"])
        want = evaluate(labelled_pairs(ManiDataset(folder), "x").samples, best).summary()["forged"]
        means = each["sets"][folder.name]["means"]
        assert means["permute_f1"] == pytest.approx(want["permute_f1"], abs=1e-6)
        assert f"| {means['permute_f1']:.4f} |" in printed
        assert each["parameters"] == sum(p.numel() for p in best.parameters())
        assert best.config.dpm is (each["row"] == "baseline") and len(best.blocks) == (each["row"] == "icm")

    # An uninterrupted run gives the same.
    epochs[:] = [("", 0)] * 9
    assert run(folder, "--out", str(folder / "again")) == 0
    again = json.loads((folder / "again" / "ablation.json").read_text())["runs"]
    assert [r["sets"] for r in again] == [r["sets"] for r in found]

    # All is done: nothing is trained again, and another protocol only evaluates.
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert run(folder, "--seeds", "5", "5") == 0 and results(folder) == found
    assert run(folder, "--eval-preset", "cat-fixed") == 0
    assert results(folder)[0]["evaluation"]["preset"]["name"] == "cat-fixed"
    capsys.readouterr()
    assert run(folder, "--set", "optim.lr=1e-3") == 1
    assert "cannot resume: optim.lr was 5e-05 in the saved run, now 0.001" in capsys.readouterr().err


def test_refuses_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.yaml").write_text("epoch: 3\n")
    (folder / "file").write_text("")
    for arguments, message in (
        (("--config", str(folder / "bad.yaml")), "unknown key epoch"),
        (("--out", str(folder / "file")), "--out must be a directory that can be written"),
        (("--set", "model.pretrained=demo"), "model.pretrained must be left out"),
        (
            ("--set", "model.options.encoder_weights=x.pth"),
            "which is set by model.encoder_weights, got 'x.pth'",
        ),
        (("--set", "model.options.depth=9"), "unknown field 'depth'"),
        (
            ("--train-data", f"mani:{folder}"),
            f"test set '{folder.name}' and the training set must not share photos",
        ),
        (("--val-data", f"mani:{folder}"), f"test set '{folder.name}' and the validation set must not share"),
        (("--train-data", "casia1:nowhere"), "nowhere"),
    ):
        assert run(folder, *arguments) == 1
        captured = capsys.readouterr().err
        assert message in captured and captured.count("\n") == 1
    # All before the first row is trained.
    assert not (folder / "out" / "baseline").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(folder) == 1
    assert "frd ablate must run in one process" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    for row, text in (("icm", "{"), ("icm", "[]")):
        file = folder / "out" / row / "seed-5" / "result.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        assert run(folder, "--rows", row) == 1
        assert "must be a result of `frd ablate`" in capsys.readouterr().err
