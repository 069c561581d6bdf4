"""Timing on a GPU: what users see, and what the GPU itself needs with its cache warm and cold.

All that needs a GPU, streams, events and graphs, is here.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .cases import Call, Case, Providers
from .gate import CAP, one_line, relative_error
from .timing import CannotTime, Sample, alternate, compare_samples, pair

CALLS, CALLS_OF_LARGE = 20, 4  # in a graph
LARGE = 1 << 26  # bytes of an image from which a call takes so long that few of them do
GARBAGE = 0.1  # relative difference of two runs that sums in another order do not explain, in 16 bit either
WARM_UPS = 3
BUDGET_S = 0.25  # of one comparison; five turns are taken in any case
BATCH_S = 2e-3  # a wall-clock sample lasts about as long, so that the wait at its end weighs little
SPIN_CYCLES = 400_000  # keeps the GPU busy while the host hands over what is to be timed
CYCLES_PER_S = 2e9  # of the fastest clock


class CudaWall:
    """Wall-clock seconds of a batch of calls, the wait for the GPU at its end included, over their number: the pace at
    which a program can call the operation, whether the host or the GPU is what it waits for."""

    name = "wall"

    def __init__(self, case: Case, sides: Providers) -> None:
        self.sides = sides

    def sample(self, side: str, call: Call) -> Sample:
        with self.sides.context(side):
            for _ in range(WARM_UPS):
                call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
        calls = max(1, min(20, round(BATCH_S / (time.perf_counter() - start))))

        def run() -> float:
            with self.sides.context(side):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                torch.cuda.synchronize()
                return (time.perf_counter() - start) / calls

        return run

    def compare(self, ours: Sample, other: Sample, repeats: int) -> dict[str, Any]:
        return compare_samples(ours, other, repeats, BUDGET_S)

    def close(self) -> None:
        """Nothing is held."""


class CudaGraph:
    """GPU seconds of a graph of CALLS calls, over their number: no host time, data in the cache where it fits."""

    name = "graph"

    def __init__(self, case: Case, sides: Providers) -> None:
        self.case, self.sides = case, sides
        image_bytes = math.prod(case.shape) * case.dtype.itemsize
        self.calls = CALLS if image_bytes < LARGE else CALLS_OF_LARGE
        self.stream = side_stream()
        self.pool = torch.cuda.graph_pool_handle()  # one for all graphs: they never run at the same time
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def sample(self, side: str, call: Call) -> Sample:
        return self.replays(self.capture(side, call))

    def replays(self, graph: torch.cuda.CUDAGraph) -> Sample:
        """Takes the time of one call of a captured graph. A graph of many nodes keeps the host busy for long."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        spin = max(SPIN_CYCLES, round(3 * host * CYCLES_PER_S))
        return lambda: event_seconds(graph.replay, spin) / self.calls

    def capture(self, side: str, call: Call, before: Any = None) -> torch.cuda.CUDAGraph:
        """A graph of these calls, with `before()` in front of each; its last result is checked against a call's."""
        try:
            graph, expected, result = self._record(side, call, before)
        except Exception as failure:  # whatever the library of a side does that a graph cannot hold
            torch.cuda.synchronize()
            # The allocator may still count the other pool as in use.
            self.pool = torch.cuda.graph_pool_handle()
            cause = failure.__context__ or failure  # ending the capture fails as well, and says less
            raise CannotTime(f"no CUDA graph: {one_line(cause)}") from failure
        self.graphs.append(graph)
        graph.replay()
        torch.cuda.synchronize()
        error = relative_error(result, [tensor.double() for tensor in expected])
        if not error <= (CAP[self.case.dtype] if side in self.sides.ours else GARBAGE):
            raise CannotTime(f"the CUDA graph gives another result: relative difference {error:.2e}")
        return graph

    def _record(self, side: str, call: Call, before: Any) -> tuple[torch.cuda.CUDAGraph, Any, Any]:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with self.sides.context(side), torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                expected = call()
            if before is not None:
                before()
            torch.cuda.synchronize()
            with capturing(graph, self.pool):
                for _ in range(self.calls):
                    if before is not None:
                        before()
                    result = call()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph, expected, result

    def compare(self, ours: Sample, other: Sample, repeats: int) -> dict[str, Any]:
        return compare_samples(ours, other, repeats, BUDGET_S)

    def close(self) -> None:
        torch.cuda.synchronize()
        for graph in self.graphs:
            graph.reset()
        self.graphs.clear()
        torch.cuda.empty_cache()


class ColdGraph(CudaGraph):
    """As `graph`, but before each call twice the size of the L2 cache is written. A graph of these writes alone runs in
    the same turns; its median, stated as `flush_ms`, is subtracted."""

    name = "graph, cold L2"

    def __init__(self, case: Case, sides: Providers) -> None:
        super().__init__(case, sides)
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.buffer = torch.empty(2 * l2_bytes // 4, dtype=torch.int32, device=case.device)
        self.flush_sample = self.replays(self.capture("", lambda: (), before=self.flush))

    def flush(self) -> None:
        self.buffer.fill_(1)

    def sample(self, side: str, call: Call) -> Sample:
        return self.replays(self.capture(side, call, before=self.flush))

    def compare(self, ours: Sample, other: Sample, repeats: int) -> dict[str, Any]:
        series = {"ours": ours, "other": other, "flush": self.flush_sample}
        seconds = alternate(series, repeats, budget_s=BUDGET_S, sample=lambda take: take())
        flush = statistics.median(seconds["flush"])
        mine, others = ([s - flush for s in seconds[name]] for name in ("ours", "other"))
        if min(*mine, *others) <= 0:
            raise CannotTime(
                f"the call takes less than the writes before it vary: {1e3 * flush:.4f} ms are subtracted from "
                f"{1e3 * min(*seconds['ours'], *seconds['other']):.4f} ms"
            )
        return pair(mine, others) | {"flush_ms": 1e3 * flush}

    def close(self) -> None:
        super().close()
        del self.buffer


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """The one stream that graphs are captured on: libraries keep a workspace for each stream."""
    return torch.cuda.Stream()


def event_seconds(call: Callable[[], object], spin: int = SPIN_CYCLES) -> float:
    """GPU seconds of what `call` launches. The GPU spins first: it must not wait for the host between the events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(spin)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def empty_graph(kernel: Callable[[], object], nodes: int) -> torch.cuda.CUDAGraph:
    """A graph of `nodes` launches of a kernel that allocates nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side_stream()):
        kernel()
        torch.cuda.synchronize()
        graph.capture_begin()
        for _ in range(nodes):
            kernel()
        graph.capture_end()
    return graph


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """What is launched within becomes the graph's, on the stream that is current."""
    collecting = gc.isenabled()
    gc.disable()  # what it would free could call CUDA, which a capture does not allow
    try:
        graph.capture_begin(pool=pool)
        try:
            yield
        finally:
            graph.capture_end()
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Without TF32: float32 then means the same on both sides, to the last bits of its mantissa."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


TIMINGS = (CudaWall, CudaGraph, ColdGraph)
