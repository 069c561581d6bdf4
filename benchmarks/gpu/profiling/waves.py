"""How the ICM's time grows with its batch, tokens and rounds: steps tell how many clusters of blocks run at once.

    python -m benchmarks.gpu.profiling.waves --out waves.json --limit 60

Needs no counters: times of a CUDA graph, each behind the gate, and what the driver says of clusters (`occupancy.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import frd_kernels as fk

from ... import cluster, conditions, eager, icm
from ...cases import MODES, Case, Providers, normal
from ...cuda import BUDGET_S, CudaGraph, full_float32
from ...gate import one_line
from ...providers import own_backends, providers
from ...timing import Wall, alternate, summarise
from ..worker import usable
from . import occupancy
from .ours import checked

BATCHES = (1, 16, 15, 14, 8, 32, 17, 12, 24, 4, 2)  # the telling ones first: a run may be cut
BATCHES_BACKWARD = (1, 16, 15, 14, 8, 32)
SIDES = {64: 8, 1024: 32, 4096: 64}  # tokens -> side of their image
REPEATS = 30


@dataclasses.dataclass(frozen=True)
class Point:
    """`value` is what changes within a group; `base` is the key of the point that it is to be compared with."""

    key: str
    group: str
    value: int
    case: Case
    base: str = ""


def points() -> Iterator[Point]:
    base = Case("icm paper", (1, 256, 16, 16), MODES[0], rounds(3), dtype=torch.bfloat16, device="cuda")
    for mode, batches in zip(MODES, (BATCHES, BATCHES_BACKWARD), strict=True):
        for batch in batches:
            case = dataclasses.replace(base, mode=mode, shape=(batch, 256, 16, 16))
            yield Point(f"{mode}, batch {batch}", f"batch, {mode}", batch, case, f"{mode}, batch 1")
    for batch in (1, 16):
        shaped, like = dataclasses.replace(base, shape=(batch, 256, 16, 16)), f"forward, batch {batch}"
        last = dataclasses.replace(shaped, layout="channels_last")
        yield Point(f"channels_last, batch {batch}", "layout", batch, last, like)
        single = dataclasses.replace(shaped, dtype=torch.float32)
        yield Point(f"float32, batch {batch}", "dtype", batch, single, like)
    for count in (1, 2):
        case = dataclasses.replace(base, build=rounds(count))
        yield Point(f"rounds {count}", "rounds", count, case, "forward, batch 1")
    for tokens, side in SIDES.items():
        shaped = dataclasses.replace(base, shape=(1, 256, side, side))
        yield Point(f"tokens {tokens}", "tokens", tokens, shaped, "forward, batch 1")
    for op, build in (("cluster", build_cluster), ("cluster_dispatch", build_dispatch)):
        for side in (16, 64):
            shape = (8, 64, side, side)
            case = Case(op, shape, MODES[0], build, dtype=torch.bfloat16, device="cuda")
            yield Point(f"{op}, {side * side} tokens", op, side * side, case, f"{op}, 256 tokens")


def rounds(count: int) -> Callable[[Case], Providers]:
    return functools.partial(build_icm, count=count)


def build_icm(case: Case, *, count: int) -> Providers:
    """The paper's ICM with its first `count` rounds alone."""
    grids = icm.GRIDS[:count]
    image, *rest = icm.data(case, "paper")

    def ours(module: Any, x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        projections, alpha, beta = icm.split(inputs)
        tokens, hw = x.flatten(2).transpose(1, 2), tuple(x.shape[2:])
        out = module.icm(tokens, projections, alpha=alpha, beta=beta, grids=grids, hw=hw)
        return out.transpose(1, 2).unflatten(2, hw)

    def rival(x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return eager.icm_dense(x, *icm.split(inputs), grids)

    return providers(
        case,
        inputs=(image, *rest[: 4 * count], *rest[-2:]),
        ours=functools.partial(ours, fk),
        rivals={"eager": rival},
        reference=functools.partial(ours, fk.reference),
        ops=("icm",),
        squared=True,
        convolves=False,
    )


def build_cluster(case: Case) -> Providers:
    """One round of clustering without the way back."""
    inputs = (*_tokens(case), *_grids(case))
    return _alone(case, lambda module, *given: module.cluster(*given, aggregate="similarity")[::2], inputs)


def build_dispatch(case: Case) -> Providers:
    """The way back without the clustering."""
    found = fk.reference.cluster(*_tokens(case), *_grids(case), aggregate="similarity")
    inputs = (found.centres, found.labels, found.similarity)
    return _alone(case, lambda module, *given: (module.dispatch(*given, channels_first=True),), inputs)


def _tokens(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, N, C] in the memory of images."""
    images = icm.clustered(case, cluster.GRIDS.get(case.shape, (2, 2))), normal(case.shape, case, seed=3)
    keys, values = (image.flatten(2).transpose(1, 2) for image in images)
    return keys, values


def _grids(case: Case) -> tuple[tuple[int, int], tuple[int, ...]]:
    return cluster.GRIDS.get(case.shape, (2, 2)), case.shape[2:]


def _alone(case: Case, call: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[Any]) -> Providers:
    """Ours against the reference in the same dtype, at inference."""
    names, contexts, left_out = own_backends(case, (case.op,), inputs[0])
    exact = [_exact(x) for x in inputs]

    def of(module: Any, given: Sequence[Any]) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return call(module, *given)

    return Providers(
        ours=dict.fromkeys(names, functools.partial(of, fk, inputs)),
        rivals={"reference": functools.partial(of, fk.reference, inputs)},
        oracle=functools.partial(of, fk.reference, exact),
        contexts=contexts,
        left_out=left_out,
    )


def _exact(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def rehearsed(point: Point) -> Point:
    """On the CPU, with a little data."""
    batch, channels, *sides = point.case.shape
    shape = (min(batch, 2), min(channels, 128), *(min(side, 16) for side in sides))
    return dataclasses.replace(point, case=dataclasses.replace(point.case, shape=shape, device="cpu"))


def measure(point: Point) -> dict[str, Any]:
    """Milliseconds of a call, of the GPU alone, and how far it is off."""
    case = point.case
    sides, side, error = checked(case)
    timing = (CudaGraph if case.device == "cuda" else Wall)(case, sides)
    try:
        series = {side: timing.sample(side, sides.ours[side])}
        seconds = alternate(series, REPEATS, budget_s=BUDGET_S, sample=lambda take: take())[side]
    finally:
        timing.close()
    found = dataclasses.asdict(summarise(seconds)) | {"turns": len(seconds)}
    return {"ms": found, "relative_error": error, "timing": timing.name}


def driver_facts(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"left_out": "there is no GPU to ask"}
    torch.zeros(1, device=device)  # makes the context that the driver is asked in
    try:
        return {"clusters": occupancy.clusters()}
    except Exception as error:  # of another package, and of the driver
        return {"left_out": one_line(error)}


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 where a point has no time, unless there was none left for it."""
    began = time.monotonic()
    end = began + options.limit
    report: dict[str, Any] = conditions.origin(options.device) | {
        "driver": driver_facts(options.device),
        "points": [],
        "left_out": [],
    }
    alive = True
    for point in points():
        if options.only not in point.key:
            continue
        if not alive or time.monotonic() > end:
            report["left_out"].append(point.key)
            continue
        point = point if options.device == "cuda" else rehearsed(point)
        record = {name: getattr(point, name) for name in ("key", "group", "value", "base")}
        record["case"] = point.case.name
        try:
            record |= measure(point)
        except Exception as error:  # the next one can be measured, if the GPU is all right
            record["problem"] = one_line(error)
        report["points"].append(record)
        alive = usable(options.device)
        report["seconds"] = round(time.monotonic() - began, 1)
        conditions.write(options.out, report)
    conditions.write(options.out, report)
    problems = [record for record in report["points"] if "problem" in record]
    done = len(report["points"]) - len(problems)
    first = f", first: {problems[0]['key']}: {problems[0]['problem'][:100]}" if problems else ""
    print(f"waves: {done} points, {len(problems)} without a time{first}, {len(report['left_out'])} left out")
    return int(bool(problems))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profiling.waves", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds, until no point is begun any more")
    parser.add_argument("--only", default="", help="the points whose key holds this text")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(argv)
    with full_float32():
        return run(options)


if __name__ == "__main__":
    sys.exit(main())
