"""The tables of docs/performance.md and README.md about the kernels, from the CPU's result file or a GPU's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .compare import geomean

Record = dict[str, Any]
COMPILED = "compiled, "


def cells(*values: Any) -> str:
    return "| " + " | ".join(str(value) for value in values) + " |"


def header(*titles: str) -> list[str]:
    return [cells(*titles), cells(*["---"] * len(titles))]


def shape(record: Record) -> str:
    return "[" + ", ".join(map(str, record["shape"])) + "]"


def op(record: Record) -> str:
    return f"{record['op']} (mean {record['mean']:g})" if record.get("mean") else str(record["op"])


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def verdict(record: Record) -> str:
    """Whether the target is reached; a ratio closer to 1 than two series of our own call are is no result."""
    if abs(record["ratio"] - 1) <= record["aa_spread"]:
        return "within noise"
    if record["target"] is None:
        return "-"
    return "yes" if record["ratio"] >= record["target"] else "**no**"


def others(record: Record) -> str:
    """The ratios against the rivals behind the first one, and against the floors."""
    pairs = {name: pair for name, pair in record["rivals"].items() if name != record["rival"]}
    return (
        ", ".join(f"{name} {times(pair['ratio'])}" for name, pair in (pairs | record["floors"]).items())
        or "-"
    )


def every_case(report: Record) -> str:
    """Every case, the ones that miss their target included."""
    lines = header(
        *("op", "shape", "dtype", "layout", "mode", "ours, ms", "eager, ms", "ratio", "A/A", "target"),
        *("reached", "other rivals and floors"),
    )
    for record in report["cases"]:
        target = record["target"]
        lines.append(
            cells(
                op(record),
                shape(record),
                record["dtype"],
                record["layout"],
                record["mode"],
                f"{record['ours_ms']['median']:.3f}",
                f"{record['rival_ms']['median']:.3f}",
                times(record["ratio"]),
                f"{100 * record['aa_spread']:.1f}%",
                "-" if target is None else f"{target:.1f}x",
                verdict(record),
                others(record),
            )
        )
    return "\n".join(lines)


def by_op(report: Record) -> str:
    """One row for each op and mode: the worst and the best ratio over shapes and layouts, in float32."""
    groups: dict[tuple[str, str], list[float]] = {}
    for record in report["cases"]:
        if record["dtype"] == "float32":
            groups.setdefault((record["op"], record["mode"]), []).append(record["ratio"])
    lines = header("op", "mode", "worst ratio", "best ratio")
    for (name, mode), ratios in groups.items():
        lines.append(cells(name, mode, f"{min(ratios):.1f}x", f"{max(ratios):.1f}x"))
    return "\n".join(lines)


def overall(report: Record) -> str:
    """Worst, geomean and best over the cases of a dtype, against the headline rival and against each case's best."""
    lines = header("dtype", "cases", "against", "worst", "worst case", "geomean", "best", "cases behind")
    for dtype in dict.fromkeys(record["dtype"] for record in report["cases"]):
        records = [record for record in report["cases"] if record["dtype"] == dtype]
        hardest = {id(r): min(pair["ratio"] for pair in r["rivals"].values()) for r in records}
        headline = {id(r): r["ratio"] for r in records}
        for name, ratios in (("headline rival", headline), ("its best rival", hardest)):
            worst = min(records, key=lambda record: ratios[id(record)])
            behind = sum(ratios[id(r)] < 1 - r["aa_spread"] for r in records)
            figures = [min(ratios.values()), geomean(ratios.values()), max(ratios.values())]
            low, middle, high = map(times, figures)
            lines.append(cells(dtype, len(records), name, low, label(worst), middle, high, behind))
    return "\n".join(lines)


def label(record: Record) -> str:
    return f"{op(record)} {shape(record)} {record['layout']} {record['mode']}"


def behind(report: Record) -> str:
    """Each rival that is faster than ours by more than noise, the worst first."""
    found = [
        (pair["ratio"], name, record)
        for record in report["cases"]
        for name, pair in record["rivals"].items()
        if pair["ratio"] < 1 - record["aa_spread"]
    ]
    if not found:
        return "No rival is faster than ours by more than noise in any case."
    lines = header("ratio", "A/A", "case", "dtype", "rival")
    for ratio, name, record in sorted(found, key=lambda entry: entry[0]):
        spread = f"{100 * record['aa_spread']:.1f}%"
        lines.append(cells(times(ratio), spread, label(record), record["dtype"], name))
    return "\n".join(lines)


def compiled(report: Record) -> str:
    """The cases in which the compiler's forms of the rival were measured."""
    forms = list(
        dict.fromkeys(name for record in report["cases"] for name in record["rivals"] if COMPILED in name)
    )
    if not forms:
        return "No result file holds compiled rivals."
    lines = header(
        "case", "dtype", "ours, ms", "eager", *(f"torch.compile, {f.removeprefix(COMPILED)}" for f in forms)
    )
    for record in report["cases"]:
        if any(form in record["rivals"] for form in forms):
            pairs = (record["rivals"].get(form) for form in forms)
            ratios = (times(pair["ratio"]) if pair else "-" for pair in pairs)
            ours = f"{record['ours_ms']['median']:.3f}"
            lines.append(cells(label(record), record["dtype"], ours, times(record["ratio"]), *ratios))
    return "\n".join(lines)


def left_out(report: Record) -> str:
    """Sides that were not measured, and why."""
    reasons: dict[tuple[str, str], int] = {}
    for record in report["cases"]:
        for side, reason in record.get("left_out", {}).items():
            reasons[side, reason] = reasons.get((side, reason), 0) + 1
    lines = [f"- {side} ({count} cases): {reason}" for (side, reason), count in reasons.items()]
    return "\n".join(lines) or "Every side of every case was measured."


def rates(calibration: Record | None) -> Iterator[str]:
    """What the machine itself reached in the same run."""
    if not calibration:
        return
    yield f"copy {calibration['copy']['bytes_per_s'] / 1e9:.1f} GB/s read and written"
    for dtype, entry in calibration["matrix"].items():
        yield f"{dtype} product of {entry['size']}x{entry['size']} matrices {entry['flops_per_s'] / 1e9:.0f} GFLOP/s"


def conditions(report: Record) -> str:
    machine = report["machine"]
    versions, load = machine["versions"], report["load_before"][0]
    busy = sum(not record["quiet"] for record in report["cases"])
    warning = (
        f" **Something else ran on the machine during {busy} of {len(report['cases'])} cases.**"
        if busy
        else ""
    )
    reached = ", ".join(rates(report.get("calibration")))
    measured = f" Measured here: {reached}." if reached else ""
    revision = f", revision {report['revision'][:12]}" if "revision" in report else ""
    return (
        f"{machine['machine']['cpu']}, {report['threads']} threads, {machine['build']['cpu_isa']} kernels, "
        f"torch {versions['torch']}, Python {versions['python']}, float32 unless said, {report['when'][:10]}, "
        f"load average before the run {load:.1f}{revision}.{measured}{warning}"
    )
