"""Pixel difference convolution, depthwise and dense, and its weight transform, against the eager form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import frd_kernels as fk

from . import baselines
from .registry import (
    LAYOUTS,
    MODES,
    Case,
    Impls,
    build_impls,
    eager_forms,
    folded_forms,
    normal,
    with_gradients,
)

# The depthwise layers of FRD-Net (maps of 16x16 for a photo of 512x512), and a larger map.
SHAPES = ((4, 256, 16, 16), (1, 256, 64, 64))
DENSE, SMALL, WEIGHT = (4, 64, 64, 64), (4, 64, 16, 16), (256, 256, 3, 3)
GPU_SMALL, GPU_LARGE = (16, 256, 16, 16), (8, 256, 64, 64)
# Of images with a large mean, in standard deviations.
MEAN = 8.0
KINDS = ("angular", "central", "radial")


def build_conv(case: Case, *, kind: str, depthwise: bool) -> Impls:
    """padding 1, no bias: the layers of PiDiNet and FRD-Net."""
    channels = case.shape[1]
    groups = channels if depthwise else 1
    x = normal(case.shape, case, seed=1, mean=case.mean)
    weight = normal((channels, channels // groups, 3, 3), case, seed=2, scale=(9 * channels / groups) ** -0.5)
    options: dict[str, Any] = {"kind": kind, "padding": 1, "groups": groups}
    impls = build_impls(
        case,
        inputs=(x, weight),
        ours=lambda x, w: fk.pdc2d(x, w, **options),
        baselines=eager_forms(case, functools.partial(baselines.PDC[kind], groups=groups), kind),
        reference=lambda x, w: fk.reference.pdc2d(x, w, **options),
        ops=("pdc2d",) if depthwise else ("pdc2d", "pdc_weight"),
    )
    if kind == "vanilla":
        return impls
    if not case.backward:
        impls.baselines.update(folded_forms(case, x, baselines.folded(weight, kind, groups)))
    grad = normal(case.shape, case, seed=0) if case.backward else None
    plain = functools.partial(F.conv2d, padding=1, groups=groups)
    impls.lower_bounds["plain F.conv2d"] = with_gradients(plain, (x, weight), grad, case.mode)
    return impls


def build_weight(case: Case, *, kind: str) -> Impls:
    return build_impls(
        case,
        inputs=(normal(case.shape, case, seed=1),),
        ours=lambda w: fk.pdc_weight(w, kind=kind),
        baselines=eager_forms(case, baselines.WEIGHT[kind], kind),
        reference=lambda w: fk.reference.pdc_weight(w, kind=kind),
        ops=("pdc_weight",),
        convolves=False,
    )


def depthwise(kind: str) -> functools.partial[Impls]:
    return functools.partial(build_conv, kind=kind, depthwise=True)


def depthwise_cases() -> Iterator[Case]:
    for kind in KINDS:
        build, op = depthwise(kind), f"pdc {kind} depthwise"
        for mode in MODES:
            for shape in SHAPES:
                for layout in LAYOUTS:
                    chosen = (shape, layout) == (SHAPES[0], "nchw") and kind != "radial"
                    quick = chosen and mode == "forward"
                    compiled = _compiled(kind, mode) if chosen else ()
                    yield Case(op, shape, mode, build, layout, quick=quick, compiled=compiled)
            if kind != "radial":
                half = Case(op, SMALL, mode, build, "channels_last", torch.bfloat16)
                yield half
                yield dataclasses.replace(half, mean=MEAN)
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
    for kind in baselines.WEIGHT:
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
                quick=first and device == "cuda",
            )


def gpu_cases() -> Iterator[Case]:
    """In bfloat16 unless said, the essential ones first: a run may be cut."""
    for kind in KINDS:
        case = Case(
            f"pdc {kind} depthwise", GPU_LARGE, MODES[0], depthwise(kind), dtype=torch.bfloat16, device="cuda"
        )
        for mode in MODES:
            quick = kind != "radial"
            compiled = _compiled(kind, mode) if quick else ()
            large = dataclasses.replace(case, mode=mode, layout="channels_last")
            yield dataclasses.replace(large, quick=quick, compiled=compiled)
            yield dataclasses.replace(large, shape=GPU_SMALL, quick=kind == "angular")
            yield dataclasses.replace(case, mode=mode)
            if quick:
                yield dataclasses.replace(large, mean=MEAN, quick=kind == "angular" and mode == "forward")
        for dtype in (torch.float32, torch.float16):
            yield dataclasses.replace(case, layout="channels_last", dtype=dtype)
    yield from dense_gpu_cases()
    for case in weight_cases("cuda", torch.bfloat16):
        if case.quick or case.op == "pdc_weight radial":
            yield case


def dense_gpu_cases() -> Iterator[Case]:
    """The library's convolution with a kernel that one launch of ours computes."""
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
