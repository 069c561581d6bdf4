"""What `checks` and `sanitize` have found, as parts of the page. Imports neither torch nor frd_kernels."""

from __future__ import annotations

from typing import Any

from ...kernel_tables import cells, header

OK = "ok"
CHECKS = {
    "accuracy": "agrees with float64",
    "repeats": "20 runs, equal bits",
    "stream": "another stream",
    "graph": "CUDA graph",
    "new data": "graph, new data",
    "memory": "graph keeps no memory",
}
NAMES = 12  # of calls that a line lists


def checks_section(report: dict[str, Any]) -> str:
    """How many calls passed each check, for each backend and operation; what did not, and what was not reached."""
    if not report:
        return ""
    calls: list[dict[str, Any]] = report["calls"]
    head = ("backend", "operation", *CHECKS.values(), "largest relative error")
    parts = ["## Equal bits, streams and CUDA graphs", _origin(report)]
    if calls:
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for call in calls:
            groups.setdefault((call["backend"], call["op"]), []).append(call)
        rows = [
            cells(*group, *(_passed(found, check) for check in CHECKS), _worst(found))
            for group, found in groups.items()
        ]
        parts.append("\n".join([*header(*head), *rows]))
    wrong = [
        f"- {call['backend']}, {call['dtype']}, {call['name']}: {check}: {outcome}"
        for call in calls
        for check, outcome in call["checks"].items()
        if outcome != OK
    ]
    parts.append("\n".join(["Wrong:", "", *wrong]) if wrong else f"Nothing was wrong in {len(calls)} calls.")
    parts += _left_out(report["left_out"])
    if missing := report["not_reached"]:
        more = ", ..." if len(missing) > NAMES else ""
        parts.append(f"Not reached, {len(missing)} calls: {', '.join(missing[:NAMES])}{more}.")
    return "\n\n".join(parts)


def _origin(report: dict[str, Any]) -> str:
    torch = report["versions"].get("torch", "?")
    return f"{report['when']}, revision {report['revision'][:12]}, {report['gpu']}, torch {torch}."


def _left_out(reasons: dict[str, str]) -> list[str]:
    """A line for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"Left out: {', '.join(found)}: {reason}." for reason, found in names.items()]


def _passed(calls: list[dict[str, Any]], check: str) -> str:
    outcomes = [call["checks"][check] for call in calls if check in call["checks"]]
    return f"{outcomes.count(OK)} of {len(outcomes)}" if outcomes else "-"


def _worst(calls: list[dict[str, Any]]) -> str:
    """Of each dtype."""
    errors: dict[str, float] = {}
    for call in calls:
        if (error := call.get("relative_error")) is not None:
            errors[call["dtype"]] = max(error, errors.get(call["dtype"], 0.0))
    return ", ".join(f"{dtype} {error:.1e}" for dtype, error in errors.items()) or "-"


def sanitize_section(report: dict[str, Any]) -> str:
    """What each tool has said, and the first lines of its errors."""
    if not report:
        return ""
    parts = ["## compute-sanitizer", _origin(report)]
    if tools := report["tools"]:
        head = ("tool", "outcome", "calls", "errors in kernels that are not ours", "seconds")
        rows = [
            cells(
                name,
                tool["outcome"].replace("|", "/"),
                tool["calls"],
                tool.get("in_others", "-"),
                tool["seconds"],
            )
            for name, tool in tools.items()
        ]
        parts.append("\n".join([*header(*head), *rows]))
    for name, tool in tools.items():
        if tool["outcome"] != OK and tool["log"]:
            parts.append("\n".join([f"{name}:", "", "```", *tool["log"], "```"]))
    parts += _left_out(report["left_out"])
    if plain := report.get("plain"):
        parts.append(f"Without a tool: {plain}.")
    return "\n\n".join(parts)
