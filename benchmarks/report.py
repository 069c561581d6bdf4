"""Writes the tables of docs/ and README.md from the result files: `python -m benchmarks.report [--check]`.

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`; what is outside the marks is left alone.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from typing import Any

from . import demo_tables, kernel_tables, model_tables
from .gpu import section as gpu_section

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("docs/performance.md", "docs/model-card.md", "README.md")


def replace_table(text: str, name: str, table: str) -> str:
    """Puts `table` between the marks of `name`; text without these marks stays as it is."""
    pattern = rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)


def _result(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return report


def _optional(name: str) -> dict[str, Any] | None:
    return _result(name) if (RESULTS / name).exists() else None


def cpu_tables() -> dict[str, str]:
    report = _result("cpu/kernels.json")
    return {
        "cpu": kernel_tables.every_case(report),
        "cpu-summary": kernel_tables.by_op(report),
        "cpu-conditions": kernel_tables.conditions(report),
        "cpu-overall": kernel_tables.overall(report),
        "cpu-behind": kernel_tables.behind(report),
        "cpu-compiled": kernel_tables.compiled(report),
        "cpu-left-out": kernel_tables.left_out(report),
    }


def plots(folder: pathlib.Path) -> str:
    """The plots of a folder, as the documents in docs/ link to them."""
    found = sorted(folder.glob("*.png"))
    return (
        "\n".join(f"![{plot.stem}](../benchmarks/results/{folder.name}/{plot.name})" for plot in found)
        or "None."
    )


def net_tables() -> dict[str, str]:
    model = _optional("cpu/model.json")
    return {
        "model": model_tables.latency(model),
        "model-conditions": model_tables.conditions(model),
        "model-components": model_tables.shares(model),
        "growth": model_tables.growth(_optional("cpu/growth.json")),
        "table2": model_tables.published(_optional("cpu/table2.json")),
        "plots": plots(RESULTS / "cpu"),
    }


def demo_model_tables() -> dict[str, str]:
    trained, untrained = _result("demo/heldout.json"), _result("demo/untrained.json")
    return {
        "demo-heldout": demo_tables.heldout_table(trained, untrained),
        "demo-alarms": demo_tables.alarm_table(trained, untrained),
        "demo-training": demo_tables.training_table(_result("demo/training.json")),
    }


def gpu_tables() -> dict[str, str]:
    return {
        "gpu": gpu_section.all_gpus(RESULTS),
        "gpu-summary": gpu_section.summary(RESULTS),
        "gpu-state": gpu_section.state(RESULTS),
    }


def all_tables() -> dict[str, str]:
    """Name -> Markdown."""
    return cpu_tables() | net_tables() | demo_model_tables() | gpu_tables()


def filled(text: str, tables: dict[str, str], name: str) -> str:
    """A document with its tables replaced.

    Raises:
        ValueError: it has a mark that is no table's.
    """
    unknown = set(re.findall(r"<!-- /?table:(\S+) -->", text)) - set(tables)
    if unknown:
        raise ValueError(f"{name}: a mark must name a table, got {', '.join(sorted(unknown))}")
    for table, content in tables.items():
        text = replace_table(text, table, content)
    return text


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where `--check` finds a document that differs from what the files give."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="write the tables of the documents from the result files",
    )
    parser.add_argument("--check", action="store_true", help="write nothing, name the documents that differ")
    options = parser.parse_args(argv)
    tables = all_tables()
    differing = []
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text()
        after = filled(before, tables, name)
        if before != after:
            differing.append(name)
            if not options.check:
                path.write_text(after)
    if options.check and differing:
        print(f"not what the result files give: {', '.join(differing)}; run python -m benchmarks.report")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
