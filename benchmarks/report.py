"""Writes the tables of docs/performance.md and README.md from the result files: `python -m benchmarks.report`.

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`; what is outside the marks is left alone.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _cells(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _shape(record: dict[str, Any]) -> str:
    return "[" + ", ".join(map(str, record["shape"])) + "]"


def cpu_table(report: dict[str, Any]) -> str:
    """Every case, the ones that miss their target included."""
    head = _cells("op", "shape", "layout", "mode", "ours, ms", "eager, ms", "ratio", "target", "reached")
    lines = [head, _cells(*["---"] * 9)]
    for record in report["cases"]:
        times, target = record["milliseconds"], record["target"]
        reached = "-" if target is None else "yes" if record["ratio"] >= target else "**no**"
        lines.append(
            _cells(
                record["op"],
                _shape(record),
                record["layout"],
                record["mode"],
                f"{times['ours']['median']:.3f}",
                f"{times[record['rival']]['median']:.3f}",
                f"{record['ratio']:.2f}x",
                "-" if target is None else f"{target:.1f}x",
                reached,
            )
        )
    return "\n".join(lines)


def cpu_summary(report: dict[str, Any]) -> str:
    """One row for each op and mode: the worst and the best ratio over shapes and layouts."""
    groups: dict[tuple[str, str], list[float]] = {}
    for record in report["cases"]:
        groups.setdefault((record["op"], record["mode"]), []).append(record["ratio"])
    lines = [_cells("op", "mode", "worst ratio", "best ratio"), _cells(*["---"] * 4)]
    for (op, mode), ratios in groups.items():
        lines.append(_cells(op, mode, f"{min(ratios):.1f}x", f"{max(ratios):.1f}x"))
    return "\n".join(lines)


def cpu_conditions(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions, load = machine["versions"], report["load_before"][0]
    return (
        f"{machine['machine']['cpu']}, {report['threads']} threads, {machine['build']['cpu_isa']} kernels, "
        f"torch {versions['torch']}, Python {versions['python']}, float32, {report['when'][:10]}, load average "
        f"before the run {load:.1f}."
    )


def replace_table(text: str, name: str, table: str) -> str:
    """Puts `table` between the marks of `name`; text without these marks stays as it is."""
    pattern = rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)


def main() -> int:
    """Returns the exit status."""
    report = json.loads((RESULTS / "cpu" / "kernels.json").read_text())
    tables = {
        "cpu": cpu_table(report),
        "cpu-summary": cpu_summary(report),
        "cpu-conditions": cpu_conditions(report),
    }
    for document in (ROOT / "docs" / "performance.md", ROOT / "README.md"):
        text = document.read_text()
        for name, table in tables.items():
            text = replace_table(text, name, table)
        document.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
