"""Pixel difference convolution, depthwise and dense, and its weight transform, against the eager form."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import frd_kernels as fk

from . import eager
from .harness import Call, Case, Providers, normal, providers, with_gradients

# The depthwise layers of FRD-Net (16x16 at a photo of 512x512), and a larger map.
SHAPES = ((4, 256, 16, 16), (1, 256, 64, 64))
DENSE, SMALL, WEIGHT = (4, 64, 64, 64), (4, 64, 16, 16), (256, 256, 3, 3)
LAYOUTS = ("nchw", "channels_last")


def build_conv(case: Case, *, kind: str, depthwise: bool) -> Providers:
    """padding 1, no bias: the layers of PiDiNet and FRD-Net."""
    channels = case.shape[1]
    groups = channels if depthwise else 1
    x = normal(case.shape, case, seed=1)
    weight = normal((channels, channels // groups, 3, 3), case, seed=2, scale=(9 * channels / groups) ** -0.5)
    options = {"kind": kind, "padding": 1, "groups": groups}
    sides = providers(
        case,
        inputs=(x, weight),
        ours=lambda x, w: fk.pdc2d(x, w, **options),
        rivals={"eager": lambda x, w: eager.PDC[kind](x, w, groups)},
        reference=lambda x, w: fk.reference.pdc2d(x, w, **options),
    )
    if case.mode == "forward" and kind != "vanilla":
        sides.rivals.update(folded_rivals(case, x, eager.folded(weight, kind, groups)))
    return sides


def folded_rivals(case: Case, x: torch.Tensor, call: eager.Layer) -> dict[str, Call]:
    """The converted net, forward only since its parameters are others, also in the layout that suits it best."""
    rivals = {"folded": with_gradients(call, (x,), None, "forward")}
    if case.layout == "nchw":
        converted = x.contiguous(memory_format=torch.channels_last)
        rivals["folded channels_last"] = with_gradients(call, (converted,), None, "forward")
    return rivals


def build_weight(case: Case, *, kind: str) -> Providers:
    return providers(
        case,
        inputs=(normal(case.shape, case, seed=1),),
        ours=lambda w: fk.pdc_weight(w, kind=kind),
        rivals={"eager": eager.WEIGHT[kind]},
        reference=lambda w: fk.reference.pdc_weight(w, kind=kind),
    )


def target(kind: str, layout: str, mode: str) -> float | None:
    """Of a depthwise layer in float32."""
    if mode == "forward+backward":
        return 2.0
    forward = {"angular": 1.5 if layout == "nchw" else 1.0, "central": 2.0}
    return forward.get(kind)


def depthwise_cases() -> Iterator[Case]:
    for kind in ("angular", "central", "radial"):
        build = functools.partial(build_conv, kind=kind, depthwise=True)
        for mode in ("forward", "forward+backward"):
            for shape in SHAPES:
                for layout in LAYOUTS:
                    goal = target(kind, layout, mode)
                    short = (shape, layout, mode) == (SHAPES[0], "nchw", "forward") and kind != "radial"
                    yield Case(f"pdc {kind} depthwise", shape, mode, build, layout, target=goal, short=short)
            if kind != "radial":
                yield Case(f"pdc {kind} depthwise", SMALL, mode, build, "channels_last", torch.bfloat16)
    build = functools.partial(build_conv, kind="vanilla", depthwise=True)
    for layout in LAYOUTS:
        yield Case("pdc vanilla depthwise", SHAPES[1], "forward", build, layout)


def dense_cases() -> Iterator[Case]:
    for kind in ("angular", "central"):
        build = functools.partial(build_conv, kind=kind, depthwise=False)
        for mode in ("forward", "forward+backward"):
            for layout in LAYOUTS:
                yield Case(f"pdc {kind} dense", DENSE, mode, build, layout)


def weight_cases() -> Iterator[Case]:
    for kind in eager.WEIGHT:
        for mode in ("forward", "forward+backward"):
            yield Case(f"pdc_weight {kind}", WEIGHT, mode, functools.partial(build_weight, kind=kind))


CASES = [*depthwise_cases(), *dense_cases(), *weight_cases()]
