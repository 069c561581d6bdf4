"""What a GPU may get wrong though the results are right once: equal bits in every run, on another stream, from a CUDA
graph with old and new data, and no memory kept. Writes JSON after every call, those of the CUDA kernels first.

    python -m benchmarks.gpu.proof.checks --out FILE.json [--only TEXT] [--limit SECONDS] [--device cuda|cpu]
"""

from __future__ import annotations

import argparse
import gc
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

import frd_kernels as fk

from ...cuda import WARM_UPS, capturing, full_float32, side_stream
from ...gate import CAP, CAP_OF_GRADIENTS, one_line, poisoned, relative_error
from ...launch import module_command
from ..worker import usable
from .checks_report import OK, Key, Report
from .small_calls import DTYPES, all_calls, firsts
from .small_data import Built, SmallCall

Tensors = Sequence[torch.Tensor]
Item = tuple[str, SmallCall, torch.dtype]  # backend, call, dtype
REPEATS = 20
SHARE = 0.7  # of the time that those of Triton, each of which has to be compiled, leave to the others
SPINS = (20_000_000, 200_000_000)  # cycles for which the default stream is busy: 10 and 100 ms at 2 GHz
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def same_bits(found: Tensors, expected: Tensors) -> str:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {index} is {list(a.shape)} {a.dtype}, not {list(b.shape)} {b.dtype}"
        different = a.view(INTEGERS[a.element_size()]) != b.view(INTEGERS[b.element_size()])
        if count := int(different.sum()):
            return f"result {index} of {len(found)} has other bits in {count} of {a.numel()} elements"
    return OK


def first_problem(outcomes: Iterable[str]) -> str:
    return next((outcome for outcome in outcomes if outcome != OK), OK)


def guarded(check: Callable[..., str], *arguments: Any) -> str:
    try:
        return check(*arguments)
    except Exception as error:  # the other checks may still tell something
        return one_line(error)


def repeats(built: Built) -> str:
    expected = list(built.call())
    return first_problem(same_bits(built.call(), expected) for _ in range(REPEATS))


def within(error: float, cap: float) -> str:
    return OK if error <= cap else f"relative error {error:.2e}, at most {cap:.0e} is allowed"


def another_stream(built: Built) -> str:
    """A kernel that runs on the default stream instead would come too late: that one is busy."""
    expected = list(built.call())
    stream = side_stream()
    with torch.cuda.stream(stream):
        built.call()  # takes the memory that the stream will need
    for cycles in SPINS:
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        with torch.cuda.stream(stream):
            found = [tensor.clone() for tensor in built.call()]
        stream.synchronize()
        busy = not torch.cuda.default_stream().query()
        torch.cuda.synchronize()
        if busy:
            return same_bits(found, expected)
    return "the call has waited for the default stream"


class Captured:
    """A CUDA graph of one call."""

    def __init__(self, call: Callable[[], Tensors]) -> None:
        self.graph, stream = torch.cuda.CUDAGraph(), side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                call()
            torch.cuda.synchronize()
            with capturing(self.graph):
                self.result = list(call())
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self, times: int = 1) -> Tensors:
        for tensor in self.result:
            tensor.fill_(1)  # so that what is not written is seen
        for _ in range(times):
            self.graph.replay()
        torch.cuda.synchronize()
        return self.result


def replays(captured: Captured, built: Built) -> str:
    """One, and two in a row."""
    expected = list(built.call())
    return first_problem(same_bits(captured.replay(times), expected) for times in (1, 2))


def new_data(captured: Captured, built: Built) -> str:
    """The inputs hold other numbers from here on."""
    for x, fresh in zip(built.inputs, built.fresh(1), strict=True):
        x.copy_(fresh)
    expected = list(built.call())
    return same_bits(captured.replay(), expected)


def memory(captured: Captured, _built: Built) -> str:
    captured.replay()
    before = memory_in_use()
    captured.replay(REPEATS)
    grown = [after - used for after, used in zip(memory_in_use(), before, strict=True)]
    return OK if max(grown) <= 0 else f"{REPEATS} replays keep {max(grown)} bytes"


def memory_in_use() -> tuple[int, int]:
    """Bytes of torch's tensors, and of the GPU's memory."""
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated(), total - free


