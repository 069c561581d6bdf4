"""The kernels' tests on a GPU, in words and as a section of the page. Imports neither torch nor frd_kernels."""

from __future__ import annotations

from typing import Any

from ...kernel_tables import cells, header

OUTCOMES = ("passed", "failed", "skipped", "not_reached")
Counts = dict[str, dict[str, dict[str, int]]]  # backend -> op -> outcome -> cases
LONGEST = 300  # characters of a failure's message on the page


def totals(counts: Counts) -> dict[str, dict[str, int]]:
    """Backend -> outcome -> cases."""
    return {
        backend: {outcome: sum(found.get(outcome, 0) for found in ops.values()) for outcome in OUTCOMES}
        for backend, ops in counts.items()
    }


def summary(run: dict[str, Any]) -> str:
    """One line: the outcomes of every backend, and the share of Triton's cases that was taken."""
    parts = []
    for backend, found in totals(run["counts"]).items():
        share = f" ({run['triton_share']})" if backend == "triton" and "triton_share" in run else ""
        figures = ", ".join(f"{found[outcome]} {outcome.replace('_', ' ')}" for outcome in OUTCOMES)
        parts.append(f"{backend}{share}: {figures}")
    return "; ".join(parts) or "no case was collected"


def section(report: dict[str, Any]) -> str:
    """Markdown: the last run that counted its cases, and a line for each other one."""
    runs = report.get("runs", [])
    if not runs:
        return ""
    last = next((run for run in reversed(runs) if run.get("counts")), None)
    parts = ["## Suite"]
    if last:
        parts += [_conditions(last), _table(last["counts"])]
        if last.get("failures"):
            lines = (f"- `{case}`: {_short(message)}" for case, message in last["failures"].items())
            parts += ["Failures:", "\n".join(lines)]
    if others := [run for run in runs if run is not last]:
        parts += ["Other runs:", "\n".join(map(_line, others))]
    return "\n\n".join(parts)


def _conditions(run: dict[str, Any]) -> str:
    facts = [run.get("when", ""), f"revision {run['revision'][:12]}", run.get("what", "")]
    if "seconds" in run:
        facts.append(f"{run['seconds']:.0f} s")
    if "triton_share" in run:
        facts.append(f"of Triton's cases the share {run['triton_share']}")
    if run.get("only"):
        facts.append(f"only cases of `{run['only']}`")
    return ", ".join(filter(None, facts)) + "."


def _table(counts: Counts) -> str:
    lines = header("backend", "op", *(outcome.replace("_", " ") for outcome in OUTCOMES))
    for backend, ops in counts.items():
        for op, found in ops.items():
            lines.append(cells(backend, op or "-", *(found.get(outcome, 0) for outcome in OUTCOMES)))
    return "\n".join(lines)


def _line(run: dict[str, Any]) -> str:
    if run.get("counts"):
        figures = summary(run)
    else:
        names = (*OUTCOMES, "errors", "hazards")
        figures = ", ".join(f"{run[name]} {name.replace('_', ' ')}" for name in names if name in run)
        figures = figures or "nothing ran"
    facts = ", ".join(
        filter(None, (run.get("when", ""), f"revision {run['revision'][:12]}", run.get("what", "")))
    )
    return f"- {facts}: {figures}" + (f" ({run['note']})" if run.get("note") else "")


def _short(message: str) -> str:
    """On one line."""
    text = " ".join(message.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."
