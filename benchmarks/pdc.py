"""Pixel difference convolution, depthwise and dense, and its weight transform, against the eager form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import frd_kernels as fk

from . import eager
from .cases import MODES, Case, Providers, normal, with_gradients
from .providers import eager_forms, folded_rivals, providers

# The depthwise layers of FRD-Net (16x16 at a photo of 512x512), and a larger map.
SHAPES = ((4, 256, 16, 16), (1, 256, 64, 64))
DENSE, SMALL, WEIGHT = (4, 64, 64, 64), (4, 64, 16, 16), (256, 256, 3, 3)
LAYOUTS = ("nchw", "channels_last")
GPU_SMALL, GPU_LARGE = (16, 256, 16, 16), (8, 256, 64, 64)
MEAN = 8.0  # of images with a large mean, in standard deviations
KINDS = ("angular", "central", "radial")


def build_conv(case: Case, *, kind: str, depthwise: bool) -> Providers:
    """padding 1, no bias: the layers of PiDiNet and FRD-Net."""
    channels = case.shape[1]
    groups = channels if depthwise else 1
    x = normal(case.shape, case, seed=1, mean=case.mean)
    weight = normal((channels, channels // groups, 3, 3), case, seed=2, scale=(9 * channels / groups) ** -0.5)
    options: dict[str, Any] = {"kind": kind, "padding": 1, "groups": groups}
    sides = providers(
        case,
        inputs=(x, weight),
        ours=lambda x, w: fk.pdc2d(x, w, **options),
        rivals=eager_forms(case, functools.partial(eager.PDC[kind], groups=groups), kind),
        reference=lambda x, w: fk.reference.pdc2d(x, w, **options),
        ops=("pdc2d",) if depthwise else ("pdc2d", "pdc_weight"),
    )
    if kind == "vanilla":
        return sides
    if not case.backward:
        sides.rivals.update(folded_rivals(case, x, eager.folded(weight, kind, groups)))
    grad = normal(case.shape, case, seed=0) if case.backward else None
    plain = functools.partial(F.conv2d, padding=1, groups=groups)
    sides.floors["plain F.conv2d"] = with_gradients(plain, (x, weight), grad, case.mode)
    return sides


def build_weight(case: Case, *, kind: str) -> Providers:
    return providers(
        case,
        inputs=(normal(case.shape, case, seed=1),),
        ours=lambda w: fk.pdc_weight(w, kind=kind),
        rivals=eager_forms(case, eager.WEIGHT[kind], kind),
        reference=lambda w: fk.reference.pdc_weight(w, kind=kind),
        ops=("pdc_weight",),
        convolves=False,
    )


def target(kind: str, layout: str, mode: str) -> float | None:
    """Of a depthwise layer in float32 on the CPU."""
    if mode == "forward+backward":
        return 2.0
    forward = {"angular": 1.5 if layout == "nchw" else 1.0, "central": 2.0}
    return forward.get(kind)


def depthwise(kind: str) -> functools.partial[Providers]:
    return functools.partial(build_conv, kind=kind, depthwise=True)


def depthwise_cases() -> Iterator[Case]:
    for kind in KINDS:
        build, op = depthwise(kind), f"pdc {kind} depthwise"
        for mode in MODES:
            for shape in SHAPES:
                for layout in LAYOUTS:
                    goal = target(kind, layout, mode)
                    chosen = (shape, layout) == (SHAPES[0], "nchw") and kind != "radial"
                    short = chosen and mode == "forward"
                    compiled = _compiled(kind, mode) if chosen else ()
                    yield Case(op, shape, mode, build, layout, target=goal, short=short, compiled=compiled)
            if kind != "radial":
                sixteen = Case(op, SMALL, mode, build, "channels_last", torch.bfloat16)
                yield sixteen
                yield dataclasses.replace(sixteen, mean=MEAN)
        yield Case(op, SMALL, "forward", build, mean=MEAN)
    for layout in LAYOUTS:
        yield Case("pdc vanilla depthwise", SHAPES[1], "forward", depthwise("vanilla"), layout)


def _compiled(kind: str, mode: str) -> tuple[str, ...]:
    if kind == "angular" and mode == "forward":
        return ("default", "max-autotune")
    return ("default",)


def dense_cases() -> Iterator[Case]:
    for kind in ("angular", "central"):
        build = functools.partial(build_conv, kind=kind, depthwise=False)
        for mode in MODES:
            for layout in LAYOUTS:
                compiled = ("default",) if kind == "angular" and layout == "nchw" else ()
                yield Case(f"pdc {kind} dense", DENSE, mode, build, layout, compiled=compiled)


def weight_cases(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    for kind in eager.WEIGHT:
        build = functools.partial(build_weight, kind=kind)
        for mode in MODES:
            first = kind == "angular" and mode == "forward"
            compiled = ("default",) if first else ()
            yield Case(
                f"pdc_weight {kind}",
                WEIGHT,
                mode,
                build,
                dtype=dtype,
                device=device,
                compiled=compiled,
                short=first and device == "cuda",
            )


def gpu_cases() -> Iterator[Case]:
    """In bfloat16 unless said, the essential ones first: a run may be cut."""
    for kind in KINDS:
        case = Case(
            f"pdc {kind} depthwise", GPU_LARGE, MODES[0], depthwise(kind), dtype=torch.bfloat16, device="cuda"
        )
        for mode in MODES:
            short = kind != "radial"
            compiled = _compiled(kind, mode) if short else ()
            large = dataclasses.replace(case, mode=mode, layout="channels_last")
            yield dataclasses.replace(large, short=short, compiled=compiled)
            yield dataclasses.replace(large, shape=GPU_SMALL, short=kind == "angular")
            yield dataclasses.replace(case, mode=mode)
            if short:
                yield dataclasses.replace(large, mean=MEAN, short=kind == "angular" and mode == "forward")
        for dtype in (torch.float32, torch.float16):
            yield dataclasses.replace(case, layout="channels_last", dtype=dtype)
    yield from dense_gpu_cases()
    for case in weight_cases("cuda", torch.bfloat16):
        if case.short or case.op == "pdc_weight radial":
            yield case


def dense_gpu_cases() -> Iterator[Case]:
    """The library's convolution of a kernel that one launch of ours makes."""
    build = functools.partial(build_conv, kind="angular", depthwise=False)
    case = Case(
        "pdc angular dense", GPU_LARGE, MODES[0], build, "channels_last", torch.bfloat16, device="cuda"
    )
    for mode in MODES:
        yield dataclasses.replace(case, mode=mode)
    yield dataclasses.replace(case, shape=(1, *GPU_SMALL[1:]))
    yield dataclasses.replace(case, layout="nchw")


CASES = [*depthwise_cases(), *dense_cases(), *weight_cases()]
GPU_CASES = list(gpu_cases())
