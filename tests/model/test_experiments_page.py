"""docs/experiments.md: its tables are those of the result files."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from frd_model.ablate import table3
from frd_model.complexity import table2
from frd_model.evaluate_table import table1
from frd_model.robustness import markdown

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
SMALL_RUNS = PAGE.partition("## Small runs on forged photos")[2]
METHODS = ("net-1", "net-2", "net-3", "residual", "constant")
PRESETS = ("original", "cat-fixed", "trufor-opt", "benco-512")
ROBUSTNESS = ("robustness-1.json", "robustness-2.json", "robustness-3.json")
NETS = ("segformer_mit_b2", "paper", "released", "lite")


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def preset_row(method: str, preset: str) -> str:
    summary = read(f"{method}-{preset}.json")
    metric = summary["preset"]["main"]
    mean, level = summary["means"][metric], summary["image_level"]
    cells = [summary["method"], preset, f"`{metric}`", number(mean["mean"])]
    cells += [f"{number(mean['low'])} to {number(mean['high'])}", number(level["auc"])]
    cells.append(number(summary["authentic"]["photo_false_alarm"]))
    return f"| {' | '.join(cells)} |"


def expected() -> str:
    """The tables in the page's order."""
    runs = read("ablation.json")["runs"]
    return "\n".join(
        [
            *(preset_row(method, preset) for method in METHODS for preset in PRESETS),
            table1((None, RESULTS / f"{method}-benco-512.json") for method in METHODS).markdown(),
            markdown([read(name) for name in ROBUSTNESS]),
            table3(runs, runs[0]["evaluation"]["preset"]["name"]),
            table2({found["name"]: found for found in (read(f"complexity-{net}.json") for net in NETS)}),
        ]
    )


def rows(text: str) -> list[str]:
    """Lines of tables, without heads: those that hold a figure."""
    return [line for line in text.splitlines() if line.startswith("| ") and re.search(r"\d\.\d", line)]


def test_the_tables_are_those_of_the_files() -> None:
    assert rows(SMALL_RUNS) == rows(expected())


def test_every_figure_in_the_text_stands_in_a_file() -> None:
    log = "".join(file.read_text(encoding="utf-8") for file in RESULTS.glob("train-*.txt"))
    text = re.sub(r"```\n(?:frd|for ).*?```", "", SMALL_RUNS, flags=re.DOTALL)
    figures = re.findall(r"\d+\.\d+", "\n".join(line for line in text.splitlines() if line not in rows(text)))
    known = set(re.findall(r"\d+\.\d+", log + expected()))
    assert len(figures) > 10
    assert [figure for figure in figures if figure not in known] == []
