"""FRD-Net as a whole, our layers against eager PyTorch with the same weights: latency interleaved (A B B A), images a
second, peak memory, a training step; parameters and multiply-accumulates (`--count`).

Every implementation runs in the memory layout that a pilot run found faster for it. A residual scale of 1e-5, as at
the start of training, would hide any error of the FRD blocks from the logits, so the scales are 1 here. The arg-max of
the clustering makes the output jump: images in which float64 finds a token whose two best cosines nearly tie are
skipped, because rounding would decide there in any implementation.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frd_kernels as fk
from frd_model import FRDNet, create_model
from frd_model.complexity import count_macs, count_parameters
from frd_model.losses import FRDLoss

from . import baselines
from .gate import GateError, allowed_error, one_line, poisoned, relative_error
from .machine import (
    ROOT,
    cpu_threads,
    frame,
    keep_memory,
    load_limit,
    machine_state,
    missing_gpu,
    positive,
    write_json,
)
from .registry import LAYOUTS, Call, Case, Impls, own_backends
from .timing import CannotTime, CudaGraph, CudaWall, Wall, compare_all, describe, full_float32, timed, why

VARIANTS = {"paper": "frdnet_mit_b2", "released": "frdnet_mit_b2", "lite": "frdnet_mit_b0"}
OPS = ("pdc2d", "pdc_weight", "pdc_block", "icm")
# For each `variant` of the ICM its eager forms, first the one that its authors or users write.
ICM_FORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "released": {"eager": baselines.icm_products, "eager, gather and scatter_add": baselines.icm_gather},
    "paper": {"eager": baselines.icm_dense},
}
FOLDED = "folded"
# A difference of cosines that float32 might reverse.
NEAR_TIE = 1e-5
TRIES = 64
# Below this size the presets' first round would have more centres than tokens, so that every image had ties.
SMALL_SIZE, SMALL_GRIDS = 256, ((2, 2), (2, 1), (1, 1))
# What no net that computes the right thing reaches. Far above a kernel's cap, because the library's layers around ours
# err too: GroupNorm on the CPU sums a channels_last image in one chain (2e-5 at 1024 x 1024, ours and eager alike),
# and in 16 bit all roundings of a net add up to some hundredths.
CAP = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# Of gradients: a ReLU of the decoder whose input the last bit moves across zero changes what flows into every layer
# before it, in the eager net by the same amount (nearly 1e-2 was seen).
GRADIENT_CAP = {torch.float32: 5e-2, torch.bfloat16: 2e-1}

# Seconds of one comparison.
BUDGET_S = {"cpu": 4.0, "cuda": 0.25}
# Of one record, in forward passes: gate, pilot, the turns of each pair and their warm-up.
CALLS, CALLS_OF_A_BATCH, CALLS_OF_A_STEP = 60, 32, 180
COMPILE_S, SLOW_S = 45.0, 0.5


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a net is measured: `mode` is "forward" or "training step", `execution` "eager" or "compiled".

    At most `baselines` baselines and `backends` of ours take part: a large net compiles dozens of Triton kernels.
    """

    batch: int
    mode: str = "forward"
    execution: str = "eager"
    dtype: torch.dtype = torch.float32
    baselines: int = 9
    backends: int = 9

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.mode}, {self.execution}"


@dataclasses.dataclass
class Net:
    """A model in a layout, and its call; `source` is the same model, not compiled."""

    model: nn.Module
    source: nn.Module
    layout: str
    call: Call


