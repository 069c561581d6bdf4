"""FRD-Net's detail branch, two PDC blocks in a row, against the eager form.

ReLU makes the gradient jump: one hidden value near zero whose sign the rounding decides would make a correct result
look wrong. So the backward pass is checked on numbers of few bits, whose hidden values no float32 sum has to round,
and the oracle rounds what passes from block to block, which has the dtype of the case on every side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import frd_kernels as fk

from . import eager
from .harness import Case, Providers, normal, providers, with_gradients
from .pdc import LAYOUTS, SHAPES, SMALL, folded_rivals

TARGETS = {"forward": 1.8, "forward+backward": 2.0}


def build_dpm(case: Case) -> Providers:
    channels = case.shape[1]
    steps = (1 / 8, 1 / 32) if case.mode == "forward+backward" else (0.0, 0.0)
    x = normal(case.shape, case, seed=1, step=steps[0])
    taps = [normal((channels, 1, 3, 3), case, seed, scale=1 / 3, step=steps[0]) for seed in (2, 3)]
    square, scale = (channels, channels, 1, 1), channels**-0.5
    points = [normal(square, case, seed, scale, step=steps[1]) for seed in (4, 5)]
    weights = (taps[0], points[0], taps[1], points[1])
    sides = providers(
        case,
        inputs=(x, *weights),
        ours=functools.partial(dpm, fk, case.dtype),
        rivals={"eager": eager.dpm},
        reference=functools.partial(dpm, fk.reference, case.dtype),
    )
    # Of a DPM this much is matrix product, in the layout in which the library runs it fastest.
    products = [x.to(memory_format=torch.channels_last), *points]
    grad = None if case.mode == "forward" else torch.ones_like(x)
    sides.floors["two 1x1 alone"] = with_gradients(two_products, products, grad, case.mode)
    if case.mode == "forward":
        sides.rivals.update(folded_rivals(case, x, eager.folded_dpm(*weights)))
    return sides


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
    for mode, target in TARGETS.items():
        for shape in SHAPES:
            for layout in LAYOUTS:
                short = (shape, layout, mode) == (SHAPES[0], "nchw", "forward")
                yield Case("dpm", shape, mode, build_dpm, layout, target=target, short=short)
        yield Case("dpm", SMALL, mode, build_dpm, "channels_last", torch.bfloat16)


CASES = list(cases())
