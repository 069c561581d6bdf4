"""The training run: exact resume, selection, averaging, the guard against non-finite losses, configuration."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from frd_model import load_model
from frd_model.cli import main
from frd_model.train import Ema, Trainer, TrainingError
from frd_model.train.config import ConfigError, TrainConfig, from_dict, load_config, parse_override
from frd_model.train.data import open_validation_data
from frd_model.train.update import Updater


def config(output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "output": str(output),
        "epochs": 4,
        "batch_size": 2,
        "images_logged": 1,
        # drop_path draws random numbers in the forward pass, so that resuming has a state to restore.
        "model": {
            "options": {
                "stages": [1, 2],
                "blocks": 1,
                "pyramid_width": 8,
                "trace_widths": [8, 8],
                "drop_path": 0.2,
            }
        },
        "data": {"crop": 32, "samples": 4, "val_samples": 2, "authentic": 0.0},
        "loss": {"bce": 1.0},
        "optim": {"lr": 1e-3, "ema": 0.9, "warmup_epochs": 1.0},
    }
    for key, value in changes.items():
        if isinstance(value, dict):
            values[key] = values.get(key, {}) | value
        else:
            values[key] = value
    return from_dict(values)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def test_training_without_tensorboard_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs tensorboard: pip install 'frd-kernels\[train\]'"):
        Trainer(config(tmp_path)).fit()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_two_and_two_epochs_equal_four(tmp_path: Path, ema: float) -> None:
    whole = Trainer(config(tmp_path / "whole", optim={"ema": ema}))
    whole.fit()

    broken = config(tmp_path / "broken", optim={"ema": ema})
    Trainer(broken).fit(stop_after=2)
    torch.manual_seed(123)
    np.random.seed(123)
    resumed = Trainer(broken)
    resumed.resume()
    assert resumed.epoch == 2
    resumed.fit()

    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    if whole.ema and resumed.ema:
        assert all(torch.equal(v, resumed.ema.values[k]) for k, v in whole.ema.values.items())
    timeless = [{k: v for k, v in h.items() if k != "seconds"} for h in whole.history]
    assert timeless == [{k: v for k, v in h.items() if k != "seconds"} for h in resumed.history]


def test_same_seed_same_run_other_seed_another(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = Trainer(config(tmp_path / name, epochs=1, seed=seed))
        trainer.fit()
        runs.append(weights(trainer)["decoder.head.weight"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_files_of_a_run(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, epochs=1))
    figures = trainer.fit()
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.yaml",
        "last.pt",
        "last.safetensors",
        "best.safetensors",
        "tensorboard",
    }
    assert load_config(tmp_path / "config.yaml") == trainer.config
    assert any((tmp_path / "tensorboard").iterdir())
    assert {
        "val/auc",
        "val/permute_f1",
        "val/f1",
        "val/iou",
        "train/loss",
        "train/grad_norm",
    } <= figures.keys()
    saved = load_model(tmp_path / "last.safetensors").state_dict()
    assert trainer.ema is not None
    assert all(torch.equal(v, saved[k]) for k, v in trainer.ema.values.items())


def test_best_is_the_epoch_of_highest_merit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merits = iter([0.3, 0.9, 0.5])
    trainer = Trainer(config(tmp_path, epochs=3, optim={"ema": 0.0}))
    kept = {}

    def validate(board: Any = None) -> dict[str, float]:
        merit = next(merits)
        kept[merit] = weights(trainer)
        return {"val/auc": merit, "val/permute_f1": merit}

    monkeypatch.setattr(trainer, "validate", validate)
    trainer.fit()
    best = load_model(tmp_path / "best.safetensors").state_dict()
    assert all(torch.equal(v, best[k]) for k, v in kept[0.9].items())
    assert trainer.best == 0.9


def test_a_batch_is_learned(tmp_path: Path) -> None:
    """Forty steps on one batch must halve the loss: gradients reach the weights with the right sign."""
    trainer = Trainer(config(tmp_path, optim={"ema": 0.0, "lr": 5e-3}))
    image, mask = next(iter(trainer._batches()))
    trainer.model.train()
    losses = [float(trainer.updater.step(image, mask)[0]) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains(tmp_path: Path, amp: str) -> None:
    figures = Trainer(config(tmp_path, epochs=1, amp=amp, channels_last=True)).fit()
    assert math.isfinite(figures["train/loss"])


@pytest.mark.parametrize("epoch", [False, True], ids=["in a row", "a whole epoch"])
def test_non_finite_steps_stop(tmp_path: Path, epoch: bool, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(config(tmp_path, data={"samples": 8}, log_every=2, max_nonfinite=20 if epoch else 3))
    with torch.no_grad():
        trainer.model.decoder.head.bias.fill_(math.nan)
    message = "no step of epoch 1 had" if epoch else "3 steps in a row up to step 3 had no finite loss"
    with pytest.raises(TrainingError, match=message):
        trainer.fit()
    assert (
        "skipped step 1 of epoch 1: loss nan, gradient norm nan (1 in this epoch)" in capsys.readouterr().err
    )
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("amp", ["none", "fp16"])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing(tmp_path: Path, amp: str, fused: bool, bad: str) -> None:
    """fused: as on a GPU, where the host does not wait for the answer."""
    trainer = Trainer(config(tmp_path, amp=amp, optim={"ema": 0.0}))
    updater = trainer.updater
    for group in updater.optimizer.param_groups:
        group["fused"] = fused
    updater.optimizer._step_supports_amp_scaling = fused
    image, mask = next(iter(trainer._batches()))
    # The scale of fp16 starts too high for some gradients, and is halved until they fit.
    assert any(torch.isfinite(updater.step(image, mask)).all() for _ in range(20))
    before = weights(trainer)
    parameter = trainer.model.decoder.head.weight
    if bad == "gradient":
        handle = parameter.register_hook(lambda gradient: gradient * math.inf)
        loss, norm = updater.step(image, mask).tolist()
        handle.remove()
        assert math.isfinite(loss) and not math.isfinite(norm)
    else:
        loss, norm = updater.step(image * math.nan, mask).tolist()
        assert math.isnan(loss)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert torch.isfinite(updater.step(image, mask)).all()
    assert not torch.equal(parameter, before["decoder.head.weight"])


def test_skipped_steps_are_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(config(tmp_path, epochs=2))
    step = Updater.step
    calls = iter(range(100))

    def broken(self: Updater, image: torch.Tensor, mask: torch.Tensor, spare: bool = False) -> torch.Tensor:
        return step(self, image * (math.nan if next(calls) == 1 else 1.0), mask, spare)

    monkeypatch.setattr(Updater, "step", broken)
    trainer.fit()
    assert [figures["train/skipped"] for figures in trainer.history] == [1, 0]
    assert all(math.isfinite(figures["train/loss"]) for figures in trainer.history)
    captured = capsys.readouterr()
    assert captured.err.count("skipped step") == 1
    assert "skipped step 2 of epoch 1: loss nan" in captured.err
    assert captured.out.count("skipped steps 1") == 1


def test_learning_rate_warms_up_and_falls(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, optim={"lr": 1e-2, "min_lr": 1e-4, "warmup_epochs": 1.0}))
    rates = [trainer.learning_rate(step) for step in range(4 * trainer.steps_per_epoch + 1)]
    top = trainer.steps_per_epoch - 1
    assert rates[top] == pytest.approx(1e-2)
    assert all(np.diff(rates[: top + 1]) > 0)
    assert all(np.diff(rates[top:]) <= 0)
    assert rates[-1] == pytest.approx(1e-4)
    half = (top + 1 + 4 * trainer.steps_per_epoch) // 2
    assert rates[half] == pytest.approx((1e-2 + 1e-4) / 2)
    # A function of the step alone: whatever was asked before.
    assert [trainer.learning_rate(step) for step in reversed(range(len(rates)))] == rates[::-1]


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_a_state_of_an_earlier_version_is_resumed(tmp_path: Path, weight_decay: float) -> None:
    """Its optimizer has two groups, matrices before vectors, and no initial rates, which timm's scheduler adds."""
    settings = {"epochs": 2, "optim": {"weight_decay": weight_decay}}
    whole = Trainer(config(tmp_path / "whole", **settings))
    whole.fit()
    broken = config(tmp_path / "broken", **settings)
    Trainer(broken).fit(stop_after=1)
    state = torch.load(tmp_path / "broken" / "last.pt", weights_only=True)
    matrices = sum(p.ndim > 1 for p in whole.model.parameters())
    assert len(state["optimizer"]["param_groups"][0]["params"]) == matrices
    for group, decay in zip(state["optimizer"]["param_groups"], (weight_decay, 0.0), strict=True):
        del group["initial_lr"]
        group["weight_decay"] = decay
    torch.save(state, tmp_path / "broken" / "last.pt")
    resumed = Trainer(broken)
    resumed.resume()
    resumed.fit()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_ema_follows_the_weights() -> None:
    layer = nn.Linear(1, 1)
    ema = Ema(layer, 0.5)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.update(layer)
    decay = min(0.5, 2 / 11)
    torch.testing.assert_close(ema.values["weight"], start + (1 - decay))
    with ema.swapped_in(layer):
        torch.testing.assert_close(layer.weight.detach(), start + (1 - decay))
    torch.testing.assert_close(layer.weight.detach(), start + 1.0)


