"""Times, peak memory and training steps of whole nets: what `model` puts into its records."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

import frd_kernels as fk
from frd_model.losses import FRDLoss

from .cases import LAYOUTS, Call, Case, Context, Providers
from .clock import synchronize
from .gate import one_line, poisoned
from .model_sides import (
    CAP,
    GRADIENT_CAP,
    OPS,
    Subject,
    autocast,
    check,
    draw_mask,
    gradient_errors,
    gradients_of,
    rivals_of,
)
from .providers import own_backends
from .timing import CannotTime, Wall, compare_samples

SLOW_S = 0.5
LEARNING_RATE = 0.0  # a step costs the same, and the weights stay those that float64 has


@dataclasses.dataclass
class Side:
    """A model in a layout, to be called within its context."""

    model: nn.Module
    source: nn.Module  # the same, not compiled
    layout: str
    call: Call
    context: Context = contextlib.nullcontext


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a subject is measured. `execution` is "eager" or "compiled"."""

    batch: int
    mode: str = "forward"  # or "training step"
    execution: str = "eager"
    dtype: torch.dtype = torch.float32
    budget_s: float = 6.0  # of one comparison; five turns are taken in any case
    rivals: int = 9  # at most
    backends: int = 9  # of ours, at most: a large net compiles dozens of Triton's kernels
    spread: bool = True  # also ours against itself


def nothing(case: Case) -> Providers:
    raise NotImplementedError(f"{case.name}: a model's sides are built by its subject")


def case_of(subject: Subject, setting: Setting) -> Case:
    """The setting in the terms of the kernels' benchmark."""
    shape = (setting.batch, 3, subject.size, subject.size)
    mode = "forward" if setting.mode == "forward" else "forward+backward"
    return Case(f"model {subject.variant}", shape, mode, nothing, dtype=setting.dtype, device=subject.device)


def own_sides(subject: Subject, setting: Setting) -> tuple[list[str], dict[str, Context], dict[str, str]]:
    """Our backends, the headline first, their settings, and why others are not among them."""
    image = torch.empty(1, 3, subject.size, subject.size, device=subject.device)
    return own_backends(case_of(subject, setting), OPS, image)


def compiled_form(model: nn.Module, setting: Setting) -> nn.Module:
    if setting.execution == "eager":
        return model
    torch._dynamo.reset()  # else it gives up after a few nets that share their code
    return cast(nn.Module, torch.compile(model, dynamic=False))


