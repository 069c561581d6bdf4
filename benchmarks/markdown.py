"""Tables in Markdown."""

from __future__ import annotations

from typing import Any


def cells(*values: Any) -> str:
    return "| " + " | ".join(str(value).replace("|", "/") for value in values) + " |"


def table(titles: tuple[str, ...], rows: list[str]) -> str:
    return "\n".join([cells(*titles), cells(*["---"] * len(titles)), *rows])
