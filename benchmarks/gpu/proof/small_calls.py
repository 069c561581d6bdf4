"""Every public operation that has a kernel, on small and odd data: what `checks` looks into and `sanitize` runs under
NVIDIA's compute-sanitizer.

    python -m benchmarks.gpu.proof.small_calls [--backend NAME] [--only TEXT] [--until TIME] [--device cuda|cpu]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import frd_kernels as fk

from ...gate import one_line
from .small_clusters import cluster_calls, icm_calls
from .small_data import UNALIGNED, SmallCall, Source, Tensor, size

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
KINDS = ("angular", "central", "radial", "vanilla")


def pdc2d(
    kind: str, shape: tuple[int, ...], layout: str = "nchw", biased: bool = False, **options: Any
) -> SmallCall:
    """Depthwise unless `options` hold `filters`, the output channels of a dense one."""
    channels, filters = shape[1], options.pop("filters", None)
    groups = channels if filters is None else 1
    options = {"kind": kind, "padding": 1, "groups": groups} | options

    def draw(source: Source) -> list[Tensor]:
        weight = (channels, 1) if filters is None else (filters, channels)
        scale = (9 * weight[1]) ** -0.5
        drawn = [source.normal(*shape, layout=layout), source.normal(*weight, 3, 3, scale=scale)]
        return [*drawn, source.normal(weight[0])] if biased else drawn

    def function(module: Any, *inputs: Tensor) -> Any:
        return module.pdc2d(*inputs, **options)

    form, ops = ("depthwise", ("pdc2d",)) if filters is None else ("dense", ("pdc2d", "pdc_weight"))
    theta = f" theta {options['theta']}" if "theta" in options else ""
    return SmallCall(f"pdc2d {kind} {form} {layout}{theta}", size(shape), ops, draw, function)


def pdc2d_calls() -> Iterator[SmallCall]:
    for layout in ("channels_last", "nchw"):
        for kind in KINDS:
            yield pdc2d(kind, (2, 16, 9, 11), layout)
        for kind in ("central", "radial"):
            yield pdc2d(kind, (2, 16, 9, 11), layout, True, theta=0.7)
        yield pdc2d("angular", (1, 7, 5, 6), layout)
        # More than a tile holds, and ends that fill none.
        yield pdc2d("angular", (1, 72, 33, 35), layout)
        yield pdc2d("angular", (1, 3, 40, 200), layout)
        strided: dict[str, Any] = {"stride": 2, "dilation": 2, "padding": 2}
        yield pdc2d("angular", (1, 17, 17, 31), layout, True, **strided)._replace(
            family=f"pdc2d angular depthwise {layout}, stride and dilation 2"
        )
        for shape in ((1, 256, 16, 16), (8, 256, 64, 64)):
            yield pdc2d("angular", shape, layout)._replace(paper=True)
    yield pdc2d("angular", (2, 16, 9, 12), UNALIGNED)
    yield pdc2d("central", (1, 1, 1, 1))
    yield pdc2d("angular", (0, 8, 5, 6))
    for kind in KINDS[:3]:
        yield pdc2d(kind, (2, 6, 9, 11), filters=8)


def pdc_weight(kind: str, shape: tuple[int, ...]) -> SmallCall:
    def draw(source: Source) -> list[Tensor]:
        return [source.normal(*shape)]

    def function(module: Any, weight: Tensor) -> Any:
        return module.pdc_weight(weight, kind=kind)

    return SmallCall(f"pdc_weight {kind}", size(shape), ("pdc_weight",), draw, function)


def weight_calls() -> Iterator[SmallCall]:
    for kind in KINDS[:3]:
        yield pdc_weight(kind, (8, 6, 3, 3))
        yield pdc_weight(kind, (40, 33, 3, 3))
        yield pdc_weight(kind, (256, 256, 3, 3))._replace(paper=True)


def pdc_block(
    kind: str,
    shape: tuple[int, ...],
    filters: int = 0,
    layout: str = "nchw",
    own: bool = False,
    complete: bool = False,
    dense: bool = False,
    **options: Any,
) -> SmallCall:
    """own: adds x itself, as FRD-Net's detail branch does; complete: another residual, and both biases."""
    channels, filters = shape[1], filters or shape[1]

    def draw(source: Source) -> list[Tensor]:
        # Numbers of few bits: no hidden value is so near 0 that rounding decides whether the ReLU lets it through.
        columns = channels if dense else 1
        drawn = [
            source.normal(*shape, step=1 / 8, layout=layout),
            source.normal(channels, columns, 3, 3, scale=1 / 3, step=1 / 8),
            source.normal(filters, channels, 1, 1, scale=channels**-0.5, step=1 / 32),
        ]
        if complete:
            step = options.get("stride", 1)
            out = [(extent - 1) // step + 1 for extent in shape[2:]]
            drawn += [source.normal(shape[0], filters, *out, layout=layout)]
            drawn += [source.normal(channels, step=1 / 8), source.normal(filters)]
        return drawn

    def function(module: Any, x: Tensor, taps: Tensor, point: Tensor, *rest: Tensor) -> Any:
        named = dict(zip(("residual", "pdc_bias", "point_bias"), [x] if own else rest, strict=False))
        return module.pdc_block(x, taps, point, kind=kind, **named, **options)

    form = "dense" if dense else "depthwise"
    ops = ("pdc_block", "pdc2d", "pdc_weight") if dense else ("pdc_block",)
    family = f"pdc_block {kind} {form} {layout}{', x added' if own else ''}"
    name = size(shape) + (f" to {filters}" if filters != channels else "")
    return SmallCall(family, name, ops, draw, function, backward=not dense)


def block_calls() -> Iterator[SmallCall]:
    for layout in ("channels_last", "nchw"):
        yield pdc_block("angular", (1, 64, 9, 11), 0, layout, own=True)
        yield pdc_block("central", (2, 32, 16, 16), 0, layout)
        yield pdc_block("radial", (1, 40, 7, 5), 24, layout, complete=True, stride=2, dilation=2)
        # As many pixels as an H100's medium and large tiles want.
        yield pdc_block("angular", (7, 128, 32, 32), 0, layout, own=True)
        yield pdc_block("angular", (13, 136, 32, 32), 0, layout, own=True)
        for shape in ((1, 256, 16, 16), (8, 256, 64, 64)):
            yield pdc_block("angular", shape, 0, layout, own=True)._replace(paper=True)
    yield pdc_block("angular", (2, 20, 10, 12), 12, UNALIGNED)
    yield pdc_block("central", (1, 400, 3, 3), 6)
    yield pdc_block("central", (1, 1, 1, 1))
    yield pdc_block("central", (0, 16, 5, 6))
    for layout, channels in (("channels_last", 64), ("nchw", 128)):
        yield pdc_block("angular", (1, channels, 9, 11), 0, layout, dense=True)


def all_calls(only: str = "") -> list[SmallCall]:
    """Those whose name holds `only`. What has a gradient comes with it; `forward()` is the call without."""
    families = (weight_calls, pdc2d_calls, block_calls, cluster_calls, icm_calls)
    return [call for calls in families for call in calls() if only in call.name]


def firsts(calls: Sequence[SmallCall]) -> list[SmallCall]:
    """One of each family."""
    found: dict[str, SmallCall] = {}
    for call in calls:
        found.setdefault(call.family, call)
    return list(found.values())


def run_once(call: SmallCall, device: str, dtype: torch.dtype) -> str:
    """'' or what is wrong; every element of every result is read."""
    found = [tensor.cpu() for tensor in call.build(device, dtype).call()]
    return "" if all(bool(torch.isfinite(tensor).all()) for tensor in found) else "a result is not finite"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a call failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.proof.small_calls", description=__doc__)
    parser.add_argument("--backend", default=None, help="default: cuda on a GPU, else cpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="the calls whose name holds this text")
    parser.add_argument("--own", action="store_true", help="only operations without a product of cuDNN's")
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="the time.time() to begin no call after"
    )
    options = parser.parse_args(argv)
    calls = [call for call in all_calls(options.only) if not call.paper]
    calls = [call for call in calls if not (options.own and " dense " in call.family)]
    wanted = [(call, dtype) for dtype in DTYPES for call in firsts(calls)]
    wanted += [(call, dtype) for dtype in DTYPES for call in calls if (call, dtype) not in wanted]
    done = failed = 0
    with fk.use_backend(options.backend or options.device):
        for call, dtype in wanted:
            if time.time() > options.until:
                break
            print(f"{call.name} {str(dtype).removeprefix('torch.')}", flush=True)
            try:
                problem = run_once(call, options.device, dtype)
            except Exception as error:  # the next call may still tell something
                problem = one_line(error)
            if problem:
                print(f"FAILED: {problem}", flush=True)
            done, failed = done + 1, failed + bool(problem)
    print(f"small calls: {done} of {len(wanted)} run, {failed} failed", flush=True)
    return int(failed > 0 or done == 0)


if __name__ == "__main__":
    sys.exit(main())
