"""What each kernel is to reach on a Hopper GPU, and how far the files of a folder show that it does.

The goals are the project's own, set before anything ran on a GPU.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from .. import kernel_tables
from .run import read_json

SMALL, LARGE = "[16x256x16x16]", "[8x256x64x64]"


@dataclasses.dataclass(frozen=True)
class Goal:
    """`case` is the name of a registered case without its dtype, which is bfloat16. `of` says what `value` is: a ratio
    to the headline rival, microseconds of ours at most, or the memory floor's part of our time at least."""

    case: str
    value: float
    of: str = "ratio"  # or "us", "floor"
    timing: str = "graph"

    @property
    def text(self) -> str:
        if self.of == "us":
            return f"at most {self.value:g} us"
        if self.of == "floor":
            return f"{100 * self.value:.0f} % of the copy rate"
        return f"{self.value:g}x of eager"

    def met(self, record: dict[str, Any]) -> tuple[str, bool]:
        """The figure that was measured, and whether it will do."""
        if self.of == "us":
            found = 1e3 * record["ours_ms"]["median"]
            return f"{found:.1f} us", found <= self.value
        if self.of == "floor":
            found = record["floors"]["memory floor"]["of_ours"]
            return f"{100 * found:.0f} %", found >= self.value
        return kernel_tables.times(record["ratio"]), record["ratio"] >= self.value


@dataclasses.dataclass(frozen=True)
class Kernel:
    """`op` as the suite's tests name it; `cuda` and `triton` say how it is launched."""

    name: str
    op: str
    cuda: str
    triton: str
    goals: tuple[Goal, ...] = ()


def _both(case: str, small: float, large: float, **more: Any) -> tuple[Goal, Goal]:
    return Goal(case.format(SMALL), small, **more), Goal(case.format(LARGE), large, **more)


KERNELS = (
    Kernel(
        "weight transform, zero-sum rounding, and its transpose",
        "pdc_weight",
        "one launch each",
        "one launch each",
        (
            Goal("pdc_weight angular [256x256x3x3] nchw forward", 3.0),
            Goal("pdc_weight angular [256x256x3x3] nchw forward", 3.0, "us"),
        ),
    ),
    Kernel(
        "depthwise PDC forward",
        "pdc2d",
        "one launch",
        "one launch",
        (
            Goal(f"pdc angular depthwise {LARGE} channels_last forward", 1.15),
            Goal(f"pdc angular depthwise {LARGE} channels_last forward", 0.85, "floor"),
            Goal(f"pdc angular depthwise {LARGE} nchw forward", 2.0),
            Goal(f"pdc central depthwise {LARGE} channels_last forward", 3.0),
            Goal(f"pdc central depthwise {LARGE} nchw forward", 4.0),
        ),
    ),
    Kernel(
        "depthwise PDC backward (timed with the forward)",
        "pdc2d",
        "dx and dw in one pass over x and dy (stride 1), then an ordered sum",
        "likewise",
        (
            Goal(f"pdc angular depthwise {LARGE} channels_last forward+backward", 2.0),
            Goal(f"pdc angular depthwise {LARGE} nchw forward+backward", 4.0),
            Goal(f"pdc central depthwise {LARGE} channels_last forward+backward", 2.0),
            Goal(f"pdc central depthwise {LARGE} nchw forward+backward", 4.0),
        ),
    ),
    Kernel(
        "dense PDC",
        "pdc_weight",
        "weight transform, then cuDNN",
        "likewise",
        (
            Goal(f"pdc angular dense {LARGE} channels_last forward", 1.1),
            Goal("pdc angular dense [1x256x16x16] channels_last forward", 2.5),
            Goal(f"pdc angular dense {LARGE} channels_last forward+backward", 1.06),
        ),
    ),
    Kernel(
        "PDC block, depthwise, forward",
        "pdc_block",
        "one launch, the stencil is the prologue of the matrix product (`mma.sync`)",
        "one launch (`tl.dot`)",
        (
            Goal("dpm [1x256x16x16] channels_last forward", 8.0, "us"),
            Goal("dpm [1x256x16x16] channels_last forward", 6.0, timing="wall"),
            *_both("dpm {} channels_last forward", 4.0, 3.0),
            Goal(f"dpm {LARGE} channels_last forward", 0.65, "floor"),
        ),
    ),
    Kernel(
        "PDC block, depthwise, backward (timed with the forward)",
        "pdc_block",
        "hidden values once more, product, weight gradient, ordered sum, depthwise backward",
        "product, weight gradient, ordered sum, depthwise backward",
        _both("dpm {} channels_last forward+backward", 3.0, 3.0),
    ),
    Kernel(
        "PDC block, dense, forward at inference, channels 64, 128 or 256",
        "pdc_block",
        "composed: transform, cuDNN, 1x1",
        "one launch, 8 taps for angular; only where it is asked for",
        (Goal(f"pdc_block angular dense {LARGE} channels_last forward", 1.08),),
    ),
    Kernel(
        "`cluster` (one round, any size) and `dispatch`, forward",
        "cluster",
        "one launch each; `cluster` by a team of blocks for each item: from sm_90 on eight with distributed shared "
        "memory, before one",
        "`cluster` two launches, three where the partial sums are large, one more where O * C > 16384; `dispatch` one",
    ),
    Kernel(
        "`cluster` and `dispatch`, backward",
        "cluster",
        "three launches; two",
        "two (count) or three (similarity); two",
    ),
    Kernel(
        "ICM forward, both variants, any size, up to 8 rounds on CUDA",
        "icm",
        "one launch: all rounds, their projections and the dispatch (`mma.sync` in 16 bit)",
        "two to four launches a round, one for the dispatch, one for the queries of `paper`",
        (
            Goal("icm paper [1x256x16x16] nchw forward", 10.0, "us"),
            Goal(f"icm paper {SMALL} nchw forward", 10.0, "us"),
            Goal(f"icm paper {SMALL} nchw forward", 20.0, timing="wall"),
            *_both("icm paper {} nchw forward", 12.0, 3.5),
            *_both("icm released {} nchw forward", 12.0, 3.5),
        ),
    ),
    Kernel(
        "ICM backward (timed with the forward)",
        "icm",
        "three launches: the whole chain by the same teams, weight gradients, their ordered sum",
        "four or five launches a round and the dispatch's; weight gradients by the library",
        (
            Goal(f"icm paper {SMALL} nchw forward+backward", 20.0, timing="wall"),
            Goal(f"icm paper {LARGE} nchw forward+backward", 4.5),
        ),
    ),
)


