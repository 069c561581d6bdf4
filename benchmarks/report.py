"""Writes the tables of docs/ and README.md from the result files: `python -m benchmarks.report`.

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`; what is outside the marks is left alone.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

from . import demo_tables

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _cells(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _shape(record: dict[str, Any]) -> str:
    return "[" + ", ".join(map(str, record["shape"])) + "]"


def _verdict(record: dict[str, Any]) -> str:
    """Whether the target is reached; a ratio closer to 1 than two series of our own call are is no result."""
    if abs(record["ratio"] - 1) <= record["aa_spread"]:
        return "within noise"
    if record["target"] is None:
        return "-"
    return "yes" if record["ratio"] >= record["target"] else "**no**"


def _others(record: dict[str, Any]) -> str:
    """The ratios against the rivals behind the first one, and against the floors."""
    others = {name: pair for name, pair in record["rivals"].items() if name != record["rival"]} | record[
        "floors"
    ]
    return ", ".join(f"{name} {pair['ratio']:.2f}x" for name, pair in others.items()) or "-"


def cpu_table(report: dict[str, Any]) -> str:
    """Every case, the ones that miss their target included."""
    head = ("op", "shape", "dtype", "layout", "mode", "ours, ms", "eager, ms", "ratio", "A/A", "target")
    lines = [_cells(*head, "reached", "other rivals and floors"), _cells(*["---"] * (len(head) + 2))]
    for record in report["cases"]:
        target = record["target"]
        lines.append(
            _cells(
                record["op"],
                _shape(record),
                record["dtype"],
                record["layout"],
                record["mode"],
                f"{record['ours_ms']['median']:.3f}",
                f"{record['rival_ms']['median']:.3f}",
                f"{record['ratio']:.2f}x",
                f"{100 * record['aa_spread']:.1f}%",
                "-" if target is None else f"{target:.1f}x",
                _verdict(record),
                _others(record),
            )
        )
    return "\n".join(lines)


def cpu_summary(report: dict[str, Any]) -> str:
    """One row for each op and mode: the worst and the best ratio over shapes and layouts, in float32."""
    groups: dict[tuple[str, str], list[float]] = {}
    for record in report["cases"]:
        if record["dtype"] == "float32":
            groups.setdefault((record["op"], record["mode"]), []).append(record["ratio"])
    lines = [_cells("op", "mode", "worst ratio", "best ratio"), _cells(*["---"] * 4)]
    for (op, mode), ratios in groups.items():
        lines.append(_cells(op, mode, f"{min(ratios):.1f}x", f"{max(ratios):.1f}x"))
    return "\n".join(lines)


def cpu_conditions(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions, load = machine["versions"], report["load_before"][0]
    busy = sum(not record["quiet"] for record in report["cases"])
    warning = (
        f" **Something else ran on the machine during {busy} of {len(report['cases'])} cases.**"
        if busy
        else ""
    )
    return (
        f"{machine['machine']['cpu']}, {report['threads']} threads, {machine['build']['cpu_isa']} kernels, "
        f"torch {versions['torch']}, Python {versions['python']}, float32 unless said, {report['when'][:10]}, "
        f"load average before the run {load:.1f}.{warning}"
    )


def replace_table(text: str, name: str, table: str) -> str:
    """Puts `table` between the marks of `name`; text without these marks stays as it is."""
    pattern = rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)


def _result(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return report


def cpu_tables() -> dict[str, str]:
    report = _result("cpu/kernels.json")
    return {
        "cpu": cpu_table(report),
        "cpu-summary": cpu_summary(report),
        "cpu-conditions": cpu_conditions(report),
    }


def demo_model_tables() -> dict[str, str]:
    trained, untrained = _result("demo/heldout.json"), _result("demo/untrained.json")
    return {
        "demo-heldout": demo_tables.heldout_table(trained, untrained),
        "demo-alarms": demo_tables.alarm_table(trained, untrained),
        "demo-training": demo_tables.training_table(_result("demo/training.json")),
    }


def main() -> int:
    """Returns the exit status."""
    tables = cpu_tables() | demo_model_tables()
    for name in ("docs/performance.md", "docs/model-card.md", "README.md"):
        text = (ROOT / name).read_text()
        for table, content in tables.items():
            text = replace_table(text, table, content)
        (ROOT / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
