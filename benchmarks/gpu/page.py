"""The page that `python -m benchmarks.gpu` leaves beside its files."""

from __future__ import annotations

from typing import Any

from ..kernel_tables import cells, header
from .profiling import page as profiling
from .proof import page as proof
from .proof import suite_page
from .training import page as training

# The files that it shows beside that of the kernels.
PARTS = ("suite", "checks", "sanitize", "calibration", "model", "training", "profile")
HEAD = ("op", "shape", "dtype", "layout", "mode", "ours, us", "of", "rival, us", "rival", "ratio", "A/A")


PROOFS = {
    "suite": suite_page.section,
    "checks": proof.checks_section,
    "sanitize": proof.sanitize_section,
}


def page(name: str, report: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """Markdown: conditions, calibration, a table for each timing, the nets, and what has no time and why. `found` are
    the files of the other stages, by the names in PARTS, empty where there is none."""
    parts = [f"# {name}", _conditions(report), _stages(report["stages"])]
    parts += [section(found.get(part, {})) for part, section in PROOFS.items()]
    if calibration := found.get("calibration"):
        parts.append(_calibration(calibration))
    for timing in dict.fromkeys(record["timing"] for record in report["cases"]):
        records = [record for record in report["cases"] if record["timing"] == timing]
        parts += [f"## Kernels, {timing}", _table(records)]
    model = found.get("model", {})
    if model.get("records"):
        parts += ["## FRD-Net", _nets(model["records"])]
    parts += [training.section(found.get("training", {})), profiling.section(found.get("profile", {}))]
    parts += _left_out(report["cases"], report["problems"])
    if missing := model.get("red", {}) | model.get("left_out", {}):
        parts += [
            "## Nets without a time",
            "\n".join(f"- {name}: {reason}" for name, reason in missing.items()),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _conditions(report: dict[str, Any]) -> str:
    state = report["state_before"]
    versions = report["machine"].get("versions", {})
    lines = [
        f"{report['when']}, revision {report['revision'][:12]}, torch {versions.get('torch', '?')}, "
        f"Triton {versions.get('triton', '?')}, Python {versions.get('python', '?')}."
    ]
    for label, facts in (("Before", state), ("After", report["state_after"])):
        gpu = facts.get("gpu", {})
        figures = {
            key: gpu[key]
            for key in ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w")
            if key in gpu
        }
        if figures:
            lines.append(f"{label}: " + ", ".join(f"{key} {value}" for key, value in figures.items()) + ".")
    return "\n".join(lines)


def _stages(stages: dict[str, dict[str, Any]]) -> str:
    lines = header("stage", "seconds", "outcome")
    for name, stage in stages.items():
        outcome = stage.get("problem") or "done"
        if summary := stage.get("summary"):
            outcome = f"{outcome} ({summary.strip('= ')})"
        lines.append(cells(name, stage.get("seconds", "running"), outcome.replace("|", "/")))
    return "\n".join(lines)


def _calibration(calibration: dict[str, Any]) -> str:
    lines = [
        "## Calibration",
        "",
        f"- copy: {calibration['copy']['bytes_per_s'] / 1e9:.0f} GB/s, read and written",
    ]
    for dtype, entry in calibration["matrix"].items():
        size = entry["size"]
        lines.append(f"- {dtype} product {size}x{size}x{size}: {entry['flops_per_s'] / 1e12:.2f} TFLOP/s")
    if launch := calibration.get("launch"):
        graph, wall = (1e3 * launch[key]["median"] / launch["launches"] for key in ("graph_ms", "wall_ms"))
        lines.append(
            f"- an empty kernel: {graph:.2f} us as a node of a graph, {wall:.2f} us launched by the host"
        )
    return "\n".join(lines)


def _table(records: list[dict[str, Any]]) -> str:
    """The cases in which ours does worst come first."""
    lines = header(*HEAD, "other backends", "other rivals and floors")
    for record in sorted(records, key=lambda record: record["ratio"]):
        mean = f" (mean {record['mean']:g})" if record["mean"] else ""
        backends = (
            f"{name} {pair['ratio']:.2f}x"
            for name, pair in record["backends"].items()
            if name != record["backend"]
        )
        others = {n: p for n, p in record["rivals"].items() if n != record["rival"]} | record["floors"]
        lines.append(
            cells(
                record["op"] + mean,
                "x".join(map(str, record["shape"])),
                record["dtype"],
                record["layout"],
                record["mode"],
                f"{1e3 * record['ours_ms']['median']:.2f}",
                record["backend"],
                f"{1e3 * record['rival_ms']['median']:.2f}",
                record["rival"],
                f"{record['ratio']:.2f}x",
                f"{100 * record['aa_spread']:.1f}%",
                ", ".join(backends) or "-",
                ", ".join(f"{name} {pair['ratio']:.2f}x" for name, pair in others.items()) or "-",
            )
        )
    return "\n".join(lines)


def _nets(records: list[dict[str, Any]]) -> str:
    head = (
        "net",
        "dtype",
        "mode",
        "timing",
        "ours, ms",
        "of",
        "rival, ms",
        "rival",
        "ratio",
        "A/A",
        "images/s",
    )
    lines = header(*head, "peak MiB, ours / rival")
    for record in sorted(records, key=lambda record: record["ratio"]):
        peak = record.get("peak_bytes", {})
        lines.append(
            cells(
                f"{record['variant']}, batch {record['batch']}, {record['size']}, {record['execution']}",
                record["dtype"],
                record["mode"],
                record["timing"],
                f"{record['ours_ms']['median']:.2f}",
                record["backend"],
                f"{record['rival_ms']['median']:.2f}",
                record["rival"],
                f"{record['ratio']:.2f}x",
                f"{100 * record['aa_spread']:.1f}%",
                f"{record['images_per_s']['ours']:.1f}",
                " / ".join(f"{peak[side] / 2**20:.0f}" for side in ("ours", "rival")) if peak else "-",
            )
        )
    return "\n".join(lines)


def _left_out(records: list[dict[str, Any]], problems: dict[str, str]) -> list[str]:
    parts = []
    if problems:
        lines = (f"- {case}: {reason}" for case, reason in problems.items())
        parts += ["## Cases without a time", "\n".join(lines)]
    reasons: dict[tuple[str, str], set[str]] = {}
    for record in records:
        for side, reason in record["left_out"].items():
            reasons.setdefault((side, reason), set()).add(record["name"])
    if reasons:
        lines = (
            f"- {side}, {len(names)} cases ({min(names)}{', ...' if len(names) > 1 else ''}): {reason}"
            for (side, reason), names in reasons.items()
        )
        parts += ["## Sides left out", "\n".join(lines)]
    return parts
