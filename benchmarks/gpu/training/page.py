"""The part of the page that the stage `training` fills. Imports neither torch nor frd_kernels."""

from __future__ import annotations

from typing import Any

from ...kernel_tables import cells, header

HEAD = ("net", "steps", "ours, images/s", "eager, images/s", "ratio", "ours, ms", "eager, ms")
MEMORY = "peak MiB, ours / eager"


def section(report: dict[str, Any]) -> str:
    """Markdown: what a step costs, then whether ours learns what the reference learns; '' where nothing was run."""
    records = report.get("variants", {})
    if not report:
        return ""
    parts = ["## Training", _conditions(report)]
    rows = [_row(variant, record) for variant, record in records.items() if "ratio" in record]
    if rows:
        parts.append("\n".join([*header(*HEAD, MEMORY), *rows]))
    lines = [line for variant, record in records.items() for line in _findings(variant, record)]
    lines += [f"- {variant}: left out, {reason}." for variant, reason in report.get("left_out", {}).items()]
    if lines:
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _conditions(report: dict[str, Any]) -> str:
    data = report.get("data", {})
    made = f"{data['batches']} batches, forged in {data['seconds']:.1f} s" if data else "no batch was forged"
    return (
        f"On {report['gpu']}, {report['when']}, revision {report['revision'][:12]}: the trainer behind `frd train`, "
        f"from random weights, bf16, batch {report['batch']} at {report['size']} x {report['size']}, {made}. Times of "
        f"a step are medians (quartiles) over blocks of steps in turns, warm-up left out; memory is what a step takes "
        f"beside weights, averages and optimizer."
    )


def _row(variant: str, record: dict[str, Any]) -> str:
    rate, step, peak = record["images_per_s"], record["step_ms"], record.get("peak_bytes")
    return cells(
        variant,
        record["steps"],
        f"{rate['ours']:.1f}",
        f"{rate['reference']:.1f}",
        f"{record['ratio']:.2f}x",
        *(_spread(step[run]) for run in ("ours", "reference")),
        " / ".join(f"{peak[run] / 2**20:.0f}" for run in ("ours", "reference")) if peak else "-",
    )


def _spread(step: dict[str, float]) -> str:
    return f"{step['median']:.1f} ({step['p25']:.1f} to {step['p75']:.1f})"


def _findings(variant: str, record: dict[str, Any]) -> list[str]:
    """A line each for gradients, curves and what failed."""
    lines = []
    if gradients := record.get("gradients"):
        lines.append(f"- {variant}, first gradients: {_gradients(gradients)}")
    if curves := record.get("agreement"):
        lines.append(f"- {variant}, loss curves: {_curves(curves)}")
    return lines + [f"- {variant}: {problem}" for problem in record.get("problems", [])]


def _gradients(found: dict[str, Any]) -> str:
    error = found["median_error"]
    name, factor = found["worst"][0] if found["worst"] else ("none", 0.0)
    verdict = "agree" if found["agrees"] else f"DISAGREE in {len(found['over'])} parameters"
    return (
        f"{verdict}. Median relative error against float64 over {found['compared']} of {found['parameters']} "
        f"parameters: {error['ours']:.2e} in ours, {error['reference']:.2e} in the reference; the worst parameter has "
        f"{factor:.2f} times its peers' error ({name}), at most {found['limit']:g} is allowed."
    )


def _curves(found: dict[str, Any]) -> str:
    if found["agrees"] is None:
        return f"not judged: {found['steps']} steps were made, {found['least_steps']} are needed."
    falls = ", ".join(
        f"{run} {first:.3f} to {last:.3f}" for run, (first, last) in found["first_and_last"].items()
    )
    return (
        f"{'agree' if found['agrees'] else 'DISAGREE'}. Over {found['steps']} steps ours is {found['factor']:.2f} "
        f"times as far from the reference as that is from itself with perturbed weights, at most "
        f"{found['limit']:g} is allowed. Mean loss over the same batches when first and when "
        f"last seen: {falls}{'' if found['falls'] else ': it does NOT FALL'}."
    )
