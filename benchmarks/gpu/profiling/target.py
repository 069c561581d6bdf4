"""One case's CUDA call for a profiler to look at, in a process of its own. Started by `profile.py`:

    ncu --profile-from-start off ... python -m benchmarks.gpu.profiling.target --case NAME
    python -m benchmarks.gpu.profiling.target --case NAME --trace FILE

The second form needs no counters: what PyTorch's profiler says of the launches (on the CPU, of our operators).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import torch

from ... import conditions, registry
from ...cases import Call, Case
from ...clock import synchronize
from ...cuda import full_float32
from ...gate import GateError
from ...timing import CannotTime
from ..worker import rehearsed, usable
from .ncu import short_name
from .ours import checked

RED = "not profiled: "  # begins the line that says why nothing was launched
WARM_UPS = 3
CALLS = 5  # in a trace


def find_case(name: str, device: str) -> Case:
    """The GPU's case of that name; on the CPU with a little data."""
    case = next((case for case in registry.cases("cuda") if case.name == name), None)
    if case is None:
        raise SystemExit(f"--case must name a registered case of the GPU, got {name!r}")
    return case if device == "cuda" else rehearsed(case)


def profile_once(call: Call) -> None:
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def trace(call: Call, device: str) -> list[dict[str, Any]]:
    """The launches of a call, by its own order; `us` is the median over CALLS calls."""
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CPU, kind.CUDA] if device == "cuda" else [kind.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(CALLS):
            call()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return launches(json.loads(path.read_text())["traceEvents"], device)


def launches(events: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """One entry for each kernel and grid; on the CPU for each of our operators."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    wanted = ("kernel", "gpu_memset", "gpu_memcpy") if device == "cuda" else ("cpu_op",)
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        if event.get("cat") in wanted and (device == "cuda" or event["name"].startswith("frd::")):
            grid = str(event.get("args", {}).get("grid", ""))
            groups.setdefault((event["name"], grid), []).append(event)
    return [_launch(name, group) for (name, _grid), group in groups.items()]


def _launch(name: str, events: list[dict[str, Any]]) -> dict[str, Any]:
    facts = events[0].get("args", {})
    names = {
        "grid": "grid",
        "block": "block",
        "registers": "registers per thread",
        "dynamic_shared_bytes": "shared memory",
    }
    found = {ours: facts[theirs] for ours, theirs in names.items() if theirs in facts}
    found |= {key: str(tuple(found[key])) for key in ("grid", "block") if key in found}
    us = statistics.median(event["dur"] for event in events)
    kernel = short_name(name) if "grid" in facts else name
    return {"kernel": kernel, "us": us, "launches": len(events) / CALLS} | found


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where our result is wrong, or the CUDA backend does not run the case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profiling.target", description=__doc__)
    parser.add_argument("--case", required=True, help="name of a registered case of the GPU")
    parser.add_argument("--trace", type=pathlib.Path, help="JSON file for what PyTorch's profiler says")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(argv)
    case = find_case(options.case, options.device)
    with full_float32():
        try:
            sides, side, error = checked(case)
        except (GateError, CannotTime) as reason:
            print(f"{RED}{reason}")
            return 1
        call, context = sides.ours[side], sides.context(side)
        del sides
        usable(options.device)  # a profiler saves all memory between passes, and the oracle took much
        with context:
            for _ in range(WARM_UPS):
                call()
            synchronize(options.device)
            if options.trace:
                conditions.write(options.trace, trace(call, options.device))
            else:
                profile_once(call)
    print(f"{case.name}: relative error {error:.2e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