def build_model(variant: str, seed: int = 0, /, **overrides: Any) -> FRDNet:
    """The preset with random weights, in eval mode, without stochastic depth; overrides as in `create_model`."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"drop_path": 0.0, "layer_scale": 1.0, **overrides}
        model = create_model(VARIANTS[variant], preset=variant, **options)
    return model.eval()


class EagerICM(fk.ICM):
    """Computed by `form`, one of the eager forms. [B, C, H, W] -> [B, C, H, W]."""

    form: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        rounds: list[Any] = list(self.rounds)
        projections = [(p.key.weight, p.key.bias, p.value.weight, p.value.bias) for p in rounds]
        return self.form(x, projections, self.alpha, self.beta, self.grids)


class EagerDPM(fk.DPM):
    """In eager PyTorch. [B, C, H, W] -> [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.angular, self.central
        weights = first.pdc.weight, first.point.weight, second.pdc.weight, second.point.weight
        return baselines.dpm(x, *weights)


class EagerStemPDC(fk.PDC2d):
    """Dense, replicate-padded, without bias, in eager PyTorch. [B, C, H, W] -> [B, O, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        if self.kind == "angular":
            return F.conv2d(padded, baselines.angular_weight(self.weight))
        return F.conv2d(padded, self.weight) - F.conv2d(x, self.weight.sum((2, 3), keepdim=True))


def swap_layers(model: nn.Module, form: Callable[..., Tensor]) -> None:
    """Our layers become eager ones, in place and with the same parameters; layers that were folded before stay."""
    for layer in model.modules():
        if type(layer) is fk.ICM:
            layer.__class__ = EagerICM
            cast(EagerICM, layer).form = form
        elif type(layer) is fk.DPM and isinstance(layer.angular, fk.PDCBlock2d):
            layer.__class__ = EagerDPM
        elif type(layer) is fk.PDC2d and layer.groups == 1:
            if layer.kind not in ("angular", "central") or layer.bias is not None:
                raise ValueError(f"a dense layer must be angular or central, without bias, got {layer}")
            layer.__class__ = EagerStemPDC


def baselines_of(model: FRDNet, training: bool = False) -> dict[str, nn.Module]:
    """Name -> a copy of the model in eager PyTorch. `folded`, whose difference convolutions were converted to plain
    ones beforehand, is for inference only."""
    forms = ICM_FORMS[model.config.variant]
    found: dict[str, nn.Module] = {}
    for name, form in forms.items():
        found[name] = copy.deepcopy(model)
        swap_layers(found[name], form)
    if not training:
        found[FOLDED] = fk.convert.fold(model)
        swap_layers(found[FOLDED], list(forms.values())[-1])
    return found


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """16 bit is what autocast makes of a float32 net, as users run it."""
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


class Subject:
    """A variant on a device at one size, its images, and what float64 makes of them."""

    def __init__(self, variant: str, size: int, device: str = "cpu", /, **overrides: Any) -> None:
        self.variant, self.size, self.device = variant, size, device
        if size < SMALL_SIZE:
            overrides = {"grids": SMALL_GRIDS, **overrides}
        self.model = build_model(variant, 0, **overrides).to(device)
        self.exact_model = copy.deepcopy(self.model).double()
        # [1, 3, size, size], none with a near tie; of each the logits and the output of each FRD block.
        self.images: list[Tensor] = []
        self.exact: list[tuple[Tensor, ...]] = []
        self.drawn = 0

    def batch(self, count: int) -> tuple[Tensor, list[Tensor]]:
        """The first `count` images, and their exact logits and outputs of the FRD blocks."""
        while len(self.images) < count:
            if self.drawn >= TRIES:
                raise GateError(
                    f"{self.variant} at {self.size}: {TRIES} images drawn, {len(self.images)} without a near tie"
                )
            image = draw_image(self.size, seed=self.drawn).to(self.device)
            self.drawn += 1
            with near_ties(self.exact_model) as gaps, fk.use_backend("reference"):
                outputs = block_outputs(self.exact_model, image.double())
            if min(gaps, default=1.0) > NEAR_TIE:
                self.images.append(image)
                self.exact.append(tuple(outputs))
        exact = [torch.cat(parts) for parts in zip(*self.exact[:count], strict=True)]
        return torch.cat(self.images[:count]), exact

    def error(
        self, model: nn.Module, count: int, dtype: torch.dtype, layout: str, logits_only: bool = False
    ) -> float:
        """The largest relative error of `model` on the first `count` images."""
        images, exact = self.batch(count)
        with autocast(self.device, dtype):
            outputs = block_outputs(model, images.contiguous(memory_format=LAYOUTS[layout]), logits_only)
        return net_error(outputs, exact[: len(outputs)])


def draw_image(size: int, seed: int) -> Tensor:
    """[1, 3, size, size]: flat tiles under noise, so that the parts of an image differ as those of a photo do."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(1, 3, 8, 8, generator=generator)
    noise = torch.randn(1, 3, size, size, generator=generator)
    return F.interpolate(tiles, size=(size, size), mode="nearest") + 0.3 * noise


def draw_mask(images: Tensor) -> Tensor:
    """[B, 1, H, W]: a rectangle is forged."""
    mask = torch.zeros_like(images[:, :1])
    height, width = images.shape[-2:]
    mask[..., height // 4 : height // 2, width // 4 : 3 * width // 4] = 1
    return mask


def block_outputs(model: nn.Module, images: Tensor, logits_only: bool = False) -> list[Tensor]:
    """Logits, then the output of each FRD block; hooks would break the graph of a compiled model."""
    outputs: list[Tensor] = []
    blocks: Any = () if logits_only else model.blocks
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[2].detach())) for block in blocks]
    try:
        with torch.no_grad():
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [logits, *outputs]


