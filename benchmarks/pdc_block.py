"""FRD-Net's detail branch, two PDC blocks in a row, against the eager form.

ReLU makes the gradient jump: a hidden value near zero whose sign depends on rounding would make a correct result look
wrong. So the backward pass is checked on numbers of few bits, whose hidden values are exact in float32, and the oracle
rounds what passes from block to block, which has the dtype of the case in every implementation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import frd_kernels as fk

from . import baselines
from .pdc import GPU_LARGE, GPU_SMALL, MEAN, SHAPES, SMALL
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

GPU_SHAPES = (GPU_LARGE, (1, 256, 16, 16), GPU_SMALL, (64, 256, 64, 64))


def build_dpm(case: Case) -> Impls:
    channels = case.shape[1]
    steps = (1 / 8, 1 / 32) if case.backward else (0.0, 0.0)
    x = normal(case.shape, case, seed=1, step=steps[0], mean=case.mean)
    taps = [normal((channels, 1, 3, 3), case, seed, scale=1 / 3, step=steps[0]) for seed in (2, 3)]
    square, scale = (channels, channels, 1, 1), channels**-0.5
    points = [normal(square, case, seed, scale, step=steps[1]) for seed in (4, 5)]
    weights = (taps[0], points[0], taps[1], points[1])
    impls = build_impls(
        case,
        inputs=(x, *weights),
        ours=functools.partial(dpm, fk, case.dtype),
        baselines=eager_forms(case, baselines.dpm, "angular"),
        reference=functools.partial(dpm, fk.reference, case.dtype),
        ops=("pdc_block",),
    )
    # The matrix products of a DPM, in the layout in which the library runs them fastest.
    products = [x.to(memory_format=torch.channels_last), *points]
    grad = torch.ones_like(x) if case.backward else None
    impls.lower_bounds["two 1x1 alone"] = with_gradients(two_products, products, grad, case.mode)
    if not case.backward:
        impls.baselines.update(folded_forms(case, x, baselines.folded_dpm(*weights)))
    return impls


def build_dense(case: Case) -> Impls:
    """One block with a dense difference convolution, as PiDiNet's and DEA-Net's layers are, at inference."""
    channels = case.shape[1]
    x = normal(case.shape, case, seed=1, mean=case.mean)
    weight = normal((channels, channels, 3, 3), case, seed=2, scale=(9 * channels) ** -0.5)
    point = normal((channels, channels, 1, 1), case, seed=3, scale=channels**-0.5)
    plain = baselines.folded(weight, "angular", 1)
    impls = build_impls(
        case,
        inputs=(x, weight, point),
        ours=functools.partial(fk.pdc_block, kind="angular"),
        baselines=eager_forms(case, baselines.block, "angular"),
        reference=functools.partial(fk.reference.pdc_block, kind="angular"),
        ops=("pdc_block", "pdc2d", "pdc_weight"),
    )
    impls.baselines.update(folded_forms(case, x, lambda x: F.conv2d(F.relu(plain(x)), point)))
    alone = with_gradients(functools.partial(F.conv2d, padding=1), (x, weight), None, "forward")
    impls.lower_bounds["plain F.conv2d"] = alone
    return impls


def two_products(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return F.conv2d(F.conv2d(x, first), second)


def dpm(module: Any, dtype: torch.dtype, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """The branch by the `pdc_block` of `module`: frd_kernels, or its reference, in which it rounds to `dtype`."""
    angular_taps, angular_point, central_taps, central_point = weights
    y = module.pdc_block(x, angular_taps, angular_point, kind="angular", residual=x)
    if y.dtype != dtype:
        y = y + (y.to(dtype) - y).detach()
    return module.pdc_block(y, central_taps, central_point, kind="central")


def cases() -> Iterator[Case]:
    for mode in MODES:
        for shape in SHAPES:
            for layout in LAYOUTS:
                chosen = (shape, layout) == (SHAPES[0], "nchw")
                quick = chosen and mode == "forward"
                compiled = () if not chosen else ("default", "max-autotune") if quick else ("default",)
                yield Case("dpm", shape, mode, build_dpm, layout, quick=quick, compiled=compiled)
        half = Case("dpm", SMALL, mode, build_dpm, "channels_last", torch.bfloat16)
        yield half
    yield dataclasses.replace(half, mode="forward", mean=MEAN)
    yield Case("dpm", SMALL, "forward", build_dpm, mean=MEAN)


def gpu_cases() -> Iterator[Case]:
    """In bfloat16, the essential ones first: a run may be cut."""
    for shape in GPU_SHAPES:
        case = Case("dpm", shape, MODES[0], build_dpm, "channels_last", torch.bfloat16, device="cuda")
        for mode in MODES:
            quick = shape != GPU_SHAPES[-1] and (mode == "forward" or shape != GPU_SMALL)
            compiled: tuple[str, ...] = ("default",) if shape in GPU_SHAPES[:2] else ()
            if compiled and mode == "forward":
                compiled += ("max-autotune",)
            yield dataclasses.replace(case, mode=mode, quick=quick, compiled=compiled)
            if shape == GPU_LARGE:
                yield dataclasses.replace(case, mode=mode, layout="nchw")
    large = Case("dpm", GPU_LARGE, MODES[0], build_dpm, "channels_last", torch.bfloat16, device="cuda")
    yield dataclasses.replace(large, mean=MEAN)
    for dtype in (torch.float32, torch.float16):
        yield dataclasses.replace(large, dtype=dtype)
    dense = dataclasses.replace(large, op="pdc_block angular dense", build=build_dense)
    yield dataclasses.replace(dense, quick=True, compiled=("default", "max-autotune"))


CASES = list(cases())
GPU_CASES = list(gpu_cases())
