"""How times are taken: wall clock, CUDA graph, CUDA graph with a cold L2 cache. Two implementations always run
interleaved in one process, A B B A A B B A ..., and ours against itself gives the noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .gate import CAP, gate, one_line, relative_error
from .machine import load_limit, machine_state
from .registry import Call, Case, Impls, lower_bounds

# Takes the time of one call, in seconds.
Sample = Callable[[], float]

WARM_UPS = 3
MIN_TURNS = 5
# Of one graph. Calls on images from LARGE bytes on take so long that few are enough.
GRAPH_CALLS, GRAPH_CALLS_LARGE, LARGE = 20, 4, 1 << 26
# Relative difference of two runs that no order of summation explains, in 16 bit either.
GARBAGE = 0.1
# A wall-clock sample on a GPU lasts about as long, so that the synchronisation at its end weighs little.
BATCH_S = 2e-3
# Keeps the GPU busy while the host submits what is to be timed.
SPIN_CYCLES = 400_000
CYCLES_PER_S = 2e9


class CannotTime(RuntimeError):
    """An implementation cannot be timed in this way, and why."""


def summarize(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds of one call."""
    ordered = sorted(1e3 * s for s in seconds)
    last = len(ordered) - 1
    p10, p90 = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    return {"minimum": ordered[0], "median": statistics.median(ordered), "p10": p10, "p90": p90}


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call that has finished when it returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def warm_up(call: Callable[[], object], calls: int = WARM_UPS, budget_s: float = 1.0) -> None:
    """At least one call, then up to `calls` while the budget lasts."""
    end = time.perf_counter() + budget_s
    for _ in range(calls):
        call()
        if time.perf_counter() > end:
            break


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's garbage collector."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def interleave(samples: dict[str, Sample], repeats: int, budget_s: float = 10.0) -> dict[str, list[float]]:
    """Seconds of each sample, `repeats` times in the order A B B A A B B A ..., so that each follows itself, with its
    data in the cache, and the other one equally often. Beyond `budget_s`, MIN_TURNS are enough."""
    for sample in samples.values():
        warm_up(sample)
    seconds: dict[str, list[float]] = {name: [] for name in samples}
    order, end = list(samples), time.perf_counter() + budget_s
    gc.collect()
    with no_collection():
        for turn in range(repeats):
            for name in order if turn % 2 == 0 else reversed(order):
                seconds[name].append(samples[name]())
            if time.perf_counter() > end and turn + 1 >= MIN_TURNS:
                break
    return seconds