def test_norms_and_biases_do_not_decay(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path))
    decayed, free = trainer.optimizer.param_groups
    assert all(p.ndim > 1 for p in decayed["params"])
    assert free["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(free["params"]) == len(list(trainer.model.parameters()))


def test_validation_set_is_fixed_and_apart_from_training(tmp_path: Path) -> None:
    first = open_validation_data(config(tmp_path, seed=1))
    second = open_validation_data(config(tmp_path, seed=2))
    for i in range(len(first)):
        assert np.array_equal(first.load(i)[0], second.load(i)[0])
        assert first.load(i)[0] is first.load(i)[0]


@pytest.mark.parametrize("change", [{"seed": 7}, {"optim": {"lr": 2e-3}}, {"batch_size": 4}])
def test_resume_refuses_another_configuration(tmp_path: Path, change: dict[str, Any]) -> None:
    Trainer(config(tmp_path)).fit(stop_after=1)
    with pytest.raises(TrainingError, match="cannot resume: " + next(iter(change))):
        Trainer(config(tmp_path, **change)).resume()


def test_resume_without_or_with_a_broken_state(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path))
    with pytest.raises(TrainingError, match="nothing to resume"):
        trainer.resume()
    (tmp_path / "last.pt").write_bytes(b"broken")
    with pytest.raises(TrainingError, match="cannot be read as a training state"):
        trainer.resume()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed: 3", "unknown key speed"),
        ("data: {crops: 3}", "unknown key data.crops"),
        ("epochs: many", "epochs must be int"),
        ("epochs: true", "epochs must be int"),
        ("epochs: 0", "epochs must be at least 1"),
        ("optim: 3", "optim must be a section"),
        ("optim: {betas: [0.9]}", "optim.betas must be a list of 2"),
        ("optim: {lr: fast}", "optim.lr must be a number"),
        ("amp: fp8", "amp must be one of none, bf16, fp16"),
        ("accumulate: 17", r"accumulate must be at most batch_size \(16\), got 17"),
        ("loss: {edge_width: 4}", "loss.edge_width must be odd"),
        ("optim: {name: sgd}", "optim.name must be one of adamw, adam"),
        ("- 1", "must hold a mapping"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_bad_configurations(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_unknown_forge_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.forge\.size"):
        Trainer(config(tmp_path, data={"forge": {"size": 3}}))


def test_overrides_and_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("epochs: 3\noptim: {lr: 1e-3}\n")
    made = load_config(path, dict([parse_override("optim.lr=2e-4"), parse_override("data.crop=64")]))
    assert (made.epochs, made.optim.lr, made.data.crop) == (3, 2e-4, 64)
    assert from_dict(yaml.safe_load(yaml.safe_dump(made.to_dict()))) == made


def test_command_trains_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path / "run", epochs=2).to_dict()))
    assert main(["train", "--config", str(path), "--stop-after", "1"]) == 0
    assert main(["train", "--config", str(path), "--resume"]) == 0
    out = capsys.readouterr().out
    assert "epoch 1/2" in out
    assert "epoch 2/2" in out
    assert main(["train", "--config", str(path), "--lr", "1", "--resume"]) == 1
    assert "cannot resume" in capsys.readouterr().err
