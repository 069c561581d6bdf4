"""The section of the page about where the kernels' time goes. Imports neither torch nor frd_kernels."""

from __future__ import annotations

import functools
from typing import Any

from ...kernel_tables import cells, header
from . import predicted

HEAD = (
    *("kernel", "us", "SM", "L2", "DRAM", "tensor", "issue", "occupancy (limit)", "registers", "shared"),
    *("blocks x threads", "cluster (at once)"),
)
STALLS, LINES = 5, 10


def section(report: dict[str, Any]) -> str:
    """Markdown: the waves, then for each case its launches and where they wait."""
    if not report:
        return ""
    tool = report.get("tool") or "no counters"
    if reason := report.get("without_counters"):
        tool += f" ({reason}): PyTorch's profiler tells the times of the launches"
    parts = [
        "## Where the time goes",
        f"{report['when']}, revision {report['revision'][:12]}, {report['gpu']}, {tool}.",
        _waves(report.get("waves", {})),
    ]
    parts += [_case(case) for case in report.get("cases", [])]
    missing = [f"- {name}: {reason}" for name, reason in report.get("problems", {}).items()]
    missing += [f"- {name}: no time was left" for name in report.get("left_out", [])]
    if missing:
        parts += ["### Not looked at", "\n".join(missing)]
    return "\n\n".join(part for part in parts if part)


def _waves(waves: dict[str, Any]) -> str:
    if not waves.get("points"):
        return ""
    points = [point for point in waves["points"] if "ms" in point]
    us = {point["key"]: 1e3 * point["ms"]["median"] for point in points}
    expected = predicted.POINTS if waves["gpu"] != "cpu" else {}
    lines = header("what", "us", "10 to 90 %", "ratio", "to", "predicted", "relative error")
    for group in dict.fromkeys(point["group"] for point in points):
        members = [point for point in points if point["group"] == group]
        for point in sorted(members, key=lambda point: point["value"]):
            key, base = point["key"], point["base"]
            lines.append(
                cells(
                    key,
                    f"{us[key]:.1f}",
                    " to ".join(f"{1e3 * point['ms'][bound]:.1f}" for bound in ("p10", "p90")),
                    f"{us[key] / us[base]:.2f}x" if base in us else "-",
                    base,
                    expected.get(key, "-"),
                    f"{point['relative_error']:.1e}",
                )
            )
    timing = (
        "a CUDA graph" if any(point["timing"] == "graph" for point in points) else "the clock on the wall"
    )
    text = f"Times of the ICM, of {timing}; predicted: by docs/icm-gpu-analysis.md, of the kernel at 4d5ee14."
    wrong = [f"- {p['key']}: {p['problem']}" for p in waves["points"] if "problem" in p]
    wrong += [f"- {key}: no time was left" for key in waves.get("left_out", [])]
    parts = [text, "\n".join(lines)] if points else []
    parts += ["\n".join(wrong), _clusters(waves.get("driver", {}))]
    return "\n\n".join(["### Waves", *filter(None, parts)])


def _clusters(driver: dict[str, Any]) -> str:
    if "clusters" not in driver:
        return f"Clusters at once: {driver.get('left_out', 'not asked')}."
    lines = header("blocks of a cluster", "shared bytes of a block", "clusters at once", "predicted")
    for asked in driver["clusters"]:
        now = asked["shared_bytes"] == driver["clusters"][0]["shared_bytes"]
        text = predicted.CLUSTERS.get(asked["blocks"], "-") if now else "-"
        lines.append(cells(asked["blocks"], asked["shared_bytes"], asked["clusters_at_once"], text))
    return "\n".join(lines)


def _case(case: dict[str, Any]) -> str:
    parts = [f"### {case['name']}"]
    if case.get("problem"):
        parts.append(f"By {case['how']}, since: {case['problem']}")
    if case["launches"]:
        parts.append("\n".join([*header(*HEAD), *map(_launch, case["launches"])]))
    for launch in case["launches"]:
        parts += [part for part in (_waits(launch), _hot(launch), _predictions(case, launch)) if part]
    return "\n\n".join(parts)


def _launch(launch: dict[str, Any]) -> str:
    show = functools.partial(predicted.figure, launch)
    shared = sum(launch.get(f"{kind}_shared_bytes", 0) for kind in ("dynamic", "static"))
    count = f"{launch['launches']:g} x " if launch.get("launches", 1) != 1 else ""
    cluster = f"{show('cluster')} ({show('clusters_at_once')})" if launch.get("cluster") else "-"
    return cells(
        f"{count}`{_text(launch['kernel'])}`",
        f"{launch['us']:.2f}",
        *(show(f"{unit}_percent", " %") for unit in ("sm", "l2", "dram", "tensor", "issue")),
        f"{show('occupancy_percent', ' %')} ({show('occupancy_limit_percent', ' %')})",
        show("registers"),
        f"{shared:.0f}" if "dynamic_shared_bytes" in launch else "-",
        f"{launch.get('grid', '-')} x {launch.get('block', '-')}",
        cluster,
    )


def _waits(launch: dict[str, Any]) -> str:
    """The reasons why a warp waits, in cycles for each instruction that its scheduler issues."""
    stalls = {k: v for k, v in launch.get("stalls", {}).items() if k != "selected"}
    if not stalls:
        return ""
    total = sum(stalls.values())
    most = ", ".join(f"{k} {v:.1f} ({100 * v / total:.0f} %)" for k, v in list(stalls.items())[:STALLS])
    counts = [
        f"{predicted.figure(launch, name)} {text}"
        for name, text in (("bank_conflicts", "bank conflicts"), ("local_loads", "loads from local memory"))
        if name in launch
    ]
    moved = [
        f"{launch[f'dram_{way}_bytes'] / 1e6:.2f} MB of DRAM {way}"
        for way in ("read", "written")
        if f"dram_{way}_bytes" in launch
    ]
    parts = [
        f"`{launch['kernel']}` waits, cycles an instruction: {most}",
        ", ".join(counts),
        ", ".join(moved),
    ]
    return ". ".join(filter(None, parts)) + "."


def _hot(launch: dict[str, Any]) -> str:
    hot = launch.get("hot", {})
    places = hot.get("lines") or hot.get("instructions") or []
    if "left_out" in hot:
        return f"Where it waits could not be read: {hot['left_out']}."
    if not places:
        return ""
    lines = header("samples", "where", "what", "waits for")
    for place in places[:LINES]:
        share = f"{place['percent']:.1f} %"
        where, text = place["name"], place.get("text", "")
        if place in hot.get("instructions", []):
            where, _, text = where.partition(" ")
        lines.append(cells(share, where, f"`{_text(text)}`" if text else "-", place.get("stall", "-")))
    files = ", ".join(f"{file['name']} {file['percent']:.1f} %" for file in hot.get("files", [])[:LINES])
    notes = [f"By file: {files}." if files else "", f"Beware: {hot['problem']}." if "problem" in hot else ""]
    return "\n\n".join(["\n".join(lines), *filter(None, notes)])


def _predictions(case: dict[str, Any], launch: dict[str, Any]) -> str:
    rows = list(predicted.rows(case["name"], launch))
    return "\n".join([*header("what", "predicted", "seen"), *(cells(*row) for row in rows)]) if rows else ""


def _text(code: str) -> str:
    """Fits a cell of a table."""
    return code.replace("|", "\\|").replace("`", "'")