def net_error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of logits and block outputs. Logits count from the mean of the exact ones: that of a
    random net is one large constant, beside which every error would look small."""
    mean = exact[0].mean()
    centred = [outputs[0].double() - mean, *outputs[1:]]
    return relative_error(centred, [exact[0] - mean, *exact[1:]])


@contextlib.contextmanager
def near_ties(model: nn.Module) -> Iterator[list[float]]:
    """Collects for each round of each `fk.ICM` that runs the smallest distance between a token's two best cosines."""
    gaps: list[float] = []

    def watch(icm: fk.ICM, args: tuple[Tensor, ...]) -> None:
        tokens, hw = args[0].flatten(2).transpose(1, 2), tuple(args[0].shape[2:])
        rounds: list[Any] = list(icm.rounds)
        for turn, (projections, grid) in enumerate(zip(rounds, icm.grids, strict=True)):
            keys, values = projections.key(tokens), projections.value(tokens)
            if grid[0] * grid[1] > 1:
                pooled = F.adaptive_avg_pool2d(keys.transpose(1, 2).unflatten(2, hw), grid)
                best = baselines.cosines(keys, pooled.flatten(2).transpose(1, 2)).topk(2, dim=-1).values
                gaps.append(float((best[..., 0] - best[..., 1]).min()))
            options: dict[str, Any] = (
                {"aggregate": "count", "alpha": icm.alpha}
                if icm.variant == "paper"
                else {"aggregate": "similarity", "alpha": icm.alpha[turn], "beta": icm.beta[turn]}
            )
            tokens, hw = fk.reference.cluster(keys, values, grid, hw, **options).centres, tuple(grid)

    hooks = [m.register_forward_pre_hook(watch) for m in model.modules() if isinstance(m, fk.ICM)]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()


