"""A short training run of FRD-Net on forged photos in bf16, by the trainer behind `frd train`: images per second with
our kernels and with eager PyTorch, and whether both learn the same.

    python -m benchmarks.gpu.training.train --out FILE [--only VARIANT] [--limit SECONDS] [--device cpu]

All runs see the same batches in the same order and take turns, a block of steps each. `ours` is what a user gets,
`reference` the same weights in eager PyTorch, `perturbed` the reference once more from weights that differ by as much
as rounding to bf16 moves them. What is asked of them is said in `agreement`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import frd_kernels as fk
import frd_model
from frd_model.train import Ema, Trainer
from frd_model.train_config import TrainConfig, load_config
from frd_model.train_data import open_training_data

from ... import conditions
from ...clock import synchronize
from ...gate import one_line
from ...model_sides import ICM_FORMS, SMALL_GRIDS, SMALLEST, VARIANTS, gradients_of, swap_layers
from .agreement import curves_agree, gradients_agree
from .data import Batch, forge_batches

RUNS = ("ours", "reference", "perturbed")
SIDES = RUNS[:2]  # those whose times are compared
PERTURBATION = 2.0**-9  # what rounding to bf16 changes a weight by at most, relative to it
LEARNING_RATE = 3e-4  # below the demonstration's: nobody has tried that with the larger net
BATCHES = 20  # which come again and again, so that a loss can be compared with the same images' earlier one
BLOCK = 5  # steps of a run until it is another's turn
PILOT_STEPS = 3
GRADIENT_BATCHES = 2  # the error of a scalar's gradient over a few images is a matter of luck
DATA_SHARE = 0.2  # of the time limit, for forging at most
FIRST_SHARE = 0.7  # of what is left, for a variant that is not the last
LEAST_S = 20.0  # with less left a further variant is not begun


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained; `steps` is what the learning rate's warm-up and decay are laid out for."""

    device: str
    size: int
    batch: int
    steps: int
    variants: tuple[str, ...]


DEFAULTS = {
    "cuda": Plan("cuda", 512, 8, 120, ("paper", "lite")),
    "cpu": Plan("cpu", 64, 2, 40, ("lite",)),
}


def configuration(plan: Plan, variant: str, run: str, channels_last: bool = False) -> TrainConfig:
    """The configuration that trained the demonstration's weights from scratch, with another net, size and length."""
    # Stochastic depth would part the runs, and a residual scale of 1e-5 would keep the blocks' errors from the loss.
    options: dict[str, Any] = {"drop_path": 0.0, "layer_scale": 1.0}
    if plan.size < SMALLEST:
        options["grids"] = [list(grid) for grid in SMALL_GRIDS]
    changes = {
        "device": plan.device,
        "amp": "bf16",
        "channels_last": channels_last,
        "backend": "auto" if run == "ours" else "reference",
        "epochs": 1,
        "batch_size": plan.batch,
        "model.name": VARIANTS[variant],
        "model.preset": variant,
        "model.options": options,
        "data.crop": plan.size,
        "data.samples": plan.steps * plan.batch,
        "optim.lr": LEARNING_RATE,
        "optim.warmup_epochs": 0.1,
    }
    return load_config(pathlib.Path(frd_model.__file__).with_name("configs") / "demo.yaml", changes)


def make_trainer(plan: Plan, variant: str, run: str, channels_last: bool = False) -> Trainer:
    """The product's trainer, with its layers replaced by eager ones for all runs but ours."""
    trainer = Trainer(configuration(plan, variant, run, channels_last))
    if run != "ours":
        swap_layers(trainer.model, next(iter(ICM_FORMS[trainer.model.config.variant].values())))
        if run == "perturbed":
            perturb(trainer.model)
        if trainer.ema:
            trainer.ema = Ema(trainer.model, trainer.ema.decay)  # it goes by the layers' names
    trainer.model.train()
    return trainer


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        share = PERTURBATION * (2 * torch.rand(parameter.shape, generator=generator) - 1)
        parameter.mul_(1 + share.to(parameter.device))