def pair(ours: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The record of two series; `ratio` is the baseline's median over ours."""
    a, b = summarize(ours), summarize(baseline)
    return {"ratio": b["median"] / a["median"], "turns": len(ours), "ours_ms": a, "baseline_ms": b}


class Wall:
    """Seconds from before one call on the CPU to after it."""

    name = "wall"
    # Of one comparison.
    budget_s = 10.0

    def __init__(self, case: Case, impls: Impls, budget_s: float | None = None) -> None:
        self.case, self.impls = case, impls
        if budget_s is not None:
            self.budget_s = budget_s

    def sample(self, name: str, call: Call) -> Sample:
        """What takes the time of one call, within the settings of its implementation.

        Raises:
            CannotTime: it cannot be timed in this way.
        """

        def run() -> float:
            with self.impls.context(name):
                return timed(call)

        return run

    def compare(self, ours: Sample, baseline: Sample, repeats: int) -> dict[str, Any]:
        seconds = interleave({"ours": ours, "baseline": baseline}, repeats, self.budget_s)
        return pair(seconds["ours"], seconds["baseline"])

    def close(self) -> None:
        """Frees what the samples hold."""


class CudaWall(Wall):
    """Wall-clock seconds of a batch of calls with the synchronisation at its end, over their number: the rate at which
    a program can call the operation, be it the host or the GPU that limits it."""

    budget_s = 0.25

    def sample(self, name: str, call: Call) -> Sample:
        with self.impls.context(name):
            for _ in range(WARM_UPS):
                call()
            seconds = self._batch(call, 1)
        calls = max(1, min(20, round(BATCH_S / seconds)))

        def run() -> float:
            with self.impls.context(name):
                return self._batch(call, calls)

        return run

    @staticmethod
    def _batch(call: Call, calls: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls


class CudaGraph(Wall):
    """GPU seconds of a graph of some calls, over their number: no host time, data in the cache where it fits."""

    name = "graph"
    budget_s = 0.25

    def __init__(self, case: Case, impls: Impls, budget_s: float | None = None) -> None:
        super().__init__(case, impls, budget_s)
        image_bytes = math.prod(case.shape) * case.dtype.itemsize
        self.calls = GRAPH_CALLS if image_bytes < LARGE else GRAPH_CALLS_LARGE
        self.stream = side_stream()
        # One pool for all graphs: they never run at the same time.
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def sample(self, name: str, call: Call) -> Sample:
        return self.replays(self.capture(name, call))

    def replays(self, graph: torch.cuda.CUDAGraph) -> Sample:
        """Takes the time of one call of a captured graph. Submitting a graph of many nodes keeps the host busy, so the
        GPU has to spin for longer than that."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        spin = max(SPIN_CYCLES, round(3 * host * CYCLES_PER_S))
        return lambda: event_seconds(graph.replay, spin) / self.calls

    def capture(
        self, name: str, call: Call, before: Callable[[], object] | None = None
    ) -> torch.cuda.CUDAGraph:
        """A graph of these calls, with `before()` in front of each; the last result is checked against a plain
        call's."""
        try:
            graph, expected, result = self._record(name, call, before)
        # Whatever a library does that a graph cannot contain.
        except Exception as failure:
            torch.cuda.synchronize()
            # The allocator may still count the other pool as in use.
            self.pool = torch.cuda.graph_pool_handle()
            # Ending the capture fails as well, and says less.
            cause = failure.__context__ or failure
            raise CannotTime(f"no CUDA graph: {one_line(cause)}") from failure
        self.graphs.append(graph)
        graph.replay()
        torch.cuda.synchronize()
        error = relative_error(result, [tensor.double() for tensor in expected])
        limit = CAP.get(self.case.dtype, GARBAGE) if name in self.impls.ours else GARBAGE
        if not error <= limit:
            raise CannotTime(f"the CUDA graph gives another result: relative difference {error:.2e}")
        return graph

    def _record(
        self, name: str, call: Call, before: Callable[[], object] | None
    ) -> tuple[torch.cuda.CUDAGraph, Any, Any]:
        graph, first = torch.cuda.CUDAGraph(), before or (lambda: None)
        self.stream.wait_stream(torch.cuda.current_stream())
        with self.impls.context(name), torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                expected = call()
            first()
            torch.cuda.synchronize()
            with capturing(graph, self.pool):
                for _ in range(self.calls):
                    first()
                    result = call()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph, expected, result

    def close(self) -> None:
        torch.cuda.synchronize()
        for graph in self.graphs:
            graph.reset()
        self.graphs.clear()
        torch.cuda.empty_cache()


class ColdGraph(CudaGraph):
    """As `graph`, but before each call twice the size of the L2 cache is written. A graph of these writes alone runs in
    the same turns; its median, recorded as `flush_ms`, is subtracted."""

    name = "graph, cold L2"

    def __init__(self, case: Case, impls: Impls, budget_s: float | None = None) -> None:
        super().__init__(case, impls, budget_s)
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.buffer = torch.empty(2 * l2_bytes // 4, dtype=torch.int32, device=case.device)
        self.flush_sample = self.replays(self.capture("", tuple, before=self.flush))

    def flush(self) -> None:
        self.buffer.fill_(1)

    def sample(self, name: str, call: Call) -> Sample:
        return self.replays(self.capture(name, call, before=self.flush))

    def compare(self, ours: Sample, baseline: Sample, repeats: int) -> dict[str, Any]:
        samples = {"ours": ours, "baseline": baseline, "flush": self.flush_sample}
        seconds = interleave(samples, repeats, self.budget_s)
        return without_flush(seconds)

    def close(self) -> None:
        super().close()
        del self.buffer


def without_flush(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The record of two series, from each of which the median of "flush" is subtracted."""
    flush = statistics.median(seconds["flush"])
    ours, baseline = ([s - flush for s in seconds[name]] for name in ("ours", "baseline"))
    if min(*ours, *baseline) <= 0:
        raise CannotTime(
            f"the call takes less than the writes before it vary: {1e3 * flush:.4f} ms are subtracted from "
            f"{1e3 * min(*seconds['ours'], *seconds['baseline']):.4f} ms"
        )
    return pair(ours, baseline) | {"flush_ms": 1e3 * flush}


TIMINGS: dict[str, tuple[type[Wall], ...]] = {"cpu": (Wall,), "cuda": (CudaWall, CudaGraph, ColdGraph)}


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """The one stream that graphs are captured on: libraries keep a workspace for each stream."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """Captures what is launched within, on the current stream. Without the garbage collector: freeing a tensor could
    call CUDA, which a capture forbids."""
    with no_collection():
        graph.capture_begin(pool=pool)
        try:
            yield
        finally:
            graph.capture_end()


def event_seconds(call: Callable[[], object], spin: int = SPIN_CYCLES) -> float:
    """GPU seconds of what `call` launches. The GPU spins first: it must not wait for the host between the events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(spin)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Without TF32: float32 then means the same in every implementation, to the last bits of its mantissa."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def measure(case: Case, repeats: int = 40, calibration: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Builds the case, checks it and times it: a record, which JSON can hold, for each timing of its device.

    `aa_spread` is by how much two series of our own call differ, interleaved like a baseline's: a ratio closer to 1
    than that is no result. `quiet` is false where the load average says that something else was running. With a
    `calibration` the lower bounds include what the machine's copy and matrix rates would need.

    Raises:
        GateError: no backend of ours computes the right result.
        CannotTime: none of the timings worked.
    """
    impls = case.build(case)
    errors = gate(case, impls, drop_red=True)
    red = sorted(name for name, reason in impls.left_out.items() if reason.startswith("RED GATE"))
    records: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for kind in TIMINGS[case.device]:
        before = os.getloadavg()[0]
        timing = kind(case, impls)
        try:
            record = describe(case) | compare_all(impls, timing, repeats)
        except CannotTime as reason:
            failed[kind.name] = str(reason)
            continue
        finally:
            timing.close()
        load = max(before, os.getloadavg()[0])
        record |= {"graph_calls": getattr(timing, "calls", None), "load": load, "quiet": load <= load_limit()}
        records.append(record | {"relative_errors": errors, "red": red})
    if not records:
        raise CannotTime(f"{case.name}: {failed}")
    for record in records:
        record["left_out"] |= failed
        if calibration:
            record["lower_bounds"] |= lower_bounds(case, calibration, record["ours_ms"]["median"])
    return records


def describe(case: Case) -> dict[str, Any]:
    """The first fields of a record, also of a net's."""
    return {
        "name": case.name,
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype_name,
        "layout": case.layout,
        "mode": case.mode,
        "mean": case.mean,
        "device": case.device,
    }


def compare_all(impls: Impls, timing: Wall, repeats: int = 40) -> dict[str, Any]:
    """Our first backend against every baseline and lower bound, the other backends against the first baseline, and ours
    against itself. What `timing` cannot time is left out of this record.

    Raises:
        CannotTime: no backend or no baseline can be timed.
    """
    left_out = dict(impls.left_out)
    samples = _samples(impls, timing, left_out)
    own = [name for name in impls.ours if name in samples]
    others = [name for name in impls.baselines if name in samples]
    if not own or not others:
        raise CannotTime(f"no backend or no baseline: {left_out}")
    first, baseline = own[0], others[0]

    def compare(a: str, b: str) -> dict[str, Any]:
        return timing.compare(samples[a], samples[b], repeats)

    baselines = {baseline: compare(first, baseline)}
    spread = abs(compare(first, first)["ratio"] - 1)
    backends, bounds = {first: baselines[baseline]}, dict[str, Any]()
    for name in samples:
        if name in (first, baseline):
            continue
        try:
            if name in impls.ours:
                backends[name] = compare(name, baseline)
            else:
                (baselines if name in impls.baselines else bounds)[name] = compare(first, name)
        # Of a compiler's code, for instance: the others can still be timed.
        except Exception as failure:
            left_out[name] = why(failure)
    return {
        "timing": timing.name,
        "backend": first,
        "baseline": baseline,
        **baselines[baseline],
        "aa_spread": spread,
        "baselines": baselines,
        "backends": backends,
        "lower_bounds": bounds,
        "left_out": left_out,
    }


def _samples(impls: Impls, timing: Wall, left_out: dict[str, str]) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    for name, call in impls.calls().items():
        if timing.name not in impls.timings.get(name, (timing.name,)):
            continue
        try:
            samples[name] = timing.sample(name, call)
        except Exception as failure:
            left_out[name] = why(failure)
    return samples


def why(failure: Exception) -> str:
    return str(failure) if isinstance(failure, CannotTime) else one_line(failure)


def profile(case: Case, calls: int = 3) -> None:
    """Checks our first backend, warms it up and calls it within CUDA's profiler range, for `ncu` and `nsys`."""
    impls = case.build(dataclasses.replace(case, compiled=()))
    gate(case, impls, drop_red=True)
    name, call = next(iter(impls.ours.items()))
    with impls.context(name):
        warm_up(call)
        if case.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
        for _ in range(calls):
            call()
        if case.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()


# Rows and columns of a matrix; bytes read, and as many written; launches of an empty kernel.
MATRIX = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}
LAUNCHES = 200


def calibrate(device: str, scale: float = 1.0, repeats: int = 10) -> dict[str, Any]:
    """What the machine itself reaches: copy bandwidth, matrix products, on a GPU launches. `scale` shrinks the data."""
    seconds: Callable[[Callable[[], object]], float] = timed if device == "cpu" else event_seconds
    size = max(16, round(MATRIX[device] * scale))
    dtypes = {"float32": torch.float32}
    if device == "cuda":
        dtypes |= {"bfloat16": torch.bfloat16, "float16": torch.float16}

    def times(
        call: Callable[[], object], seconds: Callable[[Callable[[], object]], float] = seconds
    ) -> dict[str, float]:
        warm_up(call)
        return summarize([seconds(call) for _ in range(repeats)])

    found: dict[str, Any] = {"device": device, "before": machine_state(device)}
    source = torch.ones(max(1 << 10, round(COPIED[device] * scale) // 4), device=device)
    target = torch.zeros_like(source)
    moved, copy = 2 * source.nbytes, times(lambda: target.copy_(source))
    found["copy"] = {"bytes": moved, "ms": copy, "bytes_per_s": 1e3 * moved / copy["median"]}
    found["matrix"] = {}
    for name, dtype in dtypes.items():
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        with full_float32():
            product = times(functools.partial(torch.mm, left, right, out=out))
        rate = 1e3 * 2 * size**3 / product["median"]
        found["matrix"][name] = {"size": size, "ms": product, "flops_per_s": rate}
    if device == "cuda":
        graph, launched = _launches()
        found["launch"] = {
            "launches": LAUNCHES,
            "graph_ms": times(graph.replay),
            "wall_ms": times(launched, timed),
        }
    return found | {"after": machine_state(device)}


def _launches() -> tuple[torch.cuda.CUDAGraph, Callable[[], None]]:
    """An empty kernel as the nodes of a graph, and launched by the host one after the other."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side_stream()):
        torch.cuda._sleep(0)
        torch.cuda.synchronize()
        with capturing(graph):
            for _ in range(LAUNCHES):
                torch.cuda._sleep(0)

    def launched() -> None:
        for _ in range(LAUNCHES):
            torch.cuda._sleep(0)
        torch.cuda.synchronize()

    return graph, launched
