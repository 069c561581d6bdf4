"""Which part of FRD-Net the time goes into: `python -m benchmarks.components --help`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from frd_model import FRDNet

from .clock import synchronize
from .model_sides import VARIANTS, Subject, autocast

REST = "rest"
RUNS = 5


def parts_of(model: FRDNet) -> dict[str, list[nn.Module]]:
    """Component -> its modules; none lies within another."""
    parts: dict[str, list[nn.Module]] = {}
    if model.stem is not None:
        parts["stem"] = [model.stem]
    if model.trace is not None:
        parts["trace branch"] = [model.trace]
    stages = getattr(model.encoder, "stages", None)
    if stages is None:
        parts["encoder"] = [model.encoder]
    else:
        parts |= {f"encoder, stage {number}": [stage] for number, stage in enumerate(stages, start=1)}
    mixers: list[Any] = [block.mixer for block in model.blocks]
    parts["ICM"] = [mixer.icm for mixer in mixers]
    parts["DPM"] = [mixer.dpm for mixer in mixers]
    parts["mixer, 1x1"] = [layer for mixer in mixers for layer in (mixer.enter, mixer.macro, mixer.leave)]
    parts["MLP"] = [block.mlp for block in model.blocks]
    norms = ("norm1", "norm2", "norm_out")
    parts["norms of the blocks"] = [getattr(block, norm) for block in model.blocks for norm in norms]
    parts["decoder"] = [model.decoder]
    return parts


@dataclasses.dataclass
class Watch:
    """Seconds of each component since the last reset."""

    device: str
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    started: float = 0.0

    def start(self, *args: Any) -> None:
        synchronize(self.device)
        self.started = time.perf_counter()

    def stop(self, name: str) -> None:
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self.started


@contextlib.contextmanager
def watched(model: FRDNet, device: str) -> Iterator[Watch]:
    """Hooks around every component; on a GPU they wait for it, which costs what its asynchrony gains."""
    watch, hooks = Watch(device), []
    for name, modules in parts_of(model).items():
        for module in modules:
            hooks.append(module.register_forward_pre_hook(watch.start))
            hooks.append(module.register_forward_hook(lambda *args, name=name: watch.stop(name)))
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def shares(model: FRDNet, images: torch.Tensor, dtype: torch.dtype, runs: int = RUNS) -> dict[str, Any]:
    """Medians over `runs` forward passes of the milliseconds of each component and of what lies between them, their sum
    `whole_ms`, and each one's share of it; `plain_ms` is a pass without hooks."""
    device = images.device.type
    series: dict[str, list[float]] = {}
    plain = []

    def forward() -> float:
        synchronize(device)
        start = time.perf_counter()
        with torch.no_grad(), autocast(device, dtype):
            model(images)
        synchronize(device)
        return time.perf_counter() - start

    forward()
    for _ in range(runs):
        plain.append(forward())
        with watched(model, device) as watch:
            whole = forward()
        for name, seconds in watch.seconds.items():
            series.setdefault(name, []).append(seconds)
        series.setdefault(REST, []).append(max(0.0, whole - sum(watch.seconds.values())))
    medians = {name: 1e3 * statistics.median(seconds) for name, seconds in series.items()}
    medians[REST] = medians.pop(REST)
    total = sum(medians.values())
    return {
        "batch": images.shape[0],
        "dtype": str(dtype).removeprefix("torch."),
        "runs": runs,
        "plain_ms": 1e3 * statistics.median(plain),
        "whole_ms": total,
        "parts": {name: {"ms": ms, "share": ms / total} for name, ms in medians.items()},
    }


def measure(
    subject: Subject, dtype: torch.dtype = torch.float32, batch: int = 1, runs: int = RUNS
) -> dict[str, Any]:
    """`shares` of ours and of the headline rival, under "ours" and "rival"."""
    from .model_sides import rivals_of
    from .model_timing import Setting, own_sides

    images, _ = subject.batch(batch)
    backends, contexts, _ = own_sides(subject, Setting(batch, dtype=dtype))
    name, rival = next(iter(rivals_of(subject.model).items()))
    found: dict[str, Any] = {"backend": backends[0], "rival_name": name}
    with contexts.get(backends[0], contextlib.nullcontext)():
        found["ours"] = shares(subject.model, images, dtype, runs)
    found["rival"] = shares(rival, images, dtype, runs)
    return found


def table(shares: dict[str, Any]) -> str:
    """Markdown: component, milliseconds and share of ours, of the rival."""
    lines = ["| component | ours, ms | share | eager, ms | share |", "| --- | --- | --- | --- | --- |"]
    theirs = shares["rival"]["parts"]
    for name, part in shares["ours"]["parts"].items():
        other = theirs[name]
        lines.append(
            f"| {name} | {part['ms']:.2f} | {100 * part['share']:.1f} % | {other['ms']:.2f} | "
            f"{100 * other['share']:.1f} % |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.components", description="share of time of each component"
    )
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found = measure(Subject(options.variant, options.size, options.device), batch=options.batch)
    print(json.dumps(found, indent=1) if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