def in_a_graph(built: Built) -> dict[str, str]:
    try:
        captured = Captured(built.call)
    except Exception as failure:
        torch.cuda.synchronize()
        # Ending the capture fails as well, and says less.
        return {"graph": f"cannot be captured: {one_line(failure.__context__ or failure)}"}
    try:
        checks = {"graph": replays, "new data": new_data, "memory": memory}
        return {name: guarded(check, captured, built) for name, check in checks.items()}
    finally:
        captured.graph.reset()


def examine(item: Item, device: str) -> dict[str, Any]:
    """The outcomes of all checks, each OK or what is wrong, and the relative error."""
    backend, call, dtype = item
    cap = (CAP_OF_GRADIENTS if call.backward else CAP)[dtype]
    checks: dict[str, str] = {}
    found: dict[str, Any] = {"checks": checks}
    try:
        with fk.use_backend(backend):
            built = call.build(device, dtype)
            exact = [tensor.double() for tensor in built.exact()]
            # The fill is part of the graphs as well: they have to write every element in every replay.
            with poisoned():
                error = relative_error(built.call(), exact)
                found["relative_error"] = error if math.isfinite(error) else None
                checks["accuracy"] = within(error, cap)
                checks["repeats"] = repeats(built)
                if device == "cuda":
                    checks["stream"] = guarded(another_stream, built)
                    checks |= in_a_graph(built)
    except Exception as error:  # the next call may still tell something
        checks["call"] = one_line(error)
    return found


def own_items(backend: str, calls: Sequence[SmallCall]) -> list[Item]:
    """The most telling first: a run may be cut."""
    first, paper = firsts(calls), [call for call in calls if call.paper]
    small, sixteen = [call for call in calls if not call.paper], torch.bfloat16
    items = [(backend, call, dtype) for dtype in DTYPES[:2] for call in first]
    items += [(backend, call, sixteen) for call in paper]
    items += [(backend, call, dtype) for dtype in DTYPES[:2] for call in small]
    items += [(backend, call.forward(), sixteen) for call in [*first, *paper]]
    items += [(backend, call, torch.float16) for call in first]
    return list(dict.fromkeys(items))


def items_of(device: str, calls: Sequence[SmallCall]) -> tuple[list[Item], dict[str, str]]:
    """What is to be checked, and why a backend is left out of it."""
    tensor, left_out = torch.empty(1, device=device), {}
    if device == "cpu":
        calls = [call for call in calls if not call.paper]
        left_out["stream, graph, new data, memory"] = "they need a GPU"
    items = {device: own_items(device, calls)}
    items["triton"] = [("triton", call, torch.bfloat16) for call in firsts(calls)]
    for backend in list(items):
        provider = fk.backend.PROVIDERS[backend]
        refusals = [provider.refusal(op, tensor) for call in calls for op in call.ops]
        if reason := next((refusal for refusal in refusals if refusal), None):
            left_out[backend] = reason
            del items[backend]
    return [item for found in items.values() for item in found], left_out


def run(options: argparse.Namespace) -> int:
    calls = all_calls(options.only)
    if not calls:
        print(f"left out: no call's name holds {options.only!r}", flush=True)
        return 0
    items, left_out = items_of(options.device, calls)
    report = Report(options, [key(item) for item in items], left_out)
    ends = {backend: report.end for backend, _call, _dtype in items}
    if "triton" in ends and len(ends) > 1:
        ends[options.device] -= (1 - SHARE) * options.limit
    gc.freeze()  # what importing torch left behind need not be looked at after each call
    for item in items:
        if time.monotonic() > ends[item[0]] or key(item) in report.done:
            continue
        report.start(key(item))
        record = report.running() | {"op": item[1].ops[0]} | examine(item, options.device)
        alive = usable(options.device)
        if not alive:
            record["checks"]["state"] = "the GPU's state is lost to the process"
        report.take(record)
        if not alive:
            return start_again(options, report)
    return report.finish()


def key(item: Item) -> Key:
    backend, call, dtype = item
    return backend, str(dtype).removeprefix("torch."), call.name


def start_again(options: argparse.Namespace, report: Report) -> int:
    """In a process of its own, which takes up the rest."""
    report.watchdog.cancel()
    more = ["--only", options.only, "--limit", f"{max(1.0, report.end - time.monotonic()):.0f}"]
    command = [*module_command("gpu.proof.checks"), "--out", str(options.out), "--device", options.device]
    return subprocess.call([*command, *more, "--go-on"])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.proof.checks", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file to write")
    parser.add_argument("--only", default="", help="the calls whose name holds this text")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds (default 60)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--go-on", action="store_true", help="keep what the file holds, check the rest")
    with full_float32():
        return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
