"""The section of docs/performance.md about GPUs: one part for each whose results lie in benchmarks/results/."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from .. import kernel_tables, model_tables
from . import goals
from . import page as pages
from .run import read_json

TIMINGS = ("wall", "graph", "graph, cold L2")
NOTHING = (
    "No kernel of this project has been measured on a GPU: there is no result file, so there is no figure."
)


def all_gpus(results: pathlib.Path) -> str:
    parts = [one_gpu(path.parent) for path in sorted(results.glob("*/kernels.json")) if _is_gpu(path)]
    return "\n\n".join(parts) or NOTHING


def summary(results: pathlib.Path) -> str:
    """One row for each GPU, op and mode: the worst and best ratio to the headline rival, for each timing."""
    rows = []
    for path in sorted(results.glob("*/kernels.json")):
        if not _is_gpu(path):
            continue
        report = json.loads(path.read_text())
        name = gpu_name(path.parent)
        groups: dict[tuple[str, str], dict[str, list[float]]] = {}
        for record in report["cases"]:
            timings = groups.setdefault((kernel_tables.op(record), record["mode"]), {})
            timings.setdefault(record["timing"], []).append(record["ratio"])
        for (op, mode), timings in groups.items():
            spans = [_span(timings.get(timing, [])) for timing in TIMINGS]
            rows.append(kernel_tables.cells(name, op, mode, *spans))
    return "\n".join([*kernel_tables.header("GPU", "op", "mode", *TIMINGS), *rows]) if rows else NOTHING


def _span(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    low, high = (kernel_tables.times(pick(ratios)) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _is_gpu(path: pathlib.Path) -> bool:
    return any(record.get("device") == "cuda" for record in json.loads(path.read_text())["cases"])


def one_gpu(folder: pathlib.Path) -> str:
    """The page that the run left in the folder, with the worst cases of each timing before it and the nets behind."""
    report = json.loads((folder / "kernels.json").read_text())
    name = gpu_name(folder)
    found = {part: read_json(folder / f"{part}.json") for part in pages.PARTS}
    model = found["model"]
    page = pages.page(name, report, found)
    title, _, body = page.partition("\n\n")
    parts = [title, *_summaries(report), body.rstrip()]
    if model.get("components"):
        parts += ["## Share of time of each component", model_tables.shares(model)]
    if growth := read_json(folder / "growth.json"):
        parts += ["## Growth", model_tables.growth(growth)]
    parts += [
        f"![{plot.stem}](../benchmarks/results/{folder.name}/{plot.name})"
        for plot in sorted(folder.glob("*.png"))
    ]
    return re.sub(r"^#", "###", "\n\n".join(parts), flags=re.MULTILINE)


def state(results: pathlib.Path) -> str:
    """What is proven and what was reached, for each GPU."""
    parts = []
    for path in sorted(results.glob("*/kernels.json")):
        if _is_gpu(path):
            folder = path.parent
            parts += [f"#### {gpu_name(folder)}", goals.state(folder), "Goals, bfloat16:", goals.each(folder)]
    return "\n\n".join(parts) or NOTHING


def gpu_name(folder: pathlib.Path) -> str:
    name: str = (
        read_json(folder / "kernels.json").get("state_before", {}).get("gpu", {}).get("name", folder.name)
    )
    return name


def _summaries(report: dict[str, Any]) -> list[str]:
    parts = []
    for timing in dict.fromkeys(record["timing"] for record in report["cases"]):
        chosen = report | {"cases": [record for record in report["cases"] if record["timing"] == timing]}
        parts += [f"## Worst cases, {timing}", kernel_tables.overall(chosen), kernel_tables.behind(chosen)]
    return parts
