"""Peak memory of a net on the CPU, taken in a process of its own: `python -m benchmarks.model_memory --help`.

Memory is what the kernel has mapped for the process. Blocks from 64 KiB up are mapped and unmapped one by one here, so
that what was freed does not count; the allocator's usual caches would hide a second, smaller peak behind the first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import pathlib
import subprocess
import sys
from typing import Any

import torch

from .cases import LAYOUTS
from .launch import module_command
from .model_sides import build_model, draw_image, rivals_of

STATUS = pathlib.Path("/proc/self/status")
RESET = pathlib.Path("/proc/self/clear_refs")
RESET_PEAK = "5"
M_MMAP_THRESHOLD, SMALLEST_MAPPED = -3, 1 << 16


def resident_bytes(field: str) -> int:
    """VmRSS, or VmHWM: the most since the last reset."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{STATUS} has no {field}")


def growth_of(model: torch.nn.Module, images: torch.Tensor) -> int:
    """By how many bytes a forward pass raises resident memory at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text(RESET_PEAK)
    before = resident_bytes("VmRSS")
    with torch.no_grad():
        model(images)
    return max(0, resident_bytes("VmHWM") - before)


def probe(variant: str, size: int, batches: list[int], layouts: dict[str, str]) -> dict[str, dict[str, int]]:
    """Batch -> bytes of ours and of the headline rival, in their layouts. To be called in a fresh process."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALLEST_MAPPED)
    ours = build_model(variant)
    sides: dict[str, torch.nn.Module] = {"ours": ours, "rival": next(iter(rivals_of(ours).values()))}
    found: dict[str, dict[str, int]] = {}
    for name, model in sides.items():
        memory_format = LAYOUTS[layouts[name]]
        model.to(memory_format=memory_format)
        for batch in [batches[0], *batches]:  # the first call also allocates what stays
            images = torch.cat([draw_image(size, seed) for seed in range(batch)])
            images = images.contiguous(memory_format=memory_format)
            found.setdefault(str(batch), {})[name] = growth_of(model, images)
    return found


def measure(
    variant: str, size: int, batches: list[int], layouts: dict[str, str], timeout_s: float
) -> dict[str, dict[str, int]]:
    """`probe` in a fresh process.

    Raises:
        RuntimeError: it failed, or took longer.
    """
    command = [*module_command("model_memory"), variant, str(size)]
    command += [
        "--batches",
        ",".join(map(str, batches)),
        "--ours",
        layouts["ours"],
        "--rival",
        layouts["rival"],
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"peak memory: not done after {timeout_s:.0f} s") from error
    if result.returncode:
        raise RuntimeError(f"peak memory: {(result.stderr.strip() or 'no message').splitlines()[-1]}")
    found: dict[str, dict[str, int]] = json.loads(result.stdout)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.model_memory", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("variant")
    parser.add_argument("size", type=int)
    parser.add_argument("--batches", default="1")
    parser.add_argument("--ours", default="nchw", choices=LAYOUTS)
    parser.add_argument("--rival", default="nchw", choices=LAYOUTS)
    parser.add_argument("--threads", type=int, default=2)
    options: Any = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    batches = [int(text) for text in options.batches.split(",")]
    layouts = {"ours": options.ours, "rival": options.rival}
    print(json.dumps(probe(options.variant, options.size, batches, layouts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