@dataclasses.dataclass
class Runner:
    """A trainer, and what its steps have shown so far."""

    trainer: Trainer
    batches: list[Batch]
    losses: list[float] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)  # the mean of each timed block
    peak_bytes: int = 0

    def block(self, steps: int, timed: bool) -> None:
        """Some steps as `frd train` makes them, on a GPU with the memory that they take beside weights and averages."""
        device = self.trainer.device
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        synchronize(device)
        seconds = (time.perf_counter() - start) / steps
        self.trainer.optimizer.zero_grad(set_to_none=True)
        if timed:
            self.step_seconds.append(seconds)
            if device.type == "cuda":
                self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - before)

    def _step(self) -> None:
        step = len(self.losses)
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self.trainer.learning_rate(step)
        loss, _norm = self.trainer._step(*self.batches[step % len(self.batches)], step)
        self.losses.append(loss)


def faster_layout(plan: Plan, variant: str, run: str, batches: list[Batch]) -> tuple[bool, dict[str, float]]:
    """Whether channels_last is faster for a run, and the milliseconds of a step in both layouts."""
    found = {}
    for channels_last in (False, True):
        runner = Runner(make_trainer(plan, variant, run, channels_last), batches)
        runner.block(1, timed=False)
        runner.block(PILOT_STEPS, timed=True)
        found["channels_last" if channels_last else "nchw"] = 1e3 * runner.step_seconds[0]
        del runner
        release(plan.device)
    return found["channels_last"] < found["nchw"], found


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def gradients_at_start(trainers: dict[str, Trainer], batches: list[Batch]) -> dict[str, Any]:
    """The runs' first gradients against those of the reference in float64, of each image alone, as a whole batch would
    need too much memory in float64."""
    exact_model = (
        copy.deepcopy(trainers["reference"].model).double().to(memory_format=torch.contiguous_format)
    )
    squares: dict[str, list[Tensor]] = {}

    def add(name: str, tensors: list[Tensor]) -> None:
        squares.setdefault(name, []).append(torch.stack([tensor.square().sum() for tensor in tensors]).cpu())

    names: list[str] = []
    images, masks = (torch.cat(parts).split(1) for parts in zip(*batches, strict=True))
    for image, mask in zip(images, masks, strict=True):
        with fk.use_backend("reference"):
            loss = trainers["reference"].loss(exact_model(image.double()), mask)["total"]
            exact = gradients_of(exact_model, loss)
        names = list(exact)
        add("exact", list(exact.values()))
        for run, trainer in trainers.items():
            loss = trainer.loss(trainer._forward(image).float(), mask)["total"]
            found = gradients_of(trainer.model, loss)
            add(run, [found[name].double() - exact[name] for name in names])
    norms = {name: torch.stack(parts).sum(0).sqrt().tolist() for name, parts in squares.items()}
    return gradients_agree(names, norms.pop("exact"), norms)


def train(
    plan: Plan, variant: str, batches: list[Batch], end: float, record: dict[str, Any]
) -> Iterator[None]:
    """Fills in the record of a variant; yields whenever there is more to be kept."""
    chosen = {run: faster_layout(plan, variant, run, batches) for run in SIDES}
    record["pilot_ms"] = {run: times for run, (_, times) in chosen.items()}
    record["channels_last"] = {run: channels_last for run, (channels_last, _) in chosen.items()}
    yield
    runners = {}
    for run in RUNS:
        channels_last = record["channels_last"]["ours" if run == "ours" else "reference"]
        runners[run] = Runner(make_trainer(plan, variant, run, channels_last), batches)
    trainers = {run: runner.trainer for run, runner in runners.items()}
    try:
        record["gradients"] = gradients_at_start(trainers, batches[:GRADIENT_BATCHES])
    except Exception as error:  # what training costs can still be told
        note(record, error)
    release(plan.device)
    yield
    order, taken, done = list(runners.values()), 0.0, 0
    while done < plan.steps and time.monotonic() + 1.1 * taken < end:
        began, steps = time.monotonic(), min(BLOCK, plan.steps - done)
        for runner in order:
            runner.block(steps, timed=done > 0)
        order.reverse()
        done += steps
        taken = time.monotonic() - began
        record |= summary(plan, runners)
        yield


def note(record: dict[str, Any], error: Exception) -> None:
    record.setdefault("problems", []).append(one_line(error))
    print(record["problems"][-1], flush=True)


