"""Plots of the result files of a folder, as PNG: `python -m benchmarks.plots FOLDER`. Needs matplotlib."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

OURS, RIVAL = "#1f6feb", "#8c959f"
SLOWER = "#cf222e"
BARS_OF_A_PLOT = 45
DPI = 120
SIDES = (("ours", "ours"), ("rival", "eager"))


class PlotError(RuntimeError):
    """Plots cannot be drawn, and why."""


def pyplot() -> Any:
    """matplotlib, drawing into files.

    Raises:
        PlotError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PlotError("the plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def plain_ticks(limits: tuple[float, float]) -> tuple[list[float], list[str]]:
    """1, 2, 5, 10, ... as far as they lie within the limits, and as text."""
    decades = range(-4, 7)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    shown = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
    return shown, [f"{tick:g}" for tick in shown]


def growth_figure(series: dict[str, Any]) -> Any:
    """Both sides over x, logarithmic, with the fitted power laws and their exponents."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    x = [point["x"] for point in series["points"]]
    for side, label, colour, marker in (("rival", "eager", RIVAL, "s"), ("ours", "ours", OURS, "o")):
        times = [point[f"{side}_ms"] for point in series["points"]]
        medians = [time["median"] for time in times]
        low = [time["median"] - time["p10"] for time in times]
        high = [time["p90"] - time["median"] for time in times]
        fit = series["fits"].get(side)
        if fit is not None:
            label += f": exponent {fit['exponent']:.2f}, r² {fit['r_squared']:.3f}"
            ends = [fit["least"], fit["most"]]
            axes.plot(
                ends, [fit["factor"] * e ** fit["exponent"] for e in ends], "--", color=colour, linewidth=1
            )
        axes.errorbar(x, medians, yerr=[low, high], fmt=marker, color=colour, label=label, capsize=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if series["over"] == "size":
        sides = [point["size"] for point in series["points"]]
        axes.set_xticks(x, [f"{side}²" for side in sides], rotation=45)
        axes.set_xlabel("pixels of the image")
    else:
        axes.set_xticks(x, [str(value) for value in x])
        axes.set_xlabel("images in the batch")
    axes.minorticks_off()
    axes.set_yticks(*plain_ticks(axes.get_ylim()))
    axes.set_ylabel("milliseconds, median with p10 to p90")
    axes.set_title(series["name"])
    axes.legend()
    figure.tight_layout()
    return figure


def label_of(record: dict[str, Any]) -> str:
    timing = record.get("timing", "wall")
    return record["name"] + ("" if timing == "wall" else f" ({timing})")


def ratio_figure(records: list[dict[str, Any]], title: str) -> Any:
    """Time of the headline rival over ours, the worst at the bottom; where ours is slower the bar is red."""
    plt = pyplot()
    ordered = sorted(records, key=lambda record: float(record["ratio"]))
    ratios = [record["ratio"] for record in ordered]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.24 * len(ordered)))
    colours = [OURS if ratio >= 1 else SLOWER for ratio in ratios]
    bars = axes.barh(
        range(len(ordered)),
        ratios,
        color=colours,
        xerr=[(r.get("aa_spread") or 0.0) * r["ratio"] for r in ordered],
    )
    axes.bar_label(bars, [f" {ratio:.2f}x" for ratio in ratios], fontsize=7)
    axes.set_yticks(range(len(ordered)), [label_of(record) for record in ordered], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    limits = min(0.5, 0.8 * min(ratios)), 1.6 * max(ratios)
    axes.set_xlim(*limits)
    ticks = [2.0**power for power in range(-6, 10) if limits[0] <= 2.0**power <= limits[1]]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.set_xlabel("eager time over ours, with the spread of ours against itself")
    axes.set_title(title)
    figure.tight_layout()
    return figure


def component_figure(entries: list[dict[str, Any]]) -> Any:
    """Milliseconds of each component, ours beside eager, a bar for each net."""
    plt = pyplot()
    bars = [
        (f"{entry['variant']}, {side_name}", entry[side]) for entry in entries for side, side_name in SIDES
    ]
    names = list(dict.fromkeys(name for _, shares in bars for name in shares["parts"]))
    colours = plt.get_cmap("tab20")
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.5 * len(bars)))
    left = [0.0] * len(bars)
    for number, name in enumerate(names):
        widths = [100 * shares["parts"].get(name, {"share": 0.0})["share"] for _, shares in bars]
        axes.barh(range(len(bars)), widths, left=left, color=colours(number % 20), label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(
        range(len(bars)), [f"{label}\n{shares['whole_ms']:.1f} ms" for label, shares in bars], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the forward pass, %")
    figure.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    figure.tight_layout()
    return figure


def loss_figure(variants: dict[str, dict[str, Any]]) -> Any:
    """For each net the loss of every step, and below how far from the reference's it is."""
    plt = pyplot()
    wide = 6.4 * len(variants)
    figure, rows = plt.subplots(2, len(variants), figsize=(wide, 6.4), squeeze=False, sharex="col")
    for (losses_of, distances_of), (variant, record) in zip(rows.T, variants.items(), strict=True):
        reference = record["losses"]["reference"]
        steps = range(1, len(reference) + 1)
        losses_of.plot(steps, reference, color=RIVAL, linewidth=3, label="reference")
        for run, colour, style in (("perturbed", RIVAL, ":"), ("ours", OURS, "-")):
            losses = record["losses"][run]
            distances = [abs(a - b) for a, b in zip(losses, reference, strict=True)]
            losses_of.plot(steps, losses, style, color=colour, linewidth=1.2, label=run)
            distances_of.plot(steps, distances, style, color=colour, linewidth=1.2, label=run)
        losses_of.set_title(f"training of {variant}")
        losses_of.set_ylabel("loss")
        distances_of.set_yscale("log")
        distances_of.set_ylabel("difference from the reference's")
        distances_of.set_xlabel("step")
        losses_of.legend()
        distances_of.legend()
    figure.tight_layout()
    return figure


def load(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """A result file of the folder; empty where there is none."""
    path = folder / name
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write_all(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Draws what the folder's kernels.json, model.json, growth.json and training.json hold; returns the files written.

    Raises:
        PlotError: matplotlib is not installed.
    """
    plt, folder = pyplot(), pathlib.Path(folder)
    written: list[pathlib.Path] = []

    def save(figure: Any, name: str) -> None:
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=DPI, bbox_inches="tight")
        plt.close(figure)
        written.append(path)

    for series in load(folder, "growth.json").get("series", []):
        if len(series["points"]) > 1:
            save(growth_figure(series), f"growth_{series['name'].replace(' ', '_')}_{series['over']}")
    records = load(folder, "kernels.json").get("cases", [])
    for name, chosen in by_plot(records).items():
        save(ratio_figure(chosen, f"kernels, {name}"), f"ratio_{name.replace(' ', '_').replace(',', '')}")
    model = load(folder, "model.json")
    if model.get("records"):
        save(ratio_figure(model["records"], "FRD-Net as a whole"), "ratio_model")
    if model.get("components"):
        save(component_figure(model["components"]), "components")
    trained = load(folder, "training.json").get("variants", {})
    if curves := {variant: record for variant, record in trained.items() if record.get("losses")}:
        save(loss_figure(curves), "training")
    return written


def by_plot(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records by mode, and by timing where there are several; of very many, both ends: the worst are never cut."""
    groups: dict[str, list[dict[str, Any]]] = {}
    several = len({record.get("timing", "wall") for record in records}) > 1
    for record in records:
        name = record["mode"] + (f", {record['timing']}" if several else "")
        groups.setdefault(name, []).append(record)
    for name, group in groups.items():
        ordered = sorted(group, key=lambda record: float(record["ratio"]))
        if len(ordered) > BARS_OF_A_PLOT:
            groups[name] = ordered[: BARS_OF_A_PLOT - BARS_OF_A_PLOT // 3] + ordered[-(BARS_OF_A_PLOT // 3) :]
    return groups


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 without matplotlib."""
    parser = argparse.ArgumentParser(prog="benchmarks.plots", description="plots of a folder of result files")
    parser.add_argument("folder", type=pathlib.Path)
    options = parser.parse_args(argv)
    try:
        for path in write_all(options.folder):
            print(path)
    except PlotError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
