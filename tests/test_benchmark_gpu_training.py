"""The stage that trains FRD-Net on a GPU: its judgement of curves and gradients, its runs, its page and its plot."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import pathlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

PACKAGE = "frd_kernels.benchmarks" if importlib.util.find_spec("frd_kernels.benchmarks") else "benchmarks"
training, agreement, data, page, plots = (
    importlib.import_module(f"{PACKAGE}.{name}")
    for name in (
        "gpu.training.train",
        "gpu.training.agreement",
        "gpu.training.data",
        "gpu.training.page",
        "plots",
    )
)
STEPS = 60
SMALL = {"stages": [1, 2], "blocks": 1, "pyramid_width": 8, "trace_widths": [8, 8]}
Change = Callable[[torch.nn.Module], object]


def curve(change: Change = lambda model: None, learning_rate: float = 1e-3) -> list[float]:
    """Losses of a small net that learns to tell which of its inputs is the largest; `change` gets it beforehand."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.LayerNorm(32), torch.nn.GELU(), torch.nn.Linear(32, 8)
        )
    change(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for _ in range(STEPS):
        inputs = torch.randn(16, 8, generator=generator)
        loss = torch.nn.functional.cross_entropy(model(inputs), inputs.argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def perturbed(seed: int) -> Change:
    return lambda model: training.perturb(model, seed)


def in_gradients(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """A change of the gradient of the first layer's weights."""
    return lambda model: model.get_parameter("0.weight").register_hook(change)


def noisy(gradient: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return gradient + 0.3 * gradient.std() * torch.randn(gradient.shape, generator=generator)


@pytest.fixture(scope="module")
def peers() -> dict[str, list[float]]:
    return {"reference": curve(), "perturbed": curve(perturbed(1))}


@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_another_perturbation_agrees(peers: dict[str, list[float]], seed: int) -> None:
    found = agreement.curves_agree(peers | {"ours": curve(perturbed(seed))}, cycle=10)
    assert found["agrees"] is True
    assert 0.5 < found["factor"] < 1.6
    assert len(found["distances"]["ours"]) == STEPS // agreement.WINDOW


@pytest.mark.parametrize(
    ("change", "learning_rate"),
    [
        (lambda model: None, 1.05e-3),
        (in_gradients(noisy), 1e-3),
        (in_gradients(lambda gradient: -gradient), 1e-3),
    ],
    ids=["learning rate", "noise", "sign"],
)
def test_a_wrong_run_disagrees(peers: dict[str, list[float]], change: Change, learning_rate: float) -> None:
    found = agreement.curves_agree(peers | {"ours": curve(change, learning_rate)}, cycle=10)
    assert found["agrees"] is False
    assert found["factor"] > 4


def test_curves_that_rise_or_are_short(peers: dict[str, list[float]]) -> None:
    rising = {run: losses[::-1] for run, losses in (peers | {"ours": peers["reference"]}).items()}
    found = agreement.curves_agree(rising, cycle=10)
    assert (found["agrees"], found["falls"], found["factor"] < 1) == (False, False, True)
    short = {run: losses[:39] for run, losses in rising.items()}
    assert agreement.curves_agree(short, cycle=10)["agrees"] is None


def gradients(ours: float) -> dict[str, Any]:
    errors = {"ours": [ours, 1.0], "reference": [0.1, 0.0], "perturbed": [0.2, 0.0]}
    return agreement.gradients_agree(["weight", "nought"], [2.0, 1e-15], errors)


def test_gradients_are_held_against_their_peers() -> None:
    """Of one parameter; the exact gradient of the other is 0, so that it has no relative error."""
    found = gradients(ours=0.39)
    assert (found["agrees"], found["compared"], found["parameters"]) == (True, 1, 2)
    assert found["worst"] == [("weight", pytest.approx(1.95))]
    assert found["median_error"]["reference"] == pytest.approx(0.05)
    for wrong in (0.41, math.nan, math.inf):
        found = gradients(ours=wrong)
        assert (found["agrees"], found["over"]) == (False, ["weight"])
        json.dumps(found, allow_nan=False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The lite net with a part of its layers; a plan of a few steps."""
    load = training.load_config

    def smaller(path: pathlib.Path, changes: dict[str, Any]) -> Any:
        return load(path, changes | {"model.options": changes["model.options"] | SMALL})

    monkeypatch.setattr(training, "load_config", smaller)
    monkeypatch.setattr(training, "PILOT_STEPS", 1)
    return training.Plan("cpu", 64, 2, 7, ("lite",))


def test_a_sign_error_in_a_kernel_shows_in_the_gradients(small: Any) -> None:
    trainers = {run: training.make_trainer(small, "lite", run) for run in training.RUNS}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    batch = images, (images[:, :1] > 1).float()
    assert training.gradients_at_start(trainers, [batch])["agrees"] is True
    name = "blocks.0.mixer.dpm.angular.pdc.weight"
    trainers["ours"].model.get_parameter(name).register_hook(lambda gradient: -gradient)
    found = training.gradients_at_start(trainers, [batch])
    assert (found["agrees"], found["over"]) == (False, [name])


def test_the_three_runs(small: Any) -> None:
    """Same weights, to the rounding of bf16 in the perturbed one; no layer of ours in the reference."""
    trainers = {run: training.make_trainer(small, "lite", run) for run in training.RUNS}
    ours, reference, moved = (list(trainers[run].model.parameters()) for run in training.RUNS)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))
    differences = torch.cat([((a - b) / b)[b != 0] for a, b in zip(moved, reference, strict=True)])
    assert 0.9 * training.PERTURBATION < differences.abs().max() < 1.1 * training.PERTURBATION
    for run in ("reference", "perturbed"):
        assert trainers[run].config.backend == "reference"
        assert any("Eager" in type(module).__name__ for module in trainers[run].model.modules())
        assert trainers[run].ema.values.keys() == trainers[run].model.state_dict().keys()


def test_rehearsal(small: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "training.json"
    command = [
        "--out",
        str(out),
        "--device",
        "cpu",
        "--limit",
        "1000",
        "--batch",
        "1",
        "--steps",
        "7",
        "--only",
        "lite",
    ]
    assert training.main(command) == 0
    report = json.loads(out.read_text())
    record = report["variants"]["lite"]
    assert {run: len(losses) for run, losses in record["losses"].items()} == dict.fromkeys(training.RUNS, 7)
    assert record["losses"]["ours"] == pytest.approx(record["losses"]["reference"], rel=0.05)
    assert record["losses"]["ours"] != record["losses"]["reference"]
    assert record["step_ms"]["ours"]["blocks"] == 1  # of two: the first warms up
    assert record["ratio"] == pytest.approx(
        record["step_ms"]["reference"]["median"] / record["step_ms"]["ours"]["median"]
    )
    assert record["gradients"]["agrees"] is True
    assert (report["gpu"], report["data"]["batches"]) == ("cpu", 7)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"lite: {record['ratio']:.2f}x, 7 steps, gradients agree, curves not judged"
    )
    text = page.section(report)
    assert text.startswith("## Training\n")
    assert f"| lite | 7 | {record['images_per_s']['ours']:.1f} |" in text
    assert "not judged: 7 steps were made, 40 are needed" in text
    if importlib.util.find_spec("matplotlib"):
        assert [path.name for path in plots.write_all(tmp_path)] == ["training.png"]


def test_what_fails_is_noted(small: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, after which the training goes on, and a step of it, before which all is kept."""

    def fails(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    block = training.Runner.block

    def fails_late(runner: Any, steps: int, timed: bool) -> None:
        if len(runner.losses) == training.BLOCK:
            raise RuntimeError("the loss became nan")
        block(runner, steps, timed)

    monkeypatch.setattr(training, "gradients_at_start", fails)
    monkeypatch.setattr(training, "faster_layout", lambda *_: (False, {}))
    monkeypatch.setattr(training.Runner, "block", fails_late)
    out = tmp_path / "training.json"
    assert (
        training.main(
            ["--out", str(out), "--device", "cpu", "--limit", "1000", "--batch", "1", "--steps", "7"]
        )
        == 1
    )
    report = json.loads(out.read_text())
    assert {len(losses) for losses in report["variants"]["lite"]["losses"].values()} == {training.BLOCK}
    text = page.section(report)
    assert "- lite: RuntimeError: CUDA out of memory\n- lite: RuntimeError: the loss became nan" in text


def test_no_variant_and_no_gpu(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "training.json"
    assert training.main(["--out", str(out), "--device", "cpu", "--only", "icm"]) == 0
    assert "--only must be part of lite, got 'icm'" in capsys.readouterr().out
    assert not out.exists()
    assert page.section({}) == ""
    with pytest.raises(RuntimeError, match="got none in"):
        data.forge_batches([], 1, 1, "cpu", -1.0)


def verdict(**changes: Any) -> dict[str, Any]:
    """A report of one net as a GPU would leave it."""
    curves = {
        "steps": 120,
        "least_steps": 40,
        "limit": 2.0,
        "factor": 0.8,
        "first_and_last": {"ours": [1.9, 1.2]},
        "falls": True,
        "agrees": True,
    }
    step = {"p25": 90.0, "median": 100.0, "p75": 110.0, "blocks": 23}
    record = {
        "steps": 120,
        "images_per_s": {"ours": 80.0, "reference": 40.0},
        "step_ms": {"ours": step, "reference": step | {"median": 200.0}},
        "ratio": 2.0,
        "peak_bytes": {"ours": 5 << 20, "reference": 7 << 20},
        "agreement": curves | changes,
    }
    conditions = {"gpu": "A GPU", "when": "now", "revision": "abc", "size": 512, "batch": 8}
    return conditions | {"variants": {"paper": record}, "left_out": {"lite": "3 s were left"}}


def test_page_and_status() -> None:
    good, bad = verdict(), verdict(agrees=False, factor=3.0)
    text = page.section(good)
    assert (
        "| paper | 120 | 80.0 | 40.0 | 2.00x | 100.0 (90.0 to 110.0) | 200.0 (90.0 to 110.0) | 5 / 7 |"
        in text
    )
    assert "loss curves: agree. Over 120 steps ours is 0.80 times as far" in text
    assert "- lite: left out, 3 s were left." in text
    assert "loss curves: DISAGREE" in page.section(bad)
    assert [training.outcome(report)[0] for report in (good, bad)] == [0, 1]
    assert "2.00x, 120 steps, gradients not judged, curves DISAGREE" in training.outcome(bad)[1]


def test_memory_of_a_step_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is there before; the first block, whose libraries take their workspaces, does not count."""
    peak = iter([500, 700])
    fakes = {
        "synchronize": lambda *_: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: next(peak),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    steps: list[int] = []

    def make_step(image: int, mask: int, step: int) -> tuple[float, float]:
        steps.append(image)
        return 2.0, 1.0

    optimizer = types.SimpleNamespace(param_groups=[{}], zero_grad=lambda set_to_none: None)
    trainer = types.SimpleNamespace(
        device=torch.device("cuda"),
        optimizer=optimizer,
        learning_rate=lambda step: 0.1 * step,
        _step=make_step,
    )
    runner = training.Runner(trainer, [(0, 0), (1, 1)])
    for timed in (False, True, True):
        runner.block(2, timed)
    assert (steps, optimizer.param_groups[0]["lr"]) == ([0, 1] * 3, 0.5)
    assert (len(runner.losses), len(runner.step_seconds), runner.peak_bytes) == (6, 2, 600)