def summary(plan: Plan, runners: dict[str, Runner]) -> dict[str, Any]:
    """What the steps so far say. Times begin with the second block: the first one warms up."""
    losses = {run: list(runner.losses) for run, runner in runners.items()}
    found: dict[str, Any] = {
        "steps": len(losses["ours"]),
        "losses": losses,
        "agreement": curves_agree(losses, cycle=len(runners["ours"].batches)),
    }
    if not runners["ours"].step_seconds:
        return found
    sides = {run: runners[run] for run in SIDES}
    found["step_ms"] = {run: quartiles([1e3 * s for s in side.step_seconds]) for run, side in sides.items()}
    found["images_per_s"] = {run: 1e3 * plan.batch / step["median"] for run, step in found["step_ms"].items()}
    found["ratio"] = found["images_per_s"]["ours"] / found["images_per_s"]["reference"]
    if plan.device == "cuda":
        found["peak_bytes"] = {run: side.peak_bytes for run, side in sides.items()}
    return found


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else 3 * values
    return {"p25": low, "median": median, "p75": high, "blocks": len(values)}


def measure(plan: Plan, limit: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Trains the variants one after the other, the last for as long as is left; `save` gets the report as it grows."""
    end = time.monotonic() + limit
    began = time.monotonic()
    report: dict[str, Any] = header(plan, limit) | {"variants": {}, "left_out": {}}
    save(report)
    dataset = open_training_data(configuration(plan, plan.variants[0], "ours"))
    count = min(BATCHES, plan.steps)
    batches = forge_batches(dataset, plan.batch, count, plan.device, DATA_SHARE * limit)
    report["data"] = {"seconds": time.monotonic() - began, "batches": len(batches)}
    save(report)
    for variant in plan.variants:
        left = end - time.monotonic()
        if report["variants"] and left < LEAST_S:
            report["left_out"][variant] = f"{max(0.0, left):.0f} s were left, {LEAST_S:.0f} s are needed"
            continue
        record: dict[str, Any] = {}
        report["variants"][variant] = record
        share = 1.0 if variant == plan.variants[-1] else FIRST_SHARE
        try:
            for _ in train(plan, variant, batches, time.monotonic() + share * left, record):
                save(report)
        except Exception as error:  # out of memory, a loss that is not finite, a kernel that fails
            note(record, error)
        release(plan.device)
        save(report)
    return report


def header(plan: Plan, limit: float) -> dict[str, Any]:
    return conditions.origin(plan.device) | {
        "limit_s": limit,
        "size": plan.size,
        "batch": plan.batch,
        "planned_steps": plan.steps,
        "learning_rate": LEARNING_RATE,
    }


def outcome(report: dict[str, Any]) -> tuple[int, str]:
    """Exit status and the line that says it: 1 where a run failed, or gradients or curves disagree."""
    status, words = 0, []
    for variant, record in report["variants"].items():
        verdicts = {part: record.get(part, {}).get("agrees") for part in ("gradients", "agreement")}
        failed = "problems" in record or False in verdicts.values()
        status |= failed
        named = {True: "agree", False: "DISAGREE", None: "not judged"}
        ratio = f"{record['ratio']:.2f}x, " if "ratio" in record else ""
        words.append(
            f"{variant}: {ratio}{record.get('steps', 0)} steps, gradients {named[verdicts['gradients']]}, "
            f"curves {named[verdicts['agreement']]}" + (", FAILED" if "problems" in record else "")
        )
    return status, "; ".join(words) or "nothing was trained"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.training.train", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--only", default="", help="the variants whose name holds this text")
    parser.add_argument("--limit", type=float, default=110.0, help="seconds (default 110)")
    parser.add_argument("--device", choices=tuple(DEFAULTS), default="cuda")
    parser.add_argument("--size", type=int, help="pixels of a side (default 512, on the CPU 64)")
    parser.add_argument("--batch", type=int, help="images of a step (default 8, on the CPU 2)")
    parser.add_argument("--steps", type=int, help="at most (default 120, on the CPU 40)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    options = arguments(argv)
    plan = DEFAULTS[options.device]
    given = {name: getattr(options, name) for name in ("size", "batch", "steps") if getattr(options, name)}
    chosen = tuple(variant for variant in plan.variants if options.only in variant)
    plan = dataclasses.replace(plan, variants=chosen, **given)
    if not chosen:
        print(
            f"--only must be part of {' or '.join(DEFAULTS[options.device].variants)}, got {options.only!r}"
        )
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU (--device cpu rehearses)")
        return 1
    report = measure(plan, options.limit, functools.partial(conditions.write, options.out))
    status, line = outcome(report)
    print(line, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
