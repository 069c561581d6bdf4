"""What a result file says of the machine: hardware, versions, load, git revision; and settings of the process.

Imports frd_kernels and torch only inside functions: the GPU command reads the revision before the library is built.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Set where the tree is a copy without its history.
REVISION = "FRD_REVISION"

# nvidia-smi's name of a figure -> ours, units included.
GPU_FIGURES = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "sm_clock_max_mhz",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "utilization.gpu": "utilization_percent",
    "driver_version": "driver",
}


def revision() -> str:
    """FRD_REVISION, else the git revision of this checkout, with "+" where tracked files differ; "unknown" outside of
    one."""
    if given := os.environ.get(REVISION):
        return given
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def gpu_state() -> dict[str, Any]:
    """Name, memory, clocks, temperature and power of the GPU as its driver reports them; changes no setting."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    state: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    return state | _nvidia_smi(str(properties.uuid))


def _nvidia_smi(uuid: str) -> dict[str, Any]:
    """Empty where the program is missing or does not answer."""
    query = [f"--query-gpu={','.join(GPU_FIGURES)}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    try:
        answer = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    if answer.returncode or len(values) != len(GPU_FIGURES):
        return {}
    return dict(zip(GPU_FIGURES.values(), map(_number, values), strict=True))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def machine_state(device: str = "cpu") -> dict[str, Any]:
    """What changes during a run: the load, and on CUDA the GPU's clocks, temperature and power."""
    state: dict[str, Any] = {"when": now(), "load": list(os.getloadavg())}
    return state | {"gpu": gpu_state()} if device == "cuda" else state


def missing_gpu() -> bool:
    """Says so in one line."""
    import torch

    if torch.cuda.is_available():
        return False
    print("benchmarks: torch sees no GPU on this machine", file=sys.stderr)
    return True


def positive(text: str) -> int:
    """An argument of the commands."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def load_limit() -> float:
    """The load average above which something else was running: our own threads add up to their number."""
    import torch

    return torch.get_num_threads() + 0.2


def frame(device: str) -> dict[str, Any]:
    """The head of a result file: when, on what, and under what load. To be called with the threads set that are
    measured with."""
    import torch

    from frd_kernels.info import collect

    return {
        "when": now(),
        "revision": revision(),
        "device": device,
        "threads": torch.get_num_threads(),
        "load_before": list(os.getloadavg()),
        "load_limit": load_limit(),
        "machine": collect(),
        "state_before": machine_state(device),
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write_json(path: pathlib.Path, value: Any) -> None:
    """The old file stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """An empty dictionary where there is no such file."""
    value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return value


def append_line(path: pathlib.Path, **value: Any) -> None:
    """One JSON object as a line, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # After a line that a killed process left incomplete.
        if file.tell() and path.read_bytes()[-1:] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: pathlib.Path | None) -> list[dict[str, Any]]:
    """The complete lines of such a file, if there is one: a line that a killed process was writing is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path and path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_memory() -> bool:
    """Makes glibc keep freed memory instead of giving it back to the kernel; False with another allocator.

    Otherwise a result of some megabytes is paged in anew at each call, which takes longer than many a kernel, ours or
    the baseline's, and says nothing about either. jemalloc and tcmalloc, which PyTorch's tuning guide recommends, keep
    it too.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    never, limit = -1, (1 << 31) - 1
    return bool(mallopt(trim_threshold, never) and mallopt(mmap_threshold, limit))
