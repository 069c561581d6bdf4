"""Training in parts, in several processes and across kills: each computes the steps of one undisturbed process."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from frd_model import load_model
from frd_model.cli import main
from frd_model.train import Trainer
from frd_model.train.config import from_dict, load_config
from frd_model.train.sampler import StepSampler
from frd_model.train.state import write_state
from frd_model.train.update import Updater

OPTIONS = {"stages": [1, 2], "blocks": 1, "pyramid_width": 8, "trace_widths": [8, 8], "drop_path": 0.2}
SEVERAL = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def photos(root: Path, count: int) -> list[str]:
    """A set of noise, of which a square was replaced by smoother noise; the flags that name it."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        image = rng.integers(0, 256, (64, 64, 3), np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        top, left = rng.integers(4, 28, 2)
        mask[top : top + 28, left : left + 28] = 255
        image[mask > 0] //= 4
        Image.fromarray(image).save(root / "images" / f"{i:02d}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i:02d}.png")
    return ["--images", str(root / "images"), "--masks", str(root / "masks")]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """11 photos to train on in batches of 5: in the last one, of a single photo, a second process has none."""
    root = tmp_path_factory.mktemp("sets")
    validation = [flag.replace("--", "--val-") for flag in photos(root / "val", 3)]
    settings = ["optim.warmup_epochs=0.5", "optim.lr=1e-3", "optim.ema=0.9", "log_every=2"]
    return [
        *(*photos(root / "train", 11), *validation, "--crop", "64", "--batch-size", "5", "--epochs", "3"),
        *("--set", f"model.options={json.dumps(OPTIONS)}", *(x for s in settings for x in ("--set", s))),
    ]


def command(output: Path, *flags: str, several: bool = False) -> list[str]:
    launcher = SEVERAL if several else ()
    return [sys.executable, *launcher, "-m", "frd_model", "train", "--output", str(output), *flags]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    path = {} if os.environ.get("FRD_TEST_INSTALLED") else {"PYTHONPATH": root}
    return os.environ | path | {"OMP_NUM_THREADS": "1"}


def train(output: Path, *flags: str, several: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(output, *flags, several=several),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )


def state_of(output: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(output / "last.pt", weights_only=True)
    return state


def check_same(first: Path, second: Path) -> None:
    """Bit for bit: weights, averages, optimizer, figures, selection."""
    one, other = state_of(first), state_of(second)
    for part in (lambda s: s["model"], lambda s: s["ema"]["values"]):
        assert all(torch.equal(value, part(other)[key]) for key, value in part(one).items())
    for key, values in one["optimizer"]["state"].items():
        assert all(
            torch.equal(value, other["optimizer"]["state"][key][name]) for name, value in values.items()
        )
    assert figures(one) == figures(other)
    assert one["best"] == other["best"]
    best = [load_model(output / "best.safetensors").state_dict() for output in (first, second)]
    assert all(torch.equal(value, best[1][key]) for key, value in best[0].items())


def figures(state: dict[str, Any]) -> list[dict[str, float]]:
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in state["history"]]


