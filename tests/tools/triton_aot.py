"""Compiles the Triton kernels ahead of time, for GPUs that this machine does not have, and prints what came out.

The launchers run on meta tensors and launch nothing: signatures, alignments, constants and tiles are those of the
real launch. `python triton_aot.py [--arch 80 90] [--only NAME ...]` prints a JSON list, by default for every
architecture. Needs no GPU; must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from frd_kernels.pdc.kinds import Kind, plain_size
from frd_kernels.pdc.triton import depthwise
from frd_kernels.pdc.triton import weight as transform
from frd_kernels.pdc_block.triton import backward, dense, forward

# Run as a script: its folder is on the path.
from triton_aot_cluster import launches as clustering_launches  # isort: skip

BIN = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
# How often each SASS instruction stands in a kernel.
COUNTED = {
    "ldg": r"LDG\.",
    "ldg_128": r"LDG\.\S*\b128\b",
    "stg_128": r"STG\.\S*\b128\b",
    "hmma": r"\bHMMA\.",
    "hgmma": r"\bHGMMA\.",
    "utcmma": r"\bUTC\w*MMA",
    "ldl": r"\bLDL",
    "stl": r"\bSTL",
}
ONE, TWO = [1, 1], [2, 2]
ARCHITECTURES = [80, 90, 100, 120]
Launch = Callable[[], Any]


class _Driver:
    """What the launch path asks of a GPU, for one that is not there. The device number is the architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def images(batch: int, channels: int, side: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.empty((batch, channels, side, side), dtype=dtype, device="meta", memory_format=memory_format)


def pdc_forward(
    dtype: torch.dtype, layout: str, kind: Kind, stride: list[int] = ONE, side: int = 64, channels: int = 256
) -> Launch:
    x, weight = (
        images(8, channels, side, dtype, layout),
        torch.empty((channels, 1, 3, 3), dtype=dtype, device="meta"),
    )
    bias = torch.empty(channels, dtype=dtype, device="meta") if kind == Kind.ANGULAR else None
    return lambda: depthwise.pdc2d_depthwise(x, weight, bias, kind, 1.0, stride, ONE, ONE)


def pdc_backward(
    dtype: torch.dtype, layout: str, kind: Kind, stride: list[int] = ONE, side: int = 64, channels: int = 256
) -> Launch:
    x, weight = (
        images(8, channels, side, dtype, layout),
        torch.empty((channels, 1, 3, 3), dtype=dtype, device="meta"),
    )
    grad = images(8, channels, (side - 1) // stride[0] + 1, dtype, layout)
    return lambda: depthwise.pdc2d_depthwise_backward(
        grad, x, weight, kind, 1.0, stride, ONE, ONE, True, True
    )


def pdc_weight(source: torch.dtype, result: torch.dtype, kind: Kind) -> Launch:
    parameter = torch.empty((256, 256, 3, 3), dtype=source, device="meta")
    return lambda: transform.pdc_weight(parameter, kind, 1.0, result)


def pdc_weight_backward(source: torch.dtype, result: torch.dtype, kind: Kind) -> Launch:
    side = plain_size(kind)
    grad = torch.empty((256, 256, side, side), dtype=source, device="meta")
    return lambda: transform.pdc_weight_backward(grad, kind, 0.7, result)


def block_forward(dtype: torch.dtype, layout: str, kind: Kind) -> Launch:
    x, weight = images(8, 256, 64, dtype, layout), torch.empty((256, 1, 3, 3), dtype=dtype, device="meta")
    point, bias = (torch.empty(size, dtype=dtype, device="meta") for size in ((256, 256, 1, 1), (256,)))
    return lambda: forward.pdc_block(x, weight, bias, point, bias, x, kind, 1.0, ONE, ONE)


def block_backward(dtype: torch.dtype, layout: str, kind: Kind) -> Launch:
    x, weight = images(8, 256, 64, dtype, layout), torch.empty((256, 1, 3, 3), dtype=dtype, device="meta")
    point = torch.empty((256, 256, 1, 1), dtype=dtype, device="meta")
    return lambda: backward.pdc_block_backward(x, x, weight, None, point, kind, 1.0, ONE, ONE, True)


def block_dense(dtype: torch.dtype, layout: str, kind: Kind, channels: int = 256) -> Launch:
    x = images(8, channels, 64, dtype, layout)
    plain, point = (
        torch.empty((channels, channels, side, side), dtype=dtype, device="meta") for side in (3, 1)
    )
    return lambda: dense.pdc_block_dense(x, plain, None, point, None, x, kind, 1.0, ONE, ONE)


def launches() -> dict[str, Launch]:
    """Name -> a call of a launcher on meta tensors. New families add their own here."""
    bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    return {
        "forward bf16 channels_last angular": pdc_forward(bf16, "channels_last", Kind.ANGULAR),
        "forward bf16 nchw angular": pdc_forward(bf16, "nchw", Kind.ANGULAR),
        "forward f16 channels_last central": pdc_forward(f16, "channels_last", Kind.CENTRAL),
        "forward f32 channels_last central": pdc_forward(f32, "channels_last", Kind.CENTRAL),
        "forward f32 nchw central": pdc_forward(f32, "nchw", Kind.CENTRAL),
        "forward f64 nchw angular": pdc_forward(f64, "nchw", Kind.ANGULAR),
        "forward bf16 channels_last 64 channels": pdc_forward(
            bf16, "channels_last", Kind.ANGULAR, channels=64
        ),
        "forward bf16 nchw ragged rows": pdc_forward(bf16, "nchw", Kind.ANGULAR, side=50),
        "forward bf16 channels_last radial": pdc_forward(bf16, "channels_last", Kind.RADIAL),
        "forward f32 nchw central stride 2": pdc_forward(f32, "nchw", Kind.CENTRAL, TWO),
        "backward bf16 channels_last angular": pdc_backward(bf16, "channels_last", Kind.ANGULAR),
        "backward bf16 nchw angular": pdc_backward(bf16, "nchw", Kind.ANGULAR),
        "backward f32 channels_last central": pdc_backward(f32, "channels_last", Kind.CENTRAL),
        "backward f32 nchw central": pdc_backward(f32, "nchw", Kind.CENTRAL),
        "backward f64 channels_last central": pdc_backward(f64, "channels_last", Kind.CENTRAL),
        "backward bf16 channels_last radial": pdc_backward(bf16, "channels_last", Kind.RADIAL),
        "backward f32 nchw central stride 2": pdc_backward(f32, "nchw", Kind.CENTRAL, TWO),
        "weight f32 to bf16 angular": pdc_weight(f32, bf16, Kind.ANGULAR),
        "weight f32 to f16 radial": pdc_weight(f32, f16, Kind.RADIAL),
        "weight f32 to f32 central": pdc_weight(f32, f32, Kind.CENTRAL),
        "weight backward bf16 to f32 radial": pdc_weight_backward(bf16, f32, Kind.RADIAL),
        "block bf16 channels_last angular": block_forward(bf16, "channels_last", Kind.ANGULAR),
        "block f16 nchw central": block_forward(f16, "nchw", Kind.CENTRAL),
        "block f32 channels_last angular": block_forward(f32, "channels_last", Kind.ANGULAR),
        "block backward bf16 channels_last angular": block_backward(bf16, "channels_last", Kind.ANGULAR),
        "block backward f16 nchw central": block_backward(f16, "nchw", Kind.CENTRAL),
        "block dense bf16 channels_last angular": block_dense(bf16, "channels_last", Kind.ANGULAR),
        "block dense f16 nchw central": block_dense(f16, "nchw", Kind.CENTRAL, 128),
        **clustering_launches(),
    }


def left_out(arch: int) -> set[str]:
    """Launches that others, or another architecture, have to stand for: of the clustering's each architecture compiles
    one in four, of the others every second one, for sm_80 and sm_90 alone."""
    clustering = clustering_launches()
    others = [name for name in launches() if name not in clustering]
    place = ARCHITECTURES.index(arch)
    return {name for i, name in enumerate(others) if (i + place) % 2 or arch >= 100} | {
        name for i, name in enumerate(clustering) if (i + place) % 4
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([BIN / name, *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(kernel: Any) -> tuple[str, str]:
    """(resource usage, SASS) of a compiled kernel, as NVIDIA's tools print them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)


def examine(kernel: Any, usage: str, sass: str) -> dict[str, Any]:
    """Registers, bytes of stack and local memory (spills), shared memory, instructions."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage printed no usage: {usage!r}")
    registers, stack, shared, local = map(int, found.groups())
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": max(shared, kernel.metadata.shared),
        "warps": kernel.metadata.num_warps,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
        **{name: len(re.findall(pattern, sass)) for name, pattern in COUNTED.items()},
    }


def compiled(launch: Launch, arch: int) -> Iterator[tuple[str, Any]]:
    """(name, kernel) of each kernel that `launch` would start on that architecture."""
    driver.set_active(_Driver(arch))
    kernels = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    yield from kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of launches")
    parser.add_argument("--sass", type=pathlib.Path, help="a folder for the SASS of every kernel")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET must not be set: interpreted functions cannot be compiled")
    rows = []
    for name, launch in launches().items():
        if not any(part in name for part in arguments.only):
            continue
        for arch in arguments.arch:
            if name in left_out(arch):
                continue
            for kernel_name, kernel in compiled(launch, arch):
                usage, sass = disassemble(kernel)
                rows.append(
                    {"launch": name, "kernel": kernel_name, "arch": arch, **examine(kernel, usage, sass)}
                )
                if arguments.sass:
                    (arguments.sass / f"{name} {kernel_name} {arch}.sass".replace(" ", "_")).write_text(sass)
    json.dump(rows, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