def inference(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Call:
    def call() -> tuple[Tensor]:
        with torch.no_grad(), autocast(images.device.type, dtype):
            return (model(images),)

    return call


def training_step(model: nn.Module, images: Tensor, dtype: torch.dtype, form: str) -> Call:
    """Forward, loss, backward, AdamW. With a learning rate of 0 a step costs the same, and the weights stay those that
    float64 has."""
    loss, mask = FRDLoss(form), draw_mask(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def call() -> tuple[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with autocast(images.device.type, dtype):
            logits = model(images)
        total = loss(logits, mask)["total"]
        total.backward()
        optimizer.step()
        return (total.detach(),)

    return call


def make_net(subject: Subject, model: nn.Module, setting: Setting, layout: str) -> Net:
    """A copy of the model in a layout, with its call."""
    images = subject.batch(setting.batch)[0].contiguous(memory_format=LAYOUTS[layout])
    source = copy.deepcopy(model).to(memory_format=LAYOUTS[layout])
    if setting.mode == "training step":
        call = training_step(source.train(), images, setting.dtype, subject.model.config.variant)
        return Net(source, source, layout, call)
    compiled: nn.Module = source.eval()
    if setting.execution == "compiled":
        # Dynamo gives up after a few nets that share their code.
        torch._dynamo.reset()
        compiled = cast(nn.Module, torch.compile(source, dynamic=False))
    return Net(compiled, source, layout, inference(compiled, images, setting.dtype))


def seconds_of(net: Net, device: str) -> float:
    """The fastest of three calls, after one to warm up; of slow ones, one is enough."""

    def finished() -> None:
        net.call()
        if device == "cuda":
            torch.cuda.synchronize()

    finished()
    first = timed(finished)
    return first if first > SLOW_S else min(first, timed(finished), timed(finished))


def build_nets(subject: Subject, setting: Setting, layouts: dict[str, str]) -> tuple[dict[str, Net], Impls]:
    """Each net in its faster layout. `layouts` keeps the choices of a smaller batch: a pilot run of each net takes long
    on a CPU.

    Raises:
        CannotTime: no backend or no baseline can be built.
    """
    image = torch.empty(1, 3, subject.size, subject.size, device=subject.device)
    backends, contexts, left_out = own_backends(case_of(subject, setting), OPS, image)
    left_out |= dict.fromkeys(backends[setting.backends :], "not measured in this setting, to save time")
    models: dict[str, nn.Module] = dict.fromkeys(backends[: setting.backends], subject.model)
    others = baselines_of(subject.model, setting.mode == "training step")
    others = dict(list(others.items())[: 1 if setting.execution == "compiled" else setting.baselines])
    if subject.device == "cuda" and setting.baselines > 1:
        others["reference"] = subject.model
        contexts["reference"] = functools.partial(fk.use_backend, "reference")
    nets: dict[str, Net] = {}
    impls = Impls({}, {}, oracle=tuple, contexts=contexts, left_out=left_out)
    for name, model in (models | others).items():
        chosen = [layouts[name]] if name in layouts else list(LAYOUTS)
        try:
            with impls.context(name):
                found = [make_net(subject, model, setting, layout) for layout in chosen]
                nets[name] = (
                    min(found, key=lambda net: seconds_of(net, subject.device)) if found[1:] else found[0]
                )
        # Whatever a compiler or a backend raises.
        except Exception as failure:
            if list(models) == [name]:
                raise
            left_out[name] = one_line(failure)
            continue
        layouts[name] = nets[name].layout
        (impls.ours if name in models else impls.baselines)[name] = nets[name].call
    if not impls.ours or not impls.baselines:
        raise CannotTime(f"model {subject.variant}: no backend or no baseline: {left_out}")
    return nets, impls


def case_of(subject: Subject, setting: Setting) -> Case:
    """The setting in the terms of the registry."""

    def build(case: Case) -> Impls:
        raise NotImplementedError(f"{case.name}: `build_nets` builds a model's implementations")

    shape = (setting.batch, 3, subject.size, subject.size)
    mode = "forward" if setting.mode == "forward" else "forward+backward"
    return Case(f"model {subject.variant}", shape, mode, build, dtype=setting.dtype, device=subject.device)


def check(
    name: str, error: float, peer: float, dtype: torch.dtype, cap: dict[torch.dtype, float] = CAP
) -> None:
    """Raises GateError where an error of ours is over twice that of its peer, the eager net in the same layout, or over
    the cap: what the library's layers lose in that layout is not ours."""
    allowed = allowed_error(peer, dtype, cap)
    if not error <= allowed:
        raise GateError(f"{name}: relative error {error:.2e}, at most {allowed:.2e} is allowed")


def gate_nets(subject: Subject, setting: Setting, nets: dict[str, Net], impls: Impls) -> dict[str, Any]:
    """Every net's relative error: of the outputs, or in a training step of the gradients by part. Drops baselines that
    are wrong.

    Raises:
        GateError: a net of ours is over twice the first baseline in the same layout, or the cap.
    """
    training = setting.mode == "training step"
    cap = GRADIENT_CAP if training else CAP
    error = gradient_error_of(subject, setting) if training else output_error_of(subject, setting)
    errors: dict[str, Any] = {}
    for name in impls.baselines:
        with impls.context(name):
            errors[name] = error(nets[name].model, nets[name].layout)
    first = nets[next(iter(impls.baselines))].source
    for name in impls.ours:
        layout = nets[name].layout
        peer = error(copy.deepcopy(first).to(memory_format=LAYOUTS[layout]), layout)
        with poisoned(), impls.context(name):
            errors[name] = error(nets[name].model, layout)
        for part, value in errors[name].items():
            check(f"model {subject.variant}, {name}, {part}", value, peer[part], setting.dtype, cap)
    for name in list(impls.baselines):
        if not (worst := max(errors[name].values())) <= cap[setting.dtype]:
            impls.drop(name, f"relative error {worst:.2e}")
    return errors


def output_error_of(subject: Subject, setting: Setting) -> Callable[[nn.Module, str], dict[str, float]]:
    logits_only = setting.execution == "compiled"
    return lambda model, layout: {
        "outputs": subject.error(model, setting.batch, setting.dtype, layout, logits_only)
    }


def gradient_error_of(subject: Subject, setting: Setting) -> Callable[[nn.Module, str], dict[str, float]]:
    """Of all parameters of the ICMs, of the DPMs, and of the rest, each as one vector. Without the loss's edge term:
    its maxima over flat predictions jump between pixels with the last bit."""
    images, _ = subject.batch(setting.batch)
    loss, mask = FRDLoss(subject.model.config.variant, edge_weight=0.0), draw_mask(images)

    def gradients(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        with autocast(subject.device, dtype):
            logits = model(x)
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(loss(logits, mask)["total"], parameters)
        parts: dict[str, list[Tensor]] = {}
        for name, gradient in zip(names, found, strict=True):
            part = next((part for part in ("icm", "dpm") if f".{part}." in name), "rest")
            parts.setdefault(f"gradients of {part}", []).append(gradient.flatten())
        return {part: torch.cat(vectors) for part, vectors in parts.items()}

    with fk.use_backend("reference"):
        exact = gradients(subject.exact_model, images.double(), torch.float32)

    def error(model: nn.Module, layout: str) -> dict[str, float]:
        found = gradients(model, images.contiguous(memory_format=LAYOUTS[layout]), setting.dtype)
        return {part: relative_error([found[part]], [exact[part]]) for part in exact}

    return error


def measure(subject: Subject, setting: Setting, layouts: dict[str, str]) -> list[dict[str, Any]]:
    """Gate, then a record for each timing: wall clock, and for single images on a GPU, where the host limits, CUDA
    graphs too.

    Raises:
        GateError: a net of ours is wrong.
        CannotTime: none of the timings worked.
    """
    before = os.getloadavg()[0]
    nets, impls = build_nets(subject, setting, layouts)
    errors = gate_nets(subject, setting, nets, impls)
    kinds: tuple[type[Wall], ...] = (Wall,) if subject.device == "cpu" else (CudaWall,)
    if kinds == (CudaWall,) and setting == dataclasses.replace(
        setting, mode="forward", execution="eager", batch=1
    ):
        kinds = (CudaWall, CudaGraph)
    case, records = case_of(subject, setting), []
    for kind in kinds:
        timing = kind(case, impls, BUDGET_S[subject.device])
        try:
            record = compare_all(impls, timing)
        except CannotTime as reason:
            impls.left_out[kind.name] = str(reason)
            continue
        finally:
            timing.close()
        load = max(before, os.getloadavg()[0])
        record |= describe(case) | {"variant": subject.variant, "size": subject.size}
        record |= {"batch": setting.batch, "mode": setting.mode, "execution": setting.execution}
        record["name"] = f"{case.op}, {setting}, {subject.size}, {case.dtype_name}"
        record |= {"relative_errors": errors, "load": load, "quiet": load <= load_limit()}
        record["layouts"] = {name: nets[name].layout for name in impls.calls()}
        record["layout"] = record["layouts"][record["backend"]]
        names = {"ours": record["backend"], "baseline": record["baseline"]}
        record["images_per_s"] = {key: 1e3 * setting.batch / record[f"{key}_ms"]["median"] for key in names}
        if subject.device == "cuda":
            record["peak_bytes"] = {key: peak_bytes_on_gpu(impls, name) for key, name in names.items()}
        records.append(record)
    if not records:
        raise CannotTime(f"{case.op}: {impls.left_out}")
    return records


def peak_bytes_on_gpu(impls: Impls, name: str) -> int:
    """The most memory allocated at once during a call, over what was allocated before."""
    call = impls.calls()[name]
    with impls.context(name):
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes_on_cpu(
    variant: str, size: int, batch: int, layouts: dict[str, str], timeout_s: float
) -> dict[str, int]:
    """Of ours and of the first baseline, measured in a fresh process.

    Raises:
        RuntimeError: it failed, or took longer.
    """
    request = json.dumps([variant, size, batch, layouts, torch.get_num_threads()])
    command = [sys.executable, "-m", __name__, request]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"peak memory: not done after {timeout_s:.0f} s") from error
    if result.returncode:
        raise RuntimeError(f"peak memory: {(result.stderr.strip() or 'no message').splitlines()[-1]}")
    found: dict[str, int] = json.loads(result.stdout)
    return found


def probe_memory(
    variant: str, size: int, batch: int, layouts: dict[str, str], threads: int
) -> dict[str, int]:
    """By how many bytes a forward pass raises resident memory at its peak. Blocks from 64 KiB up are mapped one by one
    here, so that freed ones do not count; the allocator's caches would hide a second, smaller peak."""
    mmap_threshold, smallest_mapped = -3, 1 << 16
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, smallest_mapped)
    torch.set_num_threads(threads)
    ours = build_model(variant, **({"grids": SMALL_GRIDS} if size < SMALL_SIZE else {}))
    models = {"ours": ours, "baseline": next(iter(baselines_of(ours).values()))}
    images = torch.cat([draw_image(size, seed) for seed in range(batch)])
    found = {}
    for name, model in models.items():
        model.to(memory_format=LAYOUTS[layouts[name]])
        x = images.contiguous(memory_format=LAYOUTS[layouts[name]])
        # The first call also allocates what stays.
        for _ in range(2):
            gc.collect()
            libc.malloc_trim(0)
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before = _resident_bytes("VmRSS")
            with torch.no_grad():
                model(x)
            found[name] = max(0, _resident_bytes("VmHWM") - before)
    return found


def _resident_bytes(field: str) -> int:
    """VmRSS, or VmHWM: the maximum since the last reset."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


class Run:
    """The records of one run, its time limit, and what was left out for it. The file is written after each job."""

    def __init__(self, device: str, size: int, limit_s: float, out: pathlib.Path | None = None) -> None:
        self.end, self.out, self.device = time.monotonic() + limit_s, out, device
        self.head = frame(device) | {"size": size, "limit_s": limit_s}
        self.records: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self.red: dict[str, str] = {}

    def left(self) -> float:
        return self.end - time.monotonic()

    def attempt(self, name: str, expected_s: float, job: Callable[[], None]) -> None:
        """Runs a job if its expected time is left; whatever it raises is noted, so that the next ones still run."""
        try:
            if (left := self.left()) < expected_s:
                raise CannotTime(
                    f"needs about {expected_s:.0f} s, {max(0.0, left):.0f} s of the limit were left"
                )
            job()
        except GateError as error:
            self.red[name] = str(error)
            print(f"RED GATE, no time shown: {name}: {error}", flush=True)
        # A compiler, a backend, the machine's memory.
        except Exception as error:
            self.left_out[name] = why(error)
            print(f"left out: {name}: {self.left_out[name]}", flush=True)
        finally:
            self.save()

    def measure(self, subject: Subject, setting: Setting, layouts: dict[str, str]) -> None:
        for record in measure(subject, setting, layouts):
            self.records.append(record)
            busy = "" if record["quiet"] else f"  busy machine, load {record['load']:.1f}"
            print(
                f"{record['name']:62} {record['timing']:6} {record['ours_ms']['median']:9.2f} "
                f"{record['baseline_ms']['median']:9.2f} ms {record['ratio']:6.2f}x  "
                f"A/A {100 * record['aa_spread']:4.1f}%  {record['images_per_s']['ours']:8.2f} images/s{busy}",
                flush=True,
            )

    def save(self) -> None:
        found = {
            "load_after": list(os.getloadavg()),
            "quiet": all(record["quiet"] for record in self.records),
            "records": self.records,
            "red": self.red,
            "left_out": self.left_out,
        }
        if self.out:
            write_json(self.out, self.head | found | {"state_after": machine_state(self.device)})


def add_memory(run: Run, record: dict[str, Any]) -> None:
    """Peak memory on the CPU, to a record of the mode forward."""
    layouts = {"ours": record["layout"], "baseline": record["layouts"][record["baseline"]]}
    request = record["variant"], record["size"], record["batch"]
    record["peak_bytes"] = peak_bytes_on_cpu(*request, layouts, max(1.0, run.left()))


def run_on_cpu(
    run: Run, variants: Sequence[str], batches: Sequence[int], size: int, **overrides: Any
) -> None:
    """The first batch of every variant and its memory first, then training steps, compiled nets and larger batches, the
    shortest first, as long as time is left. Compiling a large net takes minutes on a CPU, so only `lite` is."""
    subjects = {variant: Subject(variant, size, **overrides) for variant in variants}
    layouts: dict[str, dict[str, str]] = {variant: {} for variant in subjects}

    def attempt(expected_s: float, variant: str, setting: Setting) -> None:
        kept = layouts[variant] if setting.mode == "forward" else {}
        job = functools.partial(run.measure, subjects[variant], setting, kept)
        run.attempt(f"{variant}, {setting}", expected_s, job)

    first, *larger = batches
    for variant in subjects:
        attempt(0.0, variant, Setting(first))
    rest = []
    for record in list(run.records):
        variant = record["variant"]
        seconds = 1e-3 * max(record["ours_ms"]["median"], record["baseline_ms"]["median"])
        run.attempt(f"{variant}, peak memory", 15 + 4 * seconds, functools.partial(add_memory, run, record))
        rest.append((CALLS_OF_A_STEP * seconds / first, variant, Setting(1, "training step")))
        if variant == "lite":
            rest.append((COMPILE_S + CALLS * seconds, variant, Setting(first, execution="compiled")))
        for batch in larger:
            expected_s = CALLS_OF_A_BATCH * seconds * batch / first
            rest.append((expected_s, variant, Setting(batch, baselines=1)))
    for expected_s, variant, setting in sorted(rest, key=lambda job: job[0]):
        attempt(expected_s, variant, setting)


def gpu_settings() -> Iterator[tuple[str, Setting, float]]:
    """Variant, setting and the seconds it may take, the essential ones first: bf16 autocast at batches 1, 8 and 16,
    training steps at batch 8, float32, all our backends and a compiled net once."""
    short = Setting(1, dtype=torch.bfloat16, baselines=1, backends=1)
    for variant in ("paper", "released"):
        yield variant, dataclasses.replace(short, baselines=9), 10
    for batch in (8, 16):
        for variant in ("paper", "released", "lite"):
            yield variant, dataclasses.replace(short, batch=batch), 10
    for variant in ("paper", "released", "lite"):
        yield variant, dataclasses.replace(short, batch=8, mode="training step"), 10
    yield "paper", dataclasses.replace(short, dtype=torch.float32), 8
    yield "lite", dataclasses.replace(short, baselines=9, backends=9), 40
    yield "paper", dataclasses.replace(short, execution="compiled", baselines=9), 60


def run_on_gpu(run: Run, variants: Sequence[str], size: int) -> None:
    subjects: dict[str, Subject] = {}

    def job(variant: str, setting: Setting) -> None:
        if variant not in subjects:
            subjects[variant] = Subject(variant, size, "cuda")
        run.measure(subjects[variant], setting, {})

    for variant, setting, expected_s in gpu_settings():
        if variant in variants:
            name = f"{variant}, {setting}, {setting.dtype}"
            run.attempt(name, expected_s, functools.partial(job, variant, setting))
            gc.collect()
            torch.cuda.empty_cache()


# Rows as their source gives them: the text of the figures, not numbers that were computed here.
QUOTED = [
    {
        "model": "FRD-Net, as published",
        "parameters": "39 M",
        "macs": "25.6 G",
        "source": "FRD-Net's paper (AAAI 2026), Table 2, where multiply-accumulates are called FLOPs",
    }
]


def count(size: int, variants: Sequence[str]) -> dict[str, Any]:
    """Parameters, and multiply-accumulates of one image in whole and by part, of each preset."""
    rows = []
    for variant in variants:
        model = create_model(VARIANTS[variant], preset=variant)
        macs = count_macs(model, size, size)
        rows.append({"variant": variant, "parameters": count_parameters(model), "macs": macs})
    return {"size": size, "counted": rows, "quoted": QUOTED}


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(VARIANTS)}, got {unknown[0]!r}")
    return names


def _batches(text: str) -> list[int]:
    return sorted(map(positive, text.split(",")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--variants", type=_names, default=["lite", "paper", "released"])
    parser.add_argument("--batches", type=_batches, default=[1, 8, 16], help="on the CPU; default 1,8,16")
    parser.add_argument("--size", type=positive, default=512, help="pixels of a side (default 512)")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="default 300")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (default 2)")
    parser.add_argument("--count", action="store_true", help="only count parameters and MACs")
    parser.add_argument("--out", type=pathlib.Path, help="write the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 where a correctness gate was red."""
    if options.count:
        found = count(options.size, options.variants)
        write_json(options.out, found) if options.out else print(json.dumps(found, indent=1))
        return 0
    if options.device == "cuda":
        if missing_gpu():
            return 2
        job = Run("cuda", options.size, options.limit, options.out)
        with full_float32():
            run_on_gpu(job, options.variants, options.size)
    else:
        with cpu_threads(options.threads):
            kept = keep_memory()
            job = Run("cpu", options.size, options.limit, options.out)
            job.head["memory_kept"] = kept
            run_on_cpu(job, options.variants, options.batches, options.size)
    return 1 if job.red else 0


if __name__ == "__main__":
    print(json.dumps(probe_memory(*json.loads(sys.argv[1]))))
