"""`frd bench predict`: every engine and precision of `frd predict` on this machine, checked, then timed in turns."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frd_model.config import ENGINES, PRECISIONS
from frd_model.output import check_output_file, one_line, say

from .arguments import (
    UsageError,
    add_checkpoint_argument,
    add_device_argument,
    at_least,
    open_checkpoint,
    path,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

# Of the logits against float32 PyTorch, relative L2. In float32 a pixel between two centres of the clustering may fall
# to either; bf16 has eight bits.
BOUNDS = {"float32": 1e-3, "bf16": 5e-2}
AS_LOADED = "as loaded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    add_device_argument(parser)
    parser.add_argument(
        "--size", type=at_least(32), default=512, help="side of the image in pixels (default 512)"
    )
    parser.add_argument("--batch", type=at_least(1), default=1, help="images per call (default 1)")
    parser.add_argument(
        "--engines",
        type=_engines,
        metavar="NAMES",
        help=f"of {','.join(ENGINES[1:])} (default: those that run on the device)",
    )
    parser.add_argument("--repeats", type=at_least(1), default=15, help="timed calls of each (default 15)")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads (default: torch's)")
    parser.add_argument("--json-out", type=path, metavar="FILE", help="write the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE of --json-out")


def _engines(text: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in ENGINES[1:]:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(ENGINES[1:])}, got {name!r}")
    return chosen


def run(args: argparse.Namespace) -> int:
    """Prepare, check, time, print. Status 1 if an engine that is installed failed or computes something else."""
    import torch

    from frd_model.engines import IN_TORCH
    from frd_model.eval_view import device_of
    from frd_model.exported import is_exported

    if args.json_out is not None:
        check_output_file("--json-out", args.json_out, overwrite=args.overwrite)
    if args.threads:
        torch.set_num_threads(args.threads)
    if is_exported(args.checkpoint):
        raise UsageError(f"--checkpoint must be a network, got the exported file {args.checkpoint!r}")
    model = open_checkpoint(args.checkpoint, args.device, model=args.model, preset=args.preset).model
    images = _images(args.batch, args.size).to(device_of(model))
    rows = [_row(AS_LOADED, "float32", model, model, images)]
    for engine in args.engines or (ENGINES[1:] if images.device.type == "cpu" else IN_TORCH):
        rows += [_candidate(model, engine, precision, images) for precision in PRECISIONS[1:]]
    right = [row for row in rows if "net" in row]
    for row, times in zip(right, _times([row["net"] for row in right], images, args.repeats), strict=True):
        row["ms"] = statistics.median(times) * 1e3
    fastest = min(row["ms"] for row in right)
    for row in right:
        del row["net"]
        row["ratio"] = row["ms"] / fastest
    _print(rows, args, torch.get_num_threads())
    chosen = _auto(model, rows)
    say(f"auto takes {chosen['engine']} {chosen['precision']}, {chosen['ratio']:.2f} x the fastest")
    if args.json_out is not None:
        _write(args.json_out, rows, chosen, args)
    return 1 if any(row.get("failed") for row in rows) else 0


def _images(batch: int, side: int) -> Tensor:
    """Smooth shapes under a little noise, normalised [batch, 3, side, side]."""
    import cv2
    import numpy as np
    import torch

    from frd_model.data.transforms import to_tensor

    rng = np.random.default_rng(0)
    found = []
    for _ in range(batch):
        shapes = cv2.resize(rng.uniform(0, 255, (8, 8, 3)), (side, side), interpolation=cv2.INTER_CUBIC)
        noisy = shapes + rng.normal(0, 4, shapes.shape)
        found.append(to_tensor(np.clip(noisy, 0, 255).astype(np.uint8)))
    return torch.stack(found)


def _candidate(model: nn.Module, engine: str, precision: str, images: Tensor) -> dict[str, Any]:
    from frd_model.engines import prepare

    row = {"engine": engine, "precision": precision}
    try:
        net = prepare(model, engine, precision, notify=lambda text: say(text, sys.stderr))
        return _row(engine, precision, net, model, images)
    # What this machine or engine does not have.
    except (ModuleNotFoundError, NotImplementedError) as error:
        return row | {"note": one_line(error)}
    # Engines raise errors of any type.
    except Exception as error:
        return row | {"note": one_line(error), "failed": True}


def _row(engine: str, precision: str, net: nn.Module, model: nn.Module, images: Tensor) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        want, got = model(images), net(images).float()
    error = float((got - want).norm() / want.norm())
    row: dict[str, Any] = {"engine": engine, "precision": precision, "error": error}
    if not error <= BOUNDS[precision]:
        return row | {"note": f"differs from PyTorch by more than {BOUNDS[precision]:g}", "failed": True}
    return row | {"net": net}


def _times(nets: Sequence[Callable[[Tensor], Tensor]], images: Tensor, repeats: int) -> list[list[float]]:
    """Seconds of each call of each net, which take turns: A B C C B A A B C ..."""
    import torch

    found: list[list[float]] = [[] for _ in nets]
    order = list(range(len(nets)))
    with torch.no_grad():
        for turn in range(repeats + 2):
            for i in order if turn % 2 else reversed(order):
                start = time.perf_counter()
                # A GPU has computed the sum when it can be read.
                nets[i](images).sum().item()
                # The first two calls warm up.
                if turn > 1:
                    found[i].append(time.perf_counter() - start)
    return found


def _auto(model: nn.Module, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of what `frd predict` takes."""
    from frd_model.engines import prepare

    timed, net = [row for row in rows if "ms" in row], prepare(model)
    return next(
        (row for row in timed if (row["engine"], row["precision"]) == (net.engine, net.precision)), timed[0]
    )


def _print(rows: list[dict[str, Any]], args: argparse.Namespace, threads: int) -> None:
    size = f"{args.batch} x 3 x {args.size} x {args.size}"
    say(f"{size} on {args.device}, {threads} threads, median of {args.repeats}, error of the logits (L2)")
    say(f"{'engine':<12} {'precision':<9} {'ms':>9} {'ratio':>6} {'error':>8}")
    for row in rows:
        error = f"{row['error']:.1e}" if "error" in row else "-"
        figures = f"{row['ms']:>9.1f} {row['ratio']:>6.2f}" if "ms" in row else f"{'-':>9} {'-':>6}"
        say(f"{row['engine']:<12} {row['precision']:<9} {figures} {error:>8}  {row.get('note', '')}".rstrip())


def _write(file: Path, rows: list[dict[str, Any]], chosen: dict[str, Any], args: argparse.Namespace) -> None:
    import torch

    from frd_model.data.images import write_json

    content = {
        "checkpoint": args.checkpoint or "demo",
        "shape": [args.batch, 3, args.size, args.size],
        "device": args.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
        "auto": {name: chosen[name] for name in ("engine", "precision", "ratio")},
    }
    write_json(file, content)
