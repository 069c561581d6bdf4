"""What the machine itself can do: copy bandwidth, matrix rate, a launch. `python -m benchmarks.calibrate [--device]`"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from .clock import machine_state
from .cuda import full_float32
from .timing import summarise, timed, warm_up

MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns
COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes read, and as many written
LAUNCHES = 200


@dataclasses.dataclass(frozen=True)
class Rates:
    copy_bytes_per_s: float
    matrix_flops_per_s: dict[str, float]  # by the name of a dtype


def rates(calibration: dict[str, Any]) -> Rates:
    """What the floors need of a calibration."""
    matrix = {name: entry["flops_per_s"] for name, entry in calibration["matrix"].items()}
    return Rates(calibration["copy"]["bytes_per_s"], matrix)


def calibrate(device: str, scale: float = 1.0, repeats: int = 10) -> dict[str, Any]:
    """Measures `device`, "cpu" with the threads that torch has now; `scale` shrinks what is measured on."""
    seconds = _seconds_of(device)
    size = max(16, round(MATRIX[device] * scale))
    dtypes = {"float32": torch.float32}
    if device == "cuda":
        dtypes |= {"bfloat16": torch.bfloat16, "float16": torch.float16}
    found = {
        "device": device,
        "before": machine_state(device),
        "copy": _copy(device, max(1 << 12, round(COPIED[device] * scale)), seconds, repeats),
        "matrix": {name: _matrix(device, size, dtype, seconds, repeats) for name, dtype in dtypes.items()},
    }
    if device == "cuda":
        found["launch"] = launch_costs(repeats)
    return found | {"after": machine_state(device)}


def _seconds_of(device: str) -> Callable[[Callable[[], object]], float]:
    if device == "cpu":
        return timed
    from .cuda import event_seconds

    return event_seconds


def _copy(device: str, size: int, seconds: Any, repeats: int) -> dict[str, Any]:
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    call = lambda: target.copy_(source)  # noqa: E731
    times = _times(call, seconds, repeats)
    moved = 2 * source.numel() * 4
    return {"bytes": moved, "ms": times, "bytes_per_s": 1e3 * moved / times["median"]}


def _matrix(device: str, size: int, dtype: torch.dtype, seconds: Any, repeats: int) -> dict[str, Any]:
    """float32 is float32: TF32 is off."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    with full_float32():
        times = _times(lambda: torch.mm(left, right, out=out), seconds, repeats)
    flops = 2 * size**3
    return {"size": size, "ms": times, "flops_per_s": 1e3 * flops / times["median"]}


def _times(call: Callable[[], object], seconds: Any, repeats: int) -> dict[str, float]:
    warm_up(call, 3)
    return dataclasses.asdict(summarise([seconds(call) for _ in range(repeats)]))


def launch_costs(repeats: int) -> dict[str, Any]:
    """An empty kernel as a node of a graph, and launched by the host one after the other."""
    from .cuda import empty_graph, event_seconds

    empty = lambda: torch.cuda._sleep(0)  # noqa: E731
    graph = empty_graph(empty, LAUNCHES)

    def launched() -> None:
        for _ in range(LAUNCHES):
            empty()
        torch.cuda.synchronize()

    return {
        "launches": LAUNCHES,
        "graph_ms": _times(graph.replay, event_seconds, repeats),
        "wall_ms": _times(launched, timed, repeats),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints the calibration as JSON. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate", description=__doc__)
    parser.add_argument("--device", choices=tuple(MATRIX), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(json.dumps(calibrate(options.device), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