Records = dict[tuple[str, str], dict[str, Any]]  # by case and timing


def state(folder: pathlib.Path, kernels: Sequence[Kernel] = KERNELS) -> str:
    """Kernel x {launches, right, timed, at its goal}, from the suite's and the kernels' files of a folder."""
    runs, found = read_json(folder / "suite.json").get("runs", []), timed(folder)
    titles = ("kernel", "CUDA C++", "Triton", "right: CUDA", "right: Triton", "cases timed", "goals reached")
    lines = kernel_tables.header(*titles)
    for kernel in kernels:
        rights = (right(runs, backend, kernel.op) for backend in ("cuda", "triton"))
        have = [goal for goal in kernel.goals if (goal.case, goal.timing) in found]
        met = [goal.met(found[goal.case, goal.timing])[1] for goal in have]
        cases, seen = ({goal.case for goal in goals} for goals in (kernel.goals, have))
        figures = (
            (f"{len(seen)} of {len(cases)}", f"{sum(met)} of {len(met)}") if cases else ("-", "none was set")
        )
        lines.append(kernel_tables.cells(kernel.name, kernel.cuda, kernel.triton, *rights, *figures))
    return "\n".join(lines)


def each(folder: pathlib.Path, kernels: Sequence[Kernel] = KERNELS) -> str:
    """A row for each goal, with what was measured."""
    found = timed(folder)
    lines = kernel_tables.header("case", "timing", "goal", "measured", "reached")
    for goal in (goal for kernel in kernels for goal in kernel.goals):
        record = found.get((goal.case, goal.timing))
        figure, met = goal.met(record) if record else ("not yet", None)
        verdict = {True: "yes", False: "**no**", None: "-"}[met]
        lines.append(kernel_tables.cells(goal.case, goal.timing, goal.text, figure, verdict))
    return "\n".join(lines)


def timed(folder: pathlib.Path) -> Records:
    """The records in bfloat16, the dtype that the goals are for."""
    cases = read_json(folder / "kernels.json").get("cases", [])
    chosen = (record for record in cases if record["dtype"] == "bfloat16")
    return {(record["name"].replace(" bfloat16", ""), record["timing"]): record for record in chosen}


def right(runs: Sequence[dict[str, Any]], backend: str, op: str) -> str:
    """From the last run of the suite that was not confined to some cases, and the last one behind it; of the op's
    cases, or of all ops together where these alone were counted."""
    counted = [(run, found) for run in runs if (found := _counts(run, backend, op))]
    if not counted:
        return "not seen"
    whole = next((found for run, found in reversed(counted) if not run.get("only")), None)
    last = counted[-1][1]
    texts = dict.fromkeys(_text(*found) for found in (whole, last) if found)
    return ("**no**" if last[1] else "yes") + ": " + "; later ".join(texts)


def _counts(run: dict[str, Any], backend: str, op: str) -> tuple[int, int, str] | None:
    """Cases that ran, those that failed, and whether they are of all ops."""
    counts = run.get("counts", {}).get(backend, {})
    found = counts.get(op) or counts.get("all")
    if not found or not (ran := found["passed"] + found["failed"]):
        return None
    return ran, found["failed"], "" if op in counts else " of all ops"


def _text(ran: int, failed: int, of: str) -> str:
    return f"{failed or 'none'} of {ran} cases{of} failed"