def check_close(first: Path, second: Path) -> None:
    """Up to the order of sums: far below what an update changes."""
    one, other = state_of(first), state_of(second)
    for key, value in one["model"].items():
        torch.testing.assert_close(other["model"][key], value, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(figures(one), figures(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def small(output: Path, **changes: Any) -> Trainer:
    values = {
        "output": str(output),
        "epochs": 2,
        "batch_size": 5,
        "model": {"options": OPTIONS | {"drop_path": 0.0}},
        "data": {"crop": 32, "samples": 10, "val_samples": 1, "authentic": 0.2},
        "optim": {"clip_norm": 0.0, "warmup_epochs": 0.0},
    }
    return Trainer(from_dict(values | changes))


@pytest.mark.parametrize("form", ["paper", "released"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(tmp_path: Path, form: str) -> None:
    loss = {"form": form, "bce": 0.5}
    whole, parts = (small(tmp_path, accumulate=count, loss=loss) for count in (1, 3))
    image, mask = next(iter(whole._batches()))
    # Parts of unlike masks: the mean of their losses is another loss.
    mask[:2] = 0
    state = copy.deepcopy(whole.model.state_dict())
    results = [trainer.updater.step(image, mask) for trainer in (whole, parts)]
    torch.testing.assert_close(*results)
    gradients = [torch.cat([p.grad.flatten() for p in t.model.parameters()]) for t in (whole, parts)]
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5

    whole.model.load_state_dict(state)
    whole.model.zero_grad()
    for images, masks in zip(image.tensor_split(3), mask.tensor_split(3), strict=True):
        (whole.updater.loss(whole.model(images), masks)["total"] / 3).backward()
    naive = torch.cat([p.grad.flatten() for p in whole.model.parameters()])
    assert float((gradients[0] - naive).norm() / gradients[0].norm()) > 0.05


def test_parts_draw_the_random_numbers_of_their_sums(tmp_path: Path) -> None:
    """The first pass and the second one drop the same paths, or the loss of the sums would be another one."""
    trainer = small(tmp_path, accumulate=2, model={"options": OPTIONS | {"drop_path": 0.5}})
    trainer.model.train()
    image, mask = next(iter(trainer._batches()))
    parts = list(zip(image.tensor_split(2), mask.tensor_split(2), strict=True))
    torch.manual_seed(0)
    total = trainer.updater._total(parts, False)
    again = torch.stack([trainer.updater._sums(trainer.model, *part, False) for part in parts]).sum(0)
    assert torch.equal(total, again.detach())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_divide_the_batches_of_one(world: int) -> None:
    data = range(11)
    one = StepSampler(data, 4, seed=3)
    one.set_position(2, 0)
    batches = list(one)
    shares = [StepSampler(data, 4, 3, rank, world) for rank in range(world)]
    for share in shares:
        share.set_position(2, 0)
    taken = [
        [part for part, share in zip(parts, shares, strict=True) if not share.is_spare(step)]
        for step, parts in enumerate(zip(*shares, strict=True))
    ]
    assert [[i for part in parts for i in part] for parts in taken] == batches
    assert sorted(i for batch in batches for i in batch) == list(data)
    assert [sum(share.is_spare(step) for share in shares) for step in range(3)] == [0, 0, max(0, world - 3)]
    one.set_position(2, 2)
    assert list(one) == batches[2:] and len(one) == 1


def test_the_order_is_that_of_earlier_versions() -> None:
    """They left it to DataLoader(shuffle=True); their runs are resumed."""
    data, seed, epoch = list(range(23)), 42, 5
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    expected = [batch.tolist() for batch in DataLoader(data, 4, shuffle=True, generator=generator)]
    sampler = StepSampler(data, 4, seed)
    sampler.set_position(epoch, 0)
    assert list(sampler) == expected


def test_a_set_can_choose_its_order() -> None:
    class Drawn(list[int]):
        def order(self, epoch: int) -> list[int]:
            return [epoch, 0, 0, 1]

    sampler = StepSampler(Drawn(range(4)), 3, 0)
    sampler.set_position(2, 0)
    assert list(sampler) == [[2, 0, 0], [1]]


def test_a_full_disk_leaves_the_earlier_state(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_state({"epoch": torch.ones(1)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(
            OSError, match=r"last\.pt' cannot be written, what it held stays: .*File too large"
        ):
            write_state({"epoch": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(torch.load(path)["epoch"], torch.ones(1))
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("amp", "steps", "saved"), [("none", 8, (1, 2)), ("fp16", 8, (1, 2)), ("none", 3, (0, 2))]
)
def test_resume_in_mid_epoch(
    tmp_path: Path, amp: str, steps: int, saved: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "amp": amp,
        "batch_size": 2,
        "save_every": 2,
        "model": {"options": OPTIONS},
        "optim": {"ema": 0.9, "lr": 1e-3},
    }
    whole = small(tmp_path / "whole", **settings)
    whole.fit()
    step, count = Updater.step, iter(range(100))

    def fails(self: Updater, *arguments: Any) -> torch.Tensor:
        if next(count) == steps:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Updater, "step", fails)
        small(tmp_path / "broken", **settings).fit()
    resumed = small(tmp_path / "broken", **settings)
    resumed.resume()
    assert (resumed.epoch, resumed.step) == saved
    resumed.fit()
    check_same(tmp_path / "whole", tmp_path / "broken")


def test_presets() -> None:
    """manipulation-localization: what the paper's text and the authors' code say."""
    paper, released = (load_config(None, {"data.crop": 256}, name) for name in ("paper", "released"))
    assert (paper.optim.name, paper.optim.lr, paper.optim.min_lr) == ("adam", 5e-4, 5e-4)
    assert (paper.batch_size, paper.epochs, paper.amp, paper.loss.form) == (16, 100, "none", "paper")
    optim = released.optim
    assert (optim.name, optim.lr, optim.min_lr, optim.betas) == ("adamw", 5e-5, 5e-7, (0.9, 0.999))
    assert (optim.warmup_epochs, optim.weight_decay) == (2, 0.05)
    assert (released.batch_size, released.epochs, released.amp) == (32, 100, "fp16")
    assert (released.seed, released.loss.form, released.loss.edge_width) == (42, "released", 7)
    for config, preset in ((paper, "paper"), (released, "released")):
        assert (config.model.name, config.model.preset) == ("frdnet_mit_b2", preset)
        assert (config.data.crop, config.data.resize, config.data.augment.preset) == (256, 512, "mvss")


def test_a_file_changes_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("optim: {lr: 1e-3}\nloss:\n")
    config = load_config(path, {"model.preset": "lite"}, "paper")
    assert (config.optim.name, config.optim.lr, config.loss.form) == ("adam", 1e-3, "paper")
    assert (config.model.name, config.model.preset) == ("frdnet_mit_b2", "lite")


def test_flags_change_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr("frd_model.factory.load_encoder_weights", lambda encoder, path: loaded.append(path))
    flags = ["--preset", "released", "--model", "frdnet_mit_b0", "--model-preset", "lite", "--epochs", "1"]
    flags += [
        *photos(tmp_path / "data", 2),
        "--crop",
        "32",
        "--batch-size",
        "1",
        "--encoder-weights",
        "~/b0.pth",
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    assert loaded == [str(tmp_path / "b0.pth")]
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.model.preset, config.data.crop, config.data.resize) == ("lite", 32, None)
    assert (config.amp, config.optim.warmup_epochs, config.data.augment.preset) == ("fp16", 2, "mvss")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_does_not_wait_for_the_gpu(tmp_path: Path, amp: str, accumulate: int) -> None:
    trainer = small(tmp_path, device="cuda", amp=amp, accumulate=accumulate)
    image, mask = next(iter(trainer._batches()))
    assert image.is_pinned()
    for _ in range(2):
        trainer.updater.step(image, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = trainer.updater.step(image, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values.device.type == "cuda"


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, flags: list[str], workers: str) -> None:
    more = [*flags, "--batch-size", "2", "--workers", workers, "--save-every", "1"]
    assert train(tmp_path / "whole", *more).returncode == 0
    run = tmp_path / "killed"
    for attempt in range(2):
        process = subprocess.Popen(command(run, *more, *(["--resume"] if attempt else [])), env=environment())
        wait_for_saves(process, run, random.randrange(1, 6))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    state = state_of(run)
    assert 0 < 6 * state["epoch"] + state["step"] < 18
    done = train(run, "--resume", "--workers", workers)
    assert done.returncode == 0, done.stderr
    check_same(tmp_path / "whole", run)


def wait_for_saves(process: subprocess.Popen[bytes], output: Path, count: int) -> None:
    path, seen = output / "last.pt", set()
    earlier = path.stat().st_mtime_ns if path.exists() else None
    end = time.monotonic() + 100
    while len(seen) < count:
        assert process.poll() is None and time.monotonic() < end
        if path.exists() and path.stat().st_mtime_ns != earlier:
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.002)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, flags: list[str]) -> None:
    options = OPTIONS | {"drop_path": 0.0, "image_head": True}
    still = [*flags, "--set", f"model.options={json.dumps(options)}", "--set", "loss.image=0.2"]
    assert train(tmp_path / "one", *still).returncode == 0
    done = train(tmp_path / "two", *still, several=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/3") == 1 and "2 processes" in done.stdout
    check_close(tmp_path / "one", tmp_path / "two")
    # A state passes from one process to two and back.
    run = tmp_path / "passed"
    assert train(run, *still, "--stop-after", "1").returncode == 0
    done = train(run, "--resume", "--stop-after", "1", "--accumulate", "2", several=True)
    assert done.returncode == 0, done.stderr
    assert train(run, "--resume").returncode == 0
    check_close(tmp_path / "one", run)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path: Path, flags: list[str]) -> None:
    more = [*flags, "--save-every", "1"]
    assert train(tmp_path / "whole", *more, several=True).returncode == 0
    run = tmp_path / "killed"
    process = subprocess.Popen(command(run, *more, several=True), env=environment(), stderr=subprocess.PIPE)
    wait_for_saves(process, run, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"SIGKILL" in stderr
    assert train(run, "--resume", several=True).returncode == 0
    check_same(tmp_path / "whole", run)


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others(tmp_path: Path) -> None:
    flags = [*photos(tmp_path / "data", 6), "--crop", "64", "--batch-size", "6", "--epochs", "1"]
    flags += ["--set", "data.max_bad=0", "--set", f"model.options={json.dumps(OPTIONS)}"]
    (tmp_path / "data" / "images" / "03.png").write_bytes(b"broken")
    done = train(tmp_path / "run", *flags, several=True)
    assert done.returncode != 0
    assert "photos cannot be used, more than data.max_bad 0 allows" in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("frd train: process ")]
    assert 1 <= len(said) <= 2
    assert all("max_bad" in line or "another process has ended" in line for line in said)
