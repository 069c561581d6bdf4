"""Size and cost of a network: parameters, multiply-accumulates, peak memory and time, as in the paper's Table 2.

Multiply-accumulates follow the convention of published tables. Counted, as fvcore does: one for each product term of a
convolution, a linear layer or a matrix product (the two of attention included), and 5 operations for each element of
an affine LayerNorm or GroupNorm. Not counted: element-wise work, softmax, interpolation, pooling. The operators of
frd_kernels have formulas of their own: a difference convolution counts as a plain one, a round of clustering as the
product of its keys and centres. Floating-point operations are twice as many; tables that head a column of
multiply-accumulates "FLOPs", as the paper does, are half that.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .evaluate_table import paper_tables

NORM_OPERATIONS = 5
PARTS = ("stem", "trace", "encoder", "blocks", "decoder")


def count_parameters(module: nn.Module) -> int:
    """Number of parameter elements."""
    return sum(p.numel() for p in module.parameters())


def count_macs(model: nn.Module, height: int = 512, width: int = 512) -> dict[str, int]:
    """Multiply-accumulates of one image [1, 3, height, width], in whole and by part.

    The model is left alone: the count runs on a copy, and on shapes only, so it takes no time.

    Returns:
        ``{"total": ..., "stem": ..., "trace": ..., "encoder": ..., "blocks": ..., "decoder": ...}``, 0 for a part that
        the model does not have.
    """
    shadow = copy.deepcopy(model).eval()
    fake = FakeTensorMode()
    state: dict[str, Tensor] = {name: fake.from_tensor(value) for name, value in shadow.state_dict().items()}
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten.native_layer_norm: _norm_flops,
            torch.ops.aten.native_group_norm: _norm_flops,
        },
    )
    # Fused attention would hide its two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fake, counter:
        first = next(shadow.parameters())
        functional_call(
            shadow, state, (torch.empty(1, 3, height, width, dtype=first.dtype, device=first.device),)
        )
    by_module = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    root = type(shadow).__name__
    macs = {"total": counter.get_total_flops() // 2}
    for part in PARTS:
        module = getattr(model, part, None)
        names = [f"{part}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [part]
        macs[part] = sum(by_module.get(f"{root}.{name}", 0) for name in names)
    return macs


def _norm_flops(shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # The counter's unit is half a multiply-accumulate.
    size = shape.shape if isinstance(shape, Tensor) else shape
    return 2 * NORM_OPERATIONS * math.prod(size)


def measure(model: nn.Module, height: int = 512, width: int = 512, repeats: int = 10) -> dict[str, Any]:
    """What Table 2 says of a net, for one image [1, 3, height, width] on the device and in the dtype of the model.

    Args:
        repeats: timed forward passes, after one that is not.

    Returns:
        height, width, parameters, macs (by part), flops (2 x macs), weight_bytes, peak_bytes (the most that tensors
        hold at once during a forward pass, over weights and image; libraries' own workspaces count on a GPU only),
        seconds (median), seconds_range, repeats, dtype, and the machine: device, threads, torch.

    Raises:
        ValueError: a size or a number of repeats below 1, or a model without parameters.
    """
    for name, value in (("height", height), ("width", width), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError(f"model must have parameters, got {type(model).__name__} without any")
    # On the CPU, where no operator of the count runs.
    macs = count_macs(copy.deepcopy(model).cpu(), height, width)
    image = torch.rand(1, 3, height, width, dtype=first.dtype, device=first.device)
    mode = model.training
    model.eval()
    try:
        with torch.inference_mode():
            model(image)
            peak = _peak_bytes(model, image)
            seconds = [_seconds(model, image) for _ in range(repeats)]
    finally:
        model.train(mode)
    return {
        "height": height,
        "width": width,
        "parameters": count_parameters(model),
        "macs": macs,
        "flops": 2 * macs["total"],
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "peak_bytes": peak,
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "repeats": repeats,
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": _device_name(first.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _peak_bytes(model: nn.Module, image: Tensor) -> int:
    if image.device.type == "cuda":
        torch.cuda.synchronize(image.device)
        torch.cuda.reset_peak_memory_stats(image.device)
        before = torch.cuda.memory_allocated(image.device)
        model(image)
        torch.cuda.synchronize(image.device)
        return torch.cuda.max_memory_allocated(image.device) - before
    # Otherwise its library writes on stderr when it starts, and that a machine has no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        model(image)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        events.export_chrome_trace(str(file))
        trace = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = [(e["ts"], int(e["args"]["Bytes"])) for e in trace if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        held += change
        peak = max(peak, held)
    return peak


def _seconds(model: nn.Module, image: Tensor) -> float:
    gpu = image.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(image.device)
    start = time.perf_counter()
    model(image)
    if gpu:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores"


def summary(model: nn.Module, height: int = 512, width: int = 512) -> str:
    """A small table: parameters in millions and multiply-accumulates in billions, by part and in whole."""
    macs = count_macs(model, height, width)
    lines = [f"{'part':<8} {'params M':>9} {'GMAC':>8}   at {height}x{width}"]
    for part in PARTS:
        module = getattr(model, part, None)
        if module is not None:
            lines.append(f"{part:<8} {count_parameters(module) / 1e6:9.2f} {macs[part] / 1e9:8.2f}")
    lines.append(f"{'total':<8} {count_parameters(model) / 1e6:9.2f} {macs['total'] / 1e9:8.2f}")
    return "\n".join(lines)


def table2(rows: dict[str, dict[str, Any]]) -> str:
    """The paper's Table 2 in Markdown: its own rows, marked as quoted, then results of `measure` by name."""
    lines = [
        "# Table 2: parameters and cost of one image",
        "",
        "| Method | Size | Parameters | MACs | FLOPs = 2 x MACs | Peak memory | Time (median) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (parameters, gmac) in paper_tables()["table2"]["rows"].items():
        macs = "-" if gmac is None else f"{gmac:g} G"
        lines.append(f"| {name} (quoted) | 512x512 | {parameters:g} M | {macs} | - | - | - |")
    for name, row in rows.items():
        cells = [
            name.replace("|", "/"),
            f"{row['height']}x{row['width']}",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['macs']['total'] / 1e9:.2f} G",
            f"{row['flops'] / 1e9:.2f} G",
            f"{row['peak_bytes'] / 2**20:.1f} MiB + {row['weight_bytes'] / 2**20:.1f} MiB of weights",
            f"{1e3 * row['seconds']:.1f} ms",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    quoted = "Rows marked (quoted) are the paper's numbers; its FLOPs are multiply-accumulates, as fvcore counts them."
    lines += ["", quoted, "", *(f"- {_conditions(name, row)}" for name, row in rows.items())]
    return "\n".join(lines) + "\n"


def _conditions(name: str, row: dict[str, Any]) -> str:
    low, high = (1e3 * seconds for seconds in row["seconds_range"])
    threads = f"{row['threads']} thread{'' if row['threads'] == 1 else 's'}"
    return (
        f"{name}: {row['dtype']}, {row['device']}, {threads}, torch {row['torch']}, batch 1, "
        f"median of {row['repeats']} ({low:.1f} to {high:.1f} ms)."
    )
