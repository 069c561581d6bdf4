"""The tables of docs/performance.md about whole nets and growth, from the files of `model` and `growth`."""

from __future__ import annotations

from typing import Any

from . import components, table2
from .kernel_tables import cells, header, times

Report = dict[str, Any]
NOTHING = "There is no result file yet, so there is no figure."


def latency(report: Report | None) -> str:
    """Every record, then what was left out and every red gate, which has no time."""
    if report is None:
        return NOTHING
    lines = header(
        *("net", "mode", "batch", "pixels", "dtype", "timing", "ours, ms", "of", "eager, ms", "ratio", "A/A"),
        *("images/s, ours", "peak MiB, ours / eager", "other rivals"),
    )
    for record in report["records"]:
        peak = record.get("peak_bytes")
        rivals = {name: pair for name, pair in record["rivals"].items() if name != record["rival"]}
        lines.append(
            cells(
                record["variant"],
                f"{record['mode']}, {record['execution']}",
                record["batch"],
                record["size"],
                record["dtype"],
                record["timing"],
                f"{record['ours_ms']['median']:.1f}",
                record["backend"],
                f"{record['rival_ms']['median']:.1f}",
                times(record["ratio"]),
                f"{100 * record['aa_spread']:.1f}%",
                f"{record['images_per_s']['ours']:.2f}",
                " / ".join(f"{peak[side] / 2**20:.0f}" for side in ("ours", "rival")) if peak else "-",
                ", ".join(f"{name} {times(pair['ratio'])}" for name, pair in rivals.items()) or "-",
            )
        )
    notes = [f"- no time, red gate: {name}: {reason}" for name, reason in report["red"].items()]
    notes += [f"- left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    return "\n".join(lines) + ("\n\n" + "\n".join(notes) if notes else "")


def conditions(report: Report | None) -> str:
    if report is None:
        return NOTHING
    machine = report["machine"]
    busy = sum(not record["quiet"] for record in report["records"])
    warning = (
        f" **Something else ran on the machine during {busy} of {len(report['records'])} records.**"
        if busy
        else ""
    )
    return (
        f"{machine['machine']['cpu']}, {report['threads']} threads, torch {machine['versions']['torch']}, "
        f"{report['when'][:10]}, revision {report['revision'][:12]}.{warning}"
    )


def shares(report: Report | None) -> str:
    """The share of time of each component, a table for each net."""
    if report is None:
        return NOTHING
    parts = []
    for entry in report["components"]:
        ours = entry["ours"]
        parts += [
            f"{entry['variant']}, {entry['size']} pixels, batch {ours['batch']}, {ours['dtype']}, {entry['device']}:",
            components.table(entry),
        ]
    return "\n\n".join(parts) or NOTHING


def growth(report: Report | None) -> str:
    """A row for each series: the exponents, over which points, and the ratio at both ends."""
    if report is None:
        return NOTHING
    lines = header(
        *(
            "series",
            "over",
            "from",
            "to",
            "points",
            "exponent of ours",
            "of eager",
            "ratio at both ends",
            "worst ratio",
        )
    )
    for series in report["series"]:
        points = series["points"]
        if not points:
            continue
        ratios = [point["ratio"] for point in points]
        ends = [str(points[i][series["over"]]) for i in (0, -1)]
        fits = (_exponent(series["fits"].get(side)) for side in ("ours", "rival"))
        both = f"{times(ratios[0])}, {times(ratios[-1])}"
        lines.append(
            cells(series["name"], series["over"], *ends, len(points), *fits, both, times(min(ratios)))
        )
    notes = [f"- left out: {name}: {reason}" for name, reason in report.get("left_out", {}).items()]
    return "\n".join(lines) + ("\n\n" + "\n".join(notes) if notes else "")


def _exponent(fit: dict[str, Any] | None) -> str:
    return f"{fit['exponent']:.2f} (r² {fit['r_squared']:.3f})" if fit else "-"


def published(counted: Report | None) -> str:
    """Parameters and multiply-accumulates as `table2 --json` counted them, beside the published rows."""
    if counted is None:
        return NOTHING
    return table2.table(counted["counted"], counted["size"])