def inference(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Call:
    def call() -> tuple[Tensor]:
        with torch.no_grad(), autocast(images.device.type, dtype):
            return (model(images),)

    return call


def training_step(model: nn.Module, images: Tensor, dtype: torch.dtype, form: str) -> Call:
    """Forward, loss, backward, AdamW."""
    loss, mask = FRDLoss(form), draw_mask(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def call() -> tuple[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with autocast(images.device.type, dtype):
            logits = model(images)
        total = loss(logits, mask)["total"]
        total.backward()
        optimizer.step()
        return (total.detach(),)

    return call


def make_side(subject: Subject, model: nn.Module, setting: Setting, layout: str) -> Side:
    images, _ = subject.batch(setting.batch)
    images = images.contiguous(memory_format=LAYOUTS[layout])
    source = in_layout(model, layout)
    if setting.mode == "training step":
        call = training_step(source.train(), images, setting.dtype, subject.model.config.variant)
        return Side(source, source, layout, call)
    model = compiled_form(source.eval(), setting)
    return Side(model, source, layout, inference(model, images, setting.dtype))


def in_layout(model: nn.Module, layout: str) -> nn.Module:
    return model.to(memory_format=LAYOUTS[layout])


def seconds_of(side: Side, device: str, calls: int = 3) -> float:
    """The faster of some calls, after one to warm up; of slow ones, one has to do."""
    with side.context():
        side.call()
        times: list[float] = []
        while len(times) < calls and sum(times) < SLOW_S:
            synchronize(device)
            start = time.perf_counter()
            side.call()
            synchronize(device)
            times.append(time.perf_counter() - start)
    return min(times)


def best_layout(
    subject: Subject,
    make: Callable[[], nn.Module],
    setting: Setting,
    context: Context = contextlib.nullcontext,
) -> tuple[Side, dict[str, float]]:
    """The model in the faster layout, and the milliseconds of a call in each: every side runs in its best form."""
    sides, found = {}, {}
    for layout in LAYOUTS:
        sides[layout] = make_side(subject, make(), setting, layout)
        sides[layout].context = context
        found[layout] = 1e3 * seconds_of(sides[layout], subject.device)
    return sides[min(found, key=lambda layout: found[layout])], found


def peer_of(subject: Subject, rivals: dict[str, Side], layout: str) -> nn.Module:
    """The headline rival, not compiled, in a layout."""
    peer = next(iter(rivals.values()))
    return peer.source if peer.layout == layout else in_layout(subject.copy(peer.source), layout)


def drop_wrong(rivals: dict[str, Side], errors: dict[str, float], cap: float) -> dict[str, str]:
    """Takes out rivals that are wrong themselves, and says so."""
    wrong = {name: error for name, error in errors.items() if not error <= cap}
    for name in wrong:
        del rivals[name]
    return {name: f"relative error {error:.2e}" for name, error in wrong.items()}


def check_inference(
    subject: Subject, setting: Setting, ours: dict[str, Side], rivals: dict[str, Side]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Every side's relative error, and what was left out for it.

    Raises:
        GateError: one of ours is over twice the headline rival's in the same layout, or the cap.
    """
    logits_only = setting.execution == "compiled"

    def error(model: nn.Module, layout: str) -> float:
        return subject.error(model, setting.batch, setting.dtype, layout, logits_only)

    errors = {}
    for name, side in rivals.items():
        with side.context():
            errors[name] = error(side.model, side.layout)
    for name, side in ours.items():
        peer = error(peer_of(subject, rivals, side.layout), side.layout)
        with poisoned(), side.context():
            errors[name] = error(side.model, side.layout)
        check(f"model {subject.variant}, {name}", errors[name], peer, setting.dtype)
    return errors, drop_wrong(rivals, {name: errors[name] for name in rivals}, CAP[setting.dtype])


def check_training(
    subject: Subject, setting: Setting, ours: dict[str, Side], rivals: dict[str, Side]
) -> tuple[dict[str, Any], dict[str, str]]:
    """As `check_inference`, of the gradients, by part of the net (`gradient_errors`).

    Without the loss's edge term: its maxima over flat predictions jump between pixels with the last bit.
    """
    images, _ = subject.batch(setting.batch)
    loss, mask = FRDLoss(subject.model.config.variant, edge_weight=0.0), draw_mask(images)

    def gradients(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        with autocast(subject.device, dtype):
            logits = model(x)
        return gradients_of(model, loss(logits, mask)["total"])

    with fk.use_backend("reference"):
        exact = gradients(subject.exact_model, images.double(), torch.float32)

    def error(model: nn.Module, layout: str) -> dict[str, float]:
        x = images.contiguous(memory_format=LAYOUTS[layout])
        return gradient_errors(gradients(model, x, setting.dtype), exact)

    errors: dict[str, Any] = {}
    for name, side in rivals.items():
        with side.context():
            errors[name] = error(side.model, side.layout)
    for name, side in ours.items():
        peer = error(peer_of(subject, rivals, side.layout), side.layout)
        with poisoned(), side.context():
            errors[name] = error(side.model, side.layout)
        for part, value in errors[name].items():
            label = f"model {subject.variant}, {name}, gradients of {part}"
            check(label, value, peer[part], setting.dtype, GRADIENT_CAP)
    worst = {name: max(errors[name].values()) for name in rivals}
    return errors, drop_wrong(rivals, worst, GRADIENT_CAP[setting.dtype])


def build_sides(
    subject: Subject, setting: Setting, layouts: dict[str, str]
) -> tuple[dict[str, Side], dict[str, Side], dict[str, Any], dict[str, str]]:
    """Ours, rivals, the pilot times that chose their layouts, and what is left out and why.

    `layouts` remembers choices of an earlier, smaller batch: a pilot run of each side takes long on a CPU.
    """
    training = setting.mode == "training step"
    backends, contexts, left_out = own_sides(subject, setting)
    left_out |= dict.fromkeys(backends[setting.backends :], "not measured in this setting, to save time")
    backends = backends[: setting.backends]
    rivals = rivals_of(subject.model, training)
    if setting.execution == "compiled":
        rivals = dict(list(rivals.items())[:1])
    rivals = dict(list(rivals.items())[: setting.rivals])
    if subject.device == "cuda" and setting.rivals > 1:
        rivals["reference"] = subject.model  # what runs on GPUs where nothing is proven
        contexts["reference"] = functools.partial(fk.use_backend, "reference")
    pilots: dict[str, Any] = {}
    found: dict[str, Side] = {}
    for name in (*backends, *rivals):
        source: nn.Module = rivals.get(name, subject.model)
        context = contexts.get(name, contextlib.nullcontext)
        try:
            if (layout := layouts.get(name)) is not None:
                found[name] = make_side(subject, subject.copy(source), setting, layout)
                found[name].context = context
            else:
                make = functools.partial(subject.copy, source)
                found[name], pilots[name] = best_layout(subject, make, setting, context)
        except Exception as failure:  # whatever a compiler or a backend raises
            if name == backends[0] and len(backends) == 1:
                raise
            left_out[name] = one_line(failure)
    layouts |= {name: side.layout for name, side in found.items()}
    ours = {name: found[name] for name in backends if name in found}
    others = {name: found[name] for name in rivals if name in found}
    if not ours or not others:
        raise CannotTime(f"model {subject.variant}: no backend or no rival: {left_out}")
    return ours, others, pilots, left_out


def timings_of(subject: Subject, setting: Setting) -> tuple[Any, ...]:
    """On a GPU wall-clock time, and for single images, where the host is what limits, CUDA graphs too."""
    if subject.device == "cpu":
        return (Wall,)
    from . import cuda

    graphs = setting.mode == "forward" and setting.execution == "eager" and setting.batch == 1
    return (cuda.CudaWall, cuda.CudaGraph) if graphs else (cuda.CudaWall,)


def compare_sides(
    kind: Any, case: Case, ours: dict[str, Side], rivals: dict[str, Side], setting: Setting
) -> dict[str, Any]:
    """Our headline backend against every rival, the other backends against the headline rival, ours against itself."""
    sides = Providers(
        ours={name: side.call for name, side in ours.items()},
        rivals={name: side.call for name, side in rivals.items()},
        oracle=tuple,
        contexts={name: side.context for name, side in (ours | rivals).items()},
    )
    timing = kind(case, sides)
    samples: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    try:
        for name, side in (ours | rivals).items():
            try:
                samples[name] = timing.sample(name, side.call)
            except CannotTime as reason:
                left_out[name] = str(reason)
        own = [name for name in ours if name in samples]
        others = [name for name in rivals if name in samples]
        if not own or not others:
            raise CannotTime(f"{case.name}, {timing.name}: {left_out}")

        def compare(mine: str, other: str, repeats: int = 40) -> dict[str, Any]:
            return compare_samples(samples[mine], samples[other], repeats, setting.budget_s)

        best, headline = own[0], others[0]
        compared = {name: compare(best, name) for name in others}
        half = compared[headline]["turns"] // 2 + 1
        spread = abs(compare(best, best, half)["ratio"] - 1) if setting.spread else None
        backends = {name: compare(name, headline) if name != best else compared[headline] for name in own}
    finally:
        timing.close()
    return {
        "timing": timing.name,
        "backend": best,
        "rival": headline,
        **compared[headline],
        "aa_spread": spread,
        "rivals": compared,
        "backends": backends,
        "left_out": left_out,
    }


def peak_bytes_on_gpu(side: Side) -> int:
    """The most memory allocated at once during a call, over what was allocated before."""
    with side.context():
        side.call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.call()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
