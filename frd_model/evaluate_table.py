"""Table 1 of the paper from result files of `frd evaluate`, with the paper's own rows, marked as quoted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

HALVES = {"optimal": "Optimal threshold", "fixed": "Fixed threshold"}
# Names that sets go by beside those of the paper's columns, compared without case, spaces and punctuation.
_ALIASES = {"casia1": "CASIAv1", "casiav1plus": "CASIAv1", "casia": "CASIAv1", "nist": "NIST16"}


def paper_tables() -> dict[str, Any]:
    """The numbers of the paper's Tables 1, 2 and 3."""
    file = resources.files("frd_model") / "assets" / "paper_tables.json"
    tables: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return tables


@dataclass
class Table1:
    """Means by half ("optimal", "fixed"), method and set, and a line for each result that says how it was made."""

    means: dict[str, dict[str, dict[str, float | None]]] = field(
        default_factory=lambda: {half: {} for half in HALVES}
    )
    notes: list[str] = field(default_factory=list)

    def add(self, summary: Mapping[str, Any], name: str | None = None) -> None:
        """Take a summary of `frd evaluate` in, under the set's name or the one given.

        Raises ValueError where a mean is there already, the name is another one of the paper's sets than the summary's,
        or the summary is none.
        """
        try:
            method, preset = str(summary["method"]), summary["preset"]
            own, column = paper_column(str(summary["set"])), paper_column(name or str(summary["set"]))
            found = {half: summary["means"][metric]["mean"] for half, metric in preset["table"].items()}
            images = {half: summary["means"][metric]["images"] for half, metric in preset["table"].items()}
        except (KeyError, TypeError, AttributeError):
            raise ValueError(
                "result must be a JSON file of `frd evaluate`, got another kind of file"
            ) from None
        if own != column and own in paper_tables()["table1"]["columns"]:
            raise ValueError(f"result of {own} must not be named after another set, got {name!r}")
        for half, mean in found.items():
            row = self.means[half].setdefault(method, {})
            if column in row:
                raise ValueError(
                    f"method {method!r} must have one mean for {column} at the {half} threshold, got a second one"
                )
            row[column] = mean
            self.notes.append(
                f"{method}, {column}, {half}: {preset['table'][half]}, preset {preset['name']} (size {preset['size']}, "
                f"threshold {preset['threshold']:g}), {images[half]} images{_skipped(summary)}"
            )

    def markdown(self) -> str:
        """Both halves as Markdown tables: the paper's rows, marked as quoted, then the results'."""
        table = paper_tables()["table1"]
        paper = table["columns"][:-1]
        measured = [c for rows in self.means.values() for row in rows.values() for c in row]
        columns = [*paper, *dict.fromkeys(c for c in measured if c not in paper)]
        lines = [f"# Table 1: {table['caption']}", ""]
        for half, title in HALVES.items():
            lines += [
                f"## {title}",
                "",
                _row(["method", *columns, "avg"]),
                _row(["---"] * (len(columns) + 2)),
            ]
            for method, values in table[half].items():
                cells = dict(zip(table["columns"], values, strict=True))
                lines.append(_row([f"{method} (quoted)", *(_cell(cells.get(c)) for c in (*columns, "avg"))]))
            for method, row in self.means[half].items():
                average = _average([row.get(c) for c in paper])
                lines.append(_row([method, *(_cell(row.get(c)) for c in columns), _cell(average)]))
            lines.append("")
        lines.append(
            "Rows marked (quoted) are the paper's numbers. avg is the mean of the paper's five sets."
        )
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


def table1(results: Iterable[tuple[str | None, Path]]) -> Table1:
    """The table of result files, each with a name for its set or None. Raises ValueError, one line with the file."""
    table = Table1()
    for name, file in results:
        try:
            content = _read(file)
            summaries = content.get("sets") if isinstance(content, dict) else None
            summaries = summaries if isinstance(summaries, list) and summaries else [content]
            if name is not None and len(summaries) > 1:
                raise ValueError(f"a name goes with a result of one set, got {len(summaries)} sets")
            for summary in summaries:
                table.add(summary, name)
        except (ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"result {str(file)!r}: {reason}") from None
    return table


def _read(file: Path) -> Any:
    text = file.read_bytes()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("result must be a JSON file of `frd evaluate`, got no JSON") from None


def paper_column(name: str) -> str:
    """The paper's column that a set's name means, or the name itself."""
    plain = "".join(c for c in name.lower() if c.isalnum())
    columns = {c.lower(): c for c in paper_tables()["table1"]["columns"][:-1]}
    return columns.get(plain) or _ALIASES.get(plain) or name


def _skipped(summary: Mapping[str, Any]) -> str:
    return "".join(f"; skipped {count} x {reason}" for reason, count in summary.get("skipped", {}).items())


def _average(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
